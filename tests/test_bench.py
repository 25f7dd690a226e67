"""The benchmarks: the corpus is what it says, the truth is exact, and every script runs on a small corpus."""

import itertools
import json
import os
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import script
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import near_copies
from bench.background import load_background
from bench.corpus import Corpus, read_texts, read_truth, write_corpus
from bench.dedup_quality import Truth, describe, judge
from bench.engines import ENGINES, gram_hashes, missing
from bench.exact import all_pairs, jaccard, shingles
from bench.measure import PROC, run_measured
from data_clean.keys import comparison_key
from stage import UserError

BACKGROUND = load_background(None)
CHINESE = st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x4E80), min_size=1, max_size=80)
SEEDS = st.integers(0, 2**32)


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth(Corpus(1200, 0.6, seed=3))


# --- the corpus ---


def test_a_corpus_depends_on_its_seed_alone(tmp_path):
    corpus = Corpus(300, 0.4, seed=5)
    texts = [text for block in corpus.blocks() for text in block]
    write_corpus(corpus, tmp_path / "a", files=7)
    write_corpus(Corpus(300, 0.4, seed=5), tmp_path / "b", files=1, file_format="jsonl")
    lines = (tmp_path / "b" / "part-00000.jsonl").read_text(encoding="utf-8").splitlines()
    assert read_texts(tmp_path / "a").to_pylist() == [json.loads(line)["text"] for line in lines] == texts
    assert read_texts(tmp_path / "a", 100).to_pylist() == texts[:100]
    assert read_truth(tmp_path / "a") == read_truth(tmp_path / "b") == corpus.groups
    assert [b for block in Corpus(300, 0.4, seed=6).blocks() for b in block] != texts


def test_planted_rows_are_distinct_and_as_many_as_asked_for(truth):
    rows = list(itertools.chain.from_iterable(group.rows for group in truth.groups))
    assert len(rows) == len(set(rows)) and set(rows) <= set(range(1200))
    assert 0.5 * 1200 < len(rows) <= 0.6 * 1200
    kinds = Counter(group.kind for group in truth.groups)
    assert {"原样抄录", "零散改动 1%", "整块改动 30%", "截短 50%", "大簇", "模板：法条", "文字：泰文"} <= set(
        kinds
    )


def test_texts_look_like_chinese_of_the_intended_lengths():
    texts = [text for block in Corpus(4000, 0).blocks() for text in block]
    lengths = np.array(list(map(len, texts)))
    assert lengths.min() >= 30 and lengths.max() <= 5000 and 700 < lengths.mean() < 860
    made, source = Counter("".join(texts)), Counter(BACKGROUND.codes.tobytes().decode("utf-32-le"))
    common = [char for char, _ in source.most_common(100)]
    ratios = [made[c] / made.total() / (source[c] / source.total()) for c in common]
    assert min(ratios) > 0.8 and max(ratios) < 1.25


def test_similarities_within_the_planted_groups(truth):
    found = describe(truth, np.random.default_rng(0))
    least, median, most = ({kind: d["quantiles"][q] for kind, d in found.items()} for q in (0, 2, 4))
    assert all(least[kind] == 1 for kind in ("原样抄录", "标点与全半角"))
    assert least["繁体"] > 0.9
    medians = [median[f"零散改动 {rate:.0%}"] for rate in near_copies.RATES]
    assert medians == sorted(medians, reverse=True) and medians[0] > 0.9 and medians[-1] < 0.3
    assert all(most[kind] < 0.65 for kind in found if kind.startswith(("模板", "文字", "只有")))
    assert max(most[kind] for kind in found if kind.startswith("模板")) > 0.58  # hard indeed


def test_texts_that_were_not_planted_together_hardly_share_anything(truth):
    apart = truth.pairs.jaccard[~truth.grouped()]
    assert len(apart) < 1e-5 * 1200**2 / 2


