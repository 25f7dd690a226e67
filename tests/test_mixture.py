"""Mixtures of token files: shares, phases, order and resume; and the thread that reads ahead."""

import itertools
import shutil
import threading
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset import PretrainBatches, TokenWindows
from pretrain import Config
from stage import UserError, parse
from training import checkpoint
from training.loader import MicroBatch, ReadAhead
from training.log import read_log
from training.mixture import Mixture, Phase, apportion, whole_weights

SIZES = [40, 25, 7]  # windows of the files below
SEQ = 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> list[Path]:
    """Files in which no two windows are alike, and a few tokens are left over at the end."""
    folder, start, paths = tmp_path_factory.mktemp("mixture"), 10, []
    for name, size in zip("abc", SIZES, strict=True):
        paths.append(folder / f"{name}.bin")
        np.arange(start, start + size * SEQ + 3, dtype="<u2").tofile(paths[-1])
        start += size * SEQ + 3
    return paths


@pytest.fixture(scope="module")
def windows(paths, vocabulary) -> TokenWindows:
    return TokenWindows(paths, SEQ, ChatGLMTokenizer(vocabulary))


weight_lists = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any)


@settings(max_examples=100, deadline=None)
@given(weights=weight_lists, seats=st.integers(0, 200))
def test_seats_go_to_whoever_is_due_first(weights: list[int], seats: int) -> None:
    due = [(Fraction(2 * k + 1, w), file) for file, w in enumerate(weights) if w for k in range(seats)]
    taken = Counter(file for _, file in sorted(due)[:seats])
    assert apportion(seats, weights) == [taken[file] for file in range(len(weights))]


def test_weights_are_taken_by_their_decimal_notation() -> None:
    assert whole_weights([0.1, 0.2, 0.7]) == [1, 2, 7]
    assert whole_weights([2.0, 1.5, 0.0]) == [4, 3, 0]
    assert whole_weights([1e-7, 1.0]) == [1, 10**7]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    later=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    begin=st.integers(0, 150),
    cuts=st.lists(st.integers(0, 300), max_size=6),
    seed=st.integers(0, 99),
)
def test_draws_do_not_depend_on_the_cuts_and_no_file_repeats_before_its_end(
    weights: list[int], later: list[int], begin: int, cuts: list[int], seed: int
) -> None:
    mixture = Mixture(SIZES, [Phase(0, weights), Phase(begin, later)], seed)
    cuts = sorted({0, 300, *cuts})
    pieces = [mixture.draw(a, b) for a, b in itertools.pairwise(cuts)]
    assert [len(p) for p in pieces] == [b - a for a, b in itertools.pairwise(cuts)]
    one_by_one = [int(mixture.draw(n, n + 1)[0]) for n in range(300)]
    for piece, (a, b) in zip(pieces, itertools.pairwise(cuts), strict=True):
        assert sorted(piece.tolist()) == sorted(one_by_one[a:b])
    bounds = np.cumsum([0, *SIZES])
    for file, size in enumerate(SIZES):
        mine = [i for i in one_by_one if bounds[file] <= i < bounds[file + 1]]
        passes = [mine[i : i + size] for i in range(0, len(mine), size)]
        assert all(len(set(p)) == len(p) for p in passes)
        if len(passes) > 2 and size > 7:
            assert passes[0] != passes[1]
    for a, b, shares in ((0, min(begin, 300), weights), (begin, 300, later)):
        drawn = Counter(int(np.searchsorted(bounds, i, side="right")) - 1 for i in one_by_one[a:b])
        for file, share in enumerate(shares):
            assert abs(drawn[file] - max(0, b - a) * share / sum(shares)) < 1.5


