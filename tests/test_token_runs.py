"""The external sort that shuffles a corpus, and the split by the hash of the text."""

from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.texts import from_strings
from sources import token_runs
from sources.token_runs import ENTRY, NOT_TRAINED, Run, RunWriter, in_order, order_numbers, run_paths
from sources.validation import HASHES, choose_limit, text_hashes, validation_limit
from sources.weights import draw_copies

DTYPE = np.dtype("<u2")
LARGEST = 2**64 - 1
# Documents of several tasks: hash, tokens, copies.
DOCUMENT = st.tuples(st.integers(0, LARGEST), st.integers(1, 9), st.integers(0, 3))
TASKS = st.lists(st.lists(DOCUMENT, max_size=12), max_size=5)


@contextmanager
def limits(**values: int):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(token_runs, name, value)
        yield


def write_runs(folder, tasks, seed, batch: int) -> list[Run]:
    """Write documents as the tasks would, `batch` at a time; the tokens of a document repeat its number."""
    runs, number = [], 0
    for task, documents in enumerate(tasks):
        (folder / str(task)).mkdir(parents=True)
        writer = RunWriter(folder / str(task), task, seed)
        for first in range(0, len(documents), batch):
            rows = documents[first : first + batch]
            entries = np.zeros(len(rows), ENTRY)
            entries["hash"], entries["tokens"] = [r[0] for r in rows], [r[1] for r in rows]
            ids = np.repeat(np.arange(number, number + len(rows)), entries["tokens"]).astype(DTYPE)
            copies = np.array([r[2] for r in rows], np.int64)
            writer.add(entries, np.arange(first, first + len(rows)), copies, ids)
            number += len(rows)
        names = np.array([task], np.uint32)
        runs += [Run(*run_paths(folder / str(task), n), names) for n in range(writer.close())]
    return runs


def read_all(runs, least_hash=0) -> tuple[np.ndarray, np.ndarray]:
    parts = list(in_order(runs, least_hash, DTYPE))
    empty = (np.empty(0, ENTRY), np.empty(0, DTYPE))
    entries, ids = (np.concatenate(part) for part in zip(empty, *parts, strict=True))
    assert entries["tokens"].sum() == len(ids)
    return entries, ids


@settings(max_examples=150, deadline=None)
@given(
    tasks=TASKS,
    seed=st.none() | st.integers(0, 3),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(1, 20)),
    batch=st.integers(1, 12),
    least_hash=st.sampled_from([0, 2**62, 2**63]),
)
def test_runs_are_the_documents_sorted(tmp_path_factory, tasks, seed, sizes, batch, least_hash) -> None:
    """Against sorting everything in memory; the sizes of runs, ranges and batches change nothing."""
    numbers = iter(range(10**6))
    wanted = sorted(
        (int(order_numbers(task, np.array([place]), np.array([copy]), seed)[0]), number, task, tokens)
        for task, documents in enumerate(tasks)
        for place, (hash_, tokens, copies) in enumerate(documents)
        for number in [next(numbers)]
        for copy in range(copies)
        if hash_ >= least_hash
    )
    run_bytes, range_bytes, sample = sizes
    with limits(RUN_BYTES=run_bytes, RANGE_BYTES=range_bytes, SAMPLE_TOKENS=sample):
        runs = write_runs(tmp_path_factory.mktemp("runs"), tasks, seed, batch)
        entries, ids = read_all(runs, least_hash)
    assert entries["order"].tolist() == [order for order, *_ in wanted]
    assert entries["source"].tolist() == [task for _, _, task, _ in wanted]
    assert ids.tolist() == [number for _, number, _, tokens in wanted for _ in range(tokens)]


def test_documents_that_are_not_trained_on_are_only_there_for_validation(tmp_path) -> None:
    runs = write_runs(tmp_path, [[(5, 2, 0), (7, 3, 2)]], 0, 10)
    assert read_all(runs)[1].tolist() == [1] * 6
    (entries, ids), *more = token_runs.documents_below(runs, 6, DTYPE)
    assert not more and entries["copy"].tolist() == [NOT_TRAINED] and ids.tolist() == [0, 0]


def test_order_numbers_differ_and_look_random() -> None:
    places, copies = np.tile(np.arange(20_000), 2), np.repeat([0, 1], 20_000)
    numbers = np.concatenate([order_numbers(task, places, copies, seed=1) for task in (0, 1, 2**22 - 1)])
    assert len(np.unique(numbers)) == len(numbers)
    uniform = numbers / 2.0**64
    np.testing.assert_allclose(np.histogram(uniform, 20, (0, 1))[0] / len(numbers), 0.05, atol=0.003)
    assert abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.01
    assert abs(np.corrcoef(uniform[:20_000], uniform[20_000:40_000])[0, 1]) < 0.03  # copies of a document
    assert (numbers[:40_000] == order_numbers(0, places, copies, seed=2)).sum() == 0