@settings(max_examples=100, deadline=None)
@given(CHINESE, st.sampled_from(near_copies.RATES), SEEDS)
def test_an_edit_costs_at_most_three_grams(text, rate, seed):
    changed = near_copies.scattered(text, rate, np.random.default_rng(seed), BACKGROUND)
    edits = max(1, round(rate * len(text)))
    assert abs(len(changed) - len(text)) <= edits
    if len(text) >= 3:
        assert len(shingles(text) - shingles(changed)) <= 3 * edits


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=0x9FFF, categories=["L", "N", "P", "Z"]), max_size=60), SEEDS)
def test_other_signs_leave_the_key_alone(text, seed):
    random = np.random.default_rng(seed)
    changed = near_copies.other_signs(text, 0, random, BACKGROUND)
    if comparison_key(text.upper()) == comparison_key(text):  # not so for a few letters outside Chinese
        assert comparison_key(changed) == comparison_key(text)


@settings(max_examples=100, deadline=None)
@given(CHINESE, st.sampled_from(near_copies.RATES), SEEDS)
def test_a_block_or_the_end_changes_and_nothing_else(text, rate, seed):
    size = max(1, round(rate * len(text)))
    changed = near_copies.one_block(text, rate, np.random.default_rng(seed), BACKGROUND)
    assert len(changed) == len(text)
    places = [place for place, (a, b) in enumerate(zip(text, changed, strict=True)) if a != b]
    assert not places or places[-1] - places[0] < size
    assert text.startswith(near_copies.cut_off(text, rate, np.random.default_rng(seed), BACKGROUND))


# --- the truth ---


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("甲乙丙", max_size=8), max_size=12))
def test_all_pairs_are_those_of_comparing_each_with_each(keys):
    pairs = all_pairs(keys, 0.3)
    found = {(a, b): j for a, b, j in zip(*map(np.ndarray.tolist, pairs), strict=True)}
    sets = list(map(shingles, keys))
    expected = {(a, b): jaccard(sets[a], sets[b]) for a, b in itertools.combinations(range(len(keys)), 2)}
    assert found == {pair: value for pair, value in expected.items() if value >= 0.3}


def test_an_oracle_gets_full_marks_and_extremes_get_what_they_deserve(truth):
    n = len(truth.keys)
    similar = {}
    for a, b, j in zip(*map(np.ndarray.tolist, truth.pairs), strict=True):
        if j >= 0.65:
            similar.setdefault(b, []).append(a)
    oracle = np.ones(n, bool)
    for number in range(n):
        oracle[number] = not any(oracle[other] for other in similar.get(number, ()))
    best = judge(truth, oracle)
    for low in ("0.80–1.00", "0.70–0.80", "0.65–0.70"):
        assert best["recall"][low][0] == best["recall"][low][1] > 0
    assert not any(count for count, _ in best["false"].values())
    assert best["groups"]["none"] == best["groups"]["more"] == 0 < best["groups"]["one"]
    nothing, everything = judge(truth, np.ones(n, bool)), judge(truth, np.zeros(n, bool))
    assert nothing["removed"] == 0 == sum(found for found, _ in nothing["recall"].values())
    assert all(found == total for found, total in everything["recall"].values())
    assert all(count == total for count, total in everything["false"].values())
    assert everything["groups"]["none"] == nothing["groups"]["more"] == best["groups"]["one"]


# --- the engines ---


@given(st.lists(st.text("甲乙丙", max_size=6), min_size=1, max_size=9), st.integers(1, 4))
def test_gram_hashes_are_those_of_each_key_alone(keys, block):
    hashes, starts = gram_hashes(keys, block)
    value = {}
    for key, start, end in zip(keys, starts.tolist(), starts.tolist()[1:], strict=False):
        grams = [key[i : i + 3] for i in range(len(key) - 2)]
        assert len(grams) == end - start
        assert all(value.setdefault(gram, h) == h for gram, h in zip(grams, hashes[start:end], strict=True))
    assert len(set(value.values())) == len(value)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_leaves_one_of_equal_texts(name):
    engine = ENGINES[name]
    if missing(engine):
        pytest.skip(missing(engine))
    texts = BACKGROUND.documents(np.random.default_rng(1), np.full(30, 400))
    keep = engine.run([*texts, texts[7], texts[7], texts[8]])
    assert keep.shape == (33,) and keep.dtype == bool
    rest = [n for n in range(30) if n not in (7, 8)]
    assert keep[rest].all()
    expected = 0 if "只标记" in name else 1
    assert keep[[7, 30, 31]].sum() == keep[[8, 32]].sum() == expected