def test_every_step_has_the_shares_of_its_phase(windows) -> None:
    batches = PretrainBatches(windows, 8, 8, 0, 1, seed=5, phases=[Phase(0, [5, 3, 0]), Phase(6, [1, 1, 2])])
    for step in range(12):
        files, _ = windows.locate(batches.drawn(step))
        assert np.bincount(files, minlength=3).tolist() == ([5, 3, 0] if step < 6 else [2, 2, 4])


def test_without_weights_an_epoch_is_every_window_once(windows) -> None:
    batches = PretrainBatches(windows, 9, 9, 0, 1, seed=5)
    assert batches.steps_per_epoch == 8
    drawn = [np.concatenate([batches.drawn(8 * e + s) for s in range(8)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(72)) for epoch in drawn)
    assert len(set(map(tuple, drawn))) == 3


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_mixed_batch(windows, world: int) -> None:
    phases = [Phase(0, [3, 1, 0]), Phase(4, [1, 1, 1])]

    def rows(step: int, rank: int, world: int) -> list[tuple[int, ...]]:
        parts = PretrainBatches(windows, 12, 5, rank, world, seed=1, phases=phases).step(step)
        assert all(len(mb.tokens) <= 5 for mb in parts)
        return [tuple(row) for mb in parts for row in mb.tokens.tolist()]

    for step in range(8):
        ranks = [rows(step, rank, world) for rank in range(world)]
        assert sorted(itertools.chain(*ranks)) == sorted(rows(step, 0, 1))
        assert {len(r) for r in ranks} == {12 // world}


def test_description_says_where_the_rows_are(windows, paths) -> None:
    batches = PretrainBatches(windows, 6, 2, 1, 2, seed=1)
    rows = np.concatenate([mb.tokens.numpy() for mb in batches.step(3)])
    expected = []
    for part in batches.describe(3).split("；"):
        name, places = part.split(" 的 token ")
        tokens = np.fromfile(paths[0].with_name(name), dtype="<u2")
        for place in places.split("、"):
            start, end = map(int, place.split("–"))
            expected.append(tokens[start:end].tolist())
    assert rows.tolist() == expected


def test_the_plan_counts_what_will_be_drawn(windows) -> None:
    batches = PretrainBatches(windows, 8, 8, 0, 1, seed=5, phases=[Phase(0, [7, 1, 0]), Phase(30, [0, 0, 1])])
    files, _ = windows.locate(np.concatenate([batches.drawn(step) for step in range(40)]))
    a, b, c = batches.plan(40).splitlines()
    drawn = np.bincount(files).tolist()
    assert drawn == [210, 30, 80]
    assert "a.bin" in a
    assert f"{210 / 40:.2f} 遍" in a
    assert f"{30 / 320:.1%}，{30 / 25:.2f} 遍" in b
    assert "重复" not in b
    assert f"{80 / 7:.2f} 遍" in c
    assert "重复" in c


@pytest.fixture(scope="module")
def annealed(tokens, tmp_path_factory) -> tuple[list[object], Path]:
    """The options of a run of 12 steps over two files with masked documents, and what it left."""
    out = tmp_path_factory.mktemp("annealed") / "out"
    options = [
        "--data", tokens, tokens.parent / "valid.bin", "--valid", tokens.parent / "valid.bin", "--weights", 3, 1,
        "--anneal_weights", 1, 3, "--anneal_fraction", 0.5, "--document_mask", "--dim", 32, "--n_layers", 2,
        "--n_heads", 2, "--max_seq_len", 64, "--batch_tokens", 512, "--lr", 3e-3, "--log_every", 1,
        "--device", "cpu", "--precision", "fp32",
        "--max_steps", 12, "--save_every", 5, "--keep_last", 9,
    ]  # fmt: skip
    printed = script("pretrain.py", *options, "--out", out).stdout
    assert "占 50.0%" in printed  # 6 steps of 3 : 1 and 6 of 1 : 3
    return options, out


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r}


def test_a_resumed_mixture_goes_on_as_if_unbroken_and_refuses_other_shares(annealed, tmp_path) -> None:
    options, out = annealed
    curve = losses(out)
    assert curve[12] < curve[1] - 0.2
    shutil.copytree(out, tmp_path / "cut")
    for folder in checkpoint.list_steps(tmp_path / "cut")[1:]:
        shutil.rmtree(folder)
    other = [*options, "--out", tmp_path / "cut", "--resume"]
    other[other.index("--anneal_fraction") + 1] = 0.25
    refused = script("pretrain.py", *other, ok=False).stderr
    assert "phases" in refused
    assert len(refused.strip().splitlines()) == 1
    script("pretrain.py", *options, "--out", tmp_path / "cut", "--resume")
    assert losses(tmp_path / "cut") == curve


def test_shares_that_cannot_be_drawn_are_one_clear_error(tmp_path) -> None:
    files = ["--data", str(tmp_path / "a.bin"), str(tmp_path / "b.bin")]
    for options, word in (
        (["--weights", "1"], "--weights"),
        (["--weights", "1", "-1"], "--weights"),
        (["--weights", "nan", "1"], "--weights"),
        (["--weights", "0", "0"], "--weights"),
        (["--weights", "1", "0"], "b.bin"),
        (["--weights", "1", "0", "--anneal_weights", "2", "0"], "b.bin"),
        (["--anneal_weights", "1", "2", "3"], "--anneal_weights"),
        (["--anneal_fraction", "0.1"], "--anneal_weights"),
        (["--anneal_weights", "1", "1", "--anneal_fraction", "1.5"], "--anneal_fraction"),
    ):
        with pytest.raises(UserError, match=word):
            parse(Config, [*files, *options])
    assert parse(Config, [*files, "--weights", "1", "0", "--anneal_weights", "2", "1"]).weights == (1, 0)


def test_a_file_too_short_for_a_window_cannot_have_a_share(tokens, tmp_path) -> None:
    np.arange(9, dtype="<u2").tofile(tmp_path / "short.bin")
    options = ["--data", tokens, tmp_path / "short.bin", "--weights", 1, 1, "--out", tmp_path / "out"]
    failed = script(
        "pretrain.py", *options, "--max_seq_len", 64, "--device", "cpu", "--precision", "fp32", ok=False
    ).stderr
    assert "short.bin" in failed
    assert len(failed.strip().splitlines()) == 1


class Fragile:
    """Batches of one number each, that cannot be read at step 3."""

    steps_per_epoch = 9.0
    signature: dict = {}

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def step(self, step: int) -> list[MicroBatch]:
        self.threads.add(threading.get_ident())
        if step == 3:
            raise UserError("broken.bin")
        number = torch.full((1, 1), step)
        return [MicroBatch(number, number)]

    def describe(self, step: int) -> str:
        return f"row {step}"


def test_reading_ahead_gives_the_same_and_its_errors_at_their_step() -> None:
    fragile = Fragile()
    ahead = ReadAhead(fragile, torch.device("cpu"))
    for step in (0, 1, 2):
        assert ahead.step(step)[0].tokens.item() == step
    for _ in range(2):
        with pytest.raises(UserError, match=r"broken\.bin"):
            ahead.step(3)
    assert [ahead.step(step)[0].tokens.item() for step in (4, 5, 9, 2, 2)] == [4, 5, 9, 2, 2]
    assert ahead.describe(7) == "row 7"
    assert fragile.threads != {threading.get_ident()}
    assert len(fragile.threads) == 1


def test_reading_ahead_changes_no_bit(windows) -> None:
    plain = PretrainBatches(windows, 6, 4, 0, 2, seed=2)
    ahead = ReadAhead(plain, torch.device("cpu"))
    for step in range(20):
        for ours, theirs in zip(ahead.step(step), plain.step(step), strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.targets, theirs.targets)
    assert (ahead.signature, ahead.steps_per_epoch) == (plain.signature, plain.steps_per_epoch)