def test_without_a_seed_copies_follow_each_other_as_epochs() -> None:
    numbers = order_numbers(1, np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), None)
    assert numbers.tolist() == sorted(set(numbers.tolist()))
    later_task = order_numbers(2, np.array([0]), np.array([0]), None)[0]
    assert numbers[1] < later_task < numbers[2]


# --- weights ---


def test_fractions_are_drawn_by_the_text_alone() -> None:
    hashes = text_hashes(from_strings(f"第{i}篇" for i in range(20_000)))
    half = draw_copies(hashes, np.full(20_000, 0.5))
    assert set(half.tolist()) == {0, 1} and abs(half.mean() - 0.5) < 0.02
    more = draw_copies(hashes, np.full(20_000, 2.75))
    assert set(more.tolist()) == {2, 3} and abs(more.mean() - 2.75) < 0.02
    assert (
        half <= draw_copies(hashes, np.full(20_000, 0.75))
    ).all()  # a greater weight keeps what was chosen
    is_low = hashes < 2**64 // 100  # nor does it matter which documents validate
    assert abs(half[is_low].mean() - 0.5) < 0.15
    assert (draw_copies(hashes, np.ones(20_000)) == 1).all()


# --- validation ---

RANKS = st.lists(st.integers(0, LARGEST) | st.integers(0, LARGEST // 50), max_size=40, unique=True)
SPLIT = st.tuples(
    st.sampled_from([0.0, 0.003, 0.02, 0.3]), st.integers(0, 6), st.sampled_from([0, 60, 10**6])
)


def limit_of(tokens_by_hash: dict[int, int], split: tuple[float, int, int]) -> int:
    hashes = sorted(tokens_by_hash)
    tokens = np.array([tokens_by_hash[h] for h in hashes], np.int64)
    return validation_limit(np.array(hashes, np.uint64), tokens, *split)


@settings(max_examples=500, deadline=None)
@given(ranks=RANKS, more=RANKS, split=SPLIT)
def test_adding_documents_never_moves_one_from_training_to_validation(ranks, more, split) -> None:
    tokens_of = {h: 1 + h % 50 for h in [*ranks, *more]}
    before = limit_of({h: tokens_of[h] for h in ranks}, split)
    after = limit_of(tokens_of, split)
    if len(ranks) >= 2:
        assert after <= before


@settings(max_examples=500, deadline=None)
@given(ranks=RANKS, more=RANKS, split=SPLIT)
def test_the_split_is_fixed_between_least_and_most(ranks, more, split) -> None:
    fraction, least, most_tokens = split
    tokens_of = {h: 1 + h % 50 for h in [*ranks, *more]}
    base = int(fraction * HASHES)
    is_small = sum(h < base for h in ranks) < least or len(ranks) < 2
    is_large = sum(tokens for h, tokens in tokens_of.items() if h < base) > most_tokens
    if not is_small and not is_large:
        for documents in (ranks, list(tokens_of)):
            assert limit_of({h: tokens_of[h] for h in documents}, split) == base


@settings(max_examples=500, deadline=None)
@given(ranks=RANKS, split=SPLIT)
def test_small_corpora_have_validation_and_large_ones_not_too_much(ranks, split) -> None:
    fraction, least, most_tokens = split
    tokens_of = {h: 1 + h % 50 for h in ranks}
    limit = limit_of(tokens_of, split)
    chosen = [h for h in ranks if h < limit]
    assert sum(tokens_of[h] for h in chosen) <= most_tokens or len(chosen) == 1
    if least and fraction and len(ranks) >= 2:
        assert chosen or most_tokens < sum(tokens_of.values())
        assert limit <= max(fraction, 0.1) * HASHES or chosen == [min(ranks)]
    if not fraction or len(ranks) < 2:
        assert not chosen


def test_split_of_corpora_of_all_sizes() -> None:
    rng = np.random.default_rng(0)
    hashes = np.sort(rng.integers(0, 2**64, 1_000_000, dtype=np.uint64))
    counts = {}
    for documents in (10, 400, 3000, 20_000, 1_000_000):
        some = np.sort(rng.permutation(hashes)[:documents])
        limit = validation_limit(some, np.full(documents, 500), 0.005, 50, 1_000_000)
        counts[documents] = int((some < limit).sum())
    assert 1 <= counts[10] <= 3 and 20 <= counts[400] <= 45 and 50 <= counts[3000] <= 120
    assert 70 <= counts[20_000] <= 130  # 0.005
    assert 1000 < counts[1_000_000] <= 2000  # halved until 500 tokens each fit into a million


def test_the_limit_of_runs_counts_repeated_and_copied_texts_once(tmp_path) -> None:
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 2**64, 600, dtype=np.uint64).tolist()
    distinct = {h: 1 + h % 9 for h in hashes}
    tasks = [[(h, 1 + h % 9, int(h % 3)) for h in hashes[:400]], [(h, 1 + h % 9, 1) for h in hashes[200:]]]
    runs = write_runs(tmp_path, tasks, 0, 50)
    for split in ((0.01, 50, 10**6), (0.2, 5, 300), (0.2, 5, 10**6)):
        assert choose_limit(runs, *split) == limit_of(distinct, split)