def test_repeated_characters_change_nothing_for_the_original():
    texts = BACKGROUND.documents(np.random.default_rng(2), np.full(20, 200))
    texts += [near_copies.scattered(text, 0.05, np.random.default_rng(3), BACKGROUND) for text in texts]
    keep = ENGINES["原项目的写法"].run(texts)
    assert 0 < keep.sum() < len(texts)
    assert (keep == ENGINES["原项目的写法，先去掉重复的字"].run(texts)).all()


# --- the scripts ---


def test_corpus_script(tmp_path):
    done = script("bench/corpus.py", "--documents", 500, "--files", 3, "--out", tmp_path / "c")
    assert "500" in done.stdout
    files = sorted((tmp_path / "c").glob("part-*.parquet"))
    assert [pq.read_table(file).schema.names for file in files] == [["text", "source"]] * 3
    assert sum(pq.read_metadata(file).num_rows for file in files) == 500
    other = tmp_path / "other"
    other.mkdir()
    assert "换一个路径" in script("bench/corpus.py", "--out", other, ok=False).stderr


def test_quality_script(tmp_path):
    out = tmp_path / "q.json"
    done = script("bench/dedup_quality.py", "--documents", 800, "--engines", "本引擎 MinHash", "--out", out)
    assert "召回" in done.stdout or "比例" in done.stdout
    result = json.loads(out.read_text(encoding="utf-8"))["engines"]["本引擎 MinHash"]
    found, total = result["recall"]["0.80–1.00"]
    assert found > 0.99 * total > 0
    assert result["false"]["同一模板"][0] == result["false"]["无关文档"][0] == 0
    assert "可选" in script("bench/dedup_quality.py", "--engines", "不存在", ok=False).stderr


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="children cannot be measured here")
def test_speed_script(tmp_path):
    out = tmp_path / "s.json"
    names = ("本引擎 SimHash", "原项目的写法")
    script(
        "bench/dedup_speed.py", "--documents", 300, "--rounds", 1, "--engines", *names,
        "--folder", tmp_path, "--out", out,
    )  # fmt: skip
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert {r["engine"] for r in results} == {"本引擎 SimHash", "原项目的写法"}
    assert all(r["documents"] == 300 and 0 < r["kept"] < 300 and r["rate"] > 0 for r in results)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="children cannot be measured here")
def test_cleaning_script(tmp_path):
    out = tmp_path / "c.json"
    script(
        "bench/cleaning.py", "--documents", 400, "--workers", 1, 2, "--baseline", 200, "--folder", tmp_path,
        "--out", out,
    )  # fmt: skip
    content = json.loads(out.read_text(encoding="utf-8"))
    medians, steps = content["medians"], content["steps"]
    assert set(medians) == {"本项目，1 个进程", "本项目，2 个进程", "原项目的写法"}
    assert medians["本项目，1 个进程"]["kept"] == medians["本项目，2 个进程"]["kept"] > 0
    assert medians["原项目的写法"]["documents"] == 200
    assert all(sum(found.values()) > 0 for found in steps.values())


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="children cannot be measured here")
def test_costs_count_what_a_child_starts():
    # It stays long enough to be looked at several times.
    child = "import time; x = b'1' * 150_000_000; sum(range(3_000_000)); time.sleep(1); print(len(x))"
    code = (
        f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {child!r}]).decode())"
    )
    printed, cost = run_measured([sys.executable, "-c", code])
    assert printed.split() == ["150000000"]
    assert cost.cpu > 0.02 and cost.wall > 0
    assert cost.largest > 150e6
    if PROC.is_dir():  # the parent of the large process is counted too
        assert cost.memory > cost.largest and cost.memory > cost.anonymous > 150e6
    with pytest.raises(UserError, match="ZeroDivisionError"):
        run_measured([sys.executable, "-c", "1 / 0"])


def test_training_speed_compares_ways_on_the_same_shape(tmp_path) -> None:
    options = [
        "--models",
        "demo",
        "--ways",
        "original",
        "ours",
        "--micro_batch",
        1,
        "--steps",
        1,
        "--rounds",
        1,
    ]
    printed = script("bench/training_speed.py", *options, "--out", tmp_path / "speed.json").stdout
    results = json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))
    assert [r["way"] for r in results] == ["original", "ours"]
    assert all(r["tokens_per_second"] > 0 and r["memory"] > 1e8 for r in results)
    assert all(name in printed for name in ("original", "ours", "of fp32 peak"))
