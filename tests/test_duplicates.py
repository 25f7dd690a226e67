"""Near duplicates: what the compiled engine finds, against brute force and against datasketch and simhash."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from conftest import edited
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean import duplicates, reference
from data_clean.duplicates import find_clusters, join_near
from data_clean.jaccard import similarities
from data_clean.keys import comparison_key, keys_of
from data_clean.reference import ngrams
from data_clean.shards import SLOTS, Corpus, Documents, Shard, write_shard
from data_clean.signatures import Settings, minhash, sign, simhash
from data_clean.texts import from_strings

DEFAULT = Settings()
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def sentence(rng, length=60):
    return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(length))


def corpus_of(folder: Path, texts, config=DEFAULT, sources=None, shards=1, references=0):
    """Texts as shards on disk; the first `references` shards are only compared with."""
    sources = np.array(sources or ["x"] * len(texts), object)
    made = []
    for number, part in enumerate(np.array_split(np.arange(len(texts)), shards)):
        documents = Documents(from_strings([texts[i] for i in part]), sources[part], part.astype(np.uint64))
        slot_of = np.random.default_rng(number).integers(0, SLOTS, len(part))
        signatures = sign(keys_of(documents.texts), config)
        names = write_shard(folder / f"{number}", [documents], [signatures], slot_of)
        made.append(Shard(folder / f"{number}", names, number < references))
    return Corpus(made)


def clusters_of(folder, texts, config=DEFAULT, join=join_near, rank=lambda source: 0, **options):
    """{dropped: kept} as positions in `texts`, and the positions that are dropped as exact duplicates."""
    corpus = corpus_of(folder, texts, config, **options)
    found = find_clusters(corpus, config, join, rank)
    position = np.concatenate([shard.column("order") for shard in corpus.shards]).astype(int)
    dropped = found.members != found.kept
    pairs = zip(
        position[found.members[dropped]].tolist(), position[found.kept[dropped]].tolist(), strict=True
    )
    return dict(pairs), set(position[found.members[found.is_exact & dropped]].tolist())


def jaccard(one, other, n=3):
    a, b = ngrams(comparison_key(one), n), ngrams(comparison_key(other), n)
    return len(a & b) / len(a | b)


# --- keys, similarity, signatures ---


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, max_size=5))
def test_compiled_keys_equal_the_definition(texts):
    keys = keys_of(from_strings(texts))
    for index, text in enumerate(texts):
        codes = keys.codes[keys.starts[index] : keys.starts[index + 1]]
        assert "".join(map(chr, codes)) == comparison_key(text)
        assert comparison_key(comparison_key(text)) == comparison_key(text)


def test_key_of_every_character():
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    keys = keys_of(from_strings(characters))
    texts = "".join(map(chr, keys.codes))
    for index, character in enumerate(characters):
        assert texts[keys.starts[index] : keys.starts[index + 1]] == comparison_key(character)


def test_keys_ignore_width_case_punctuation_and_chinese_script_only():
    assert comparison_key("ＡＢc，１２３！ 中文。") == "abc123中文"
    assert comparison_key("25℃ ㎏") == comparison_key("25°C kg") == "25ckg"
    assert comparison_key("漢語，國家") == comparison_key("汉语 国家")
    assert comparison_key("ｶﾞ") == comparison_key("ガ")
    assert comparison_key("की") != comparison_key("का")  # vowel signs count
    assert comparison_key("、。！🙂") == ""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("甲乙丙丁a", max_size=12) | TEXT, min_size=2, max_size=6), st.integers(1, 5))
def test_jaccard_equals_that_of_python_sets(texts, n):
    keys = [comparison_key(text) for text in texts]
    pairs = np.array(list(itertools.combinations(range(len(texts)), 2)))
    values = similarities(keys_of(from_strings(texts)), pairs, n)
    for (a, b), value in zip(pairs, values, strict=True):
        one, other = (ngrams(keys[i], n) - {""} for i in (a, b))
        assert value == (len(one & other) / len(one | other) if one | other else 0)


def test_signatures_estimate_similarity():
    rng = random.Random(1)
    text = sentence(rng, 500)
    texts = [text] + [edited(rng, text, n) for n in (5, 20, 60)]
    low_bytes = minhash(keys_of(from_strings(texts)), Settings(num_perm=1024))[1]
    for index in range(1, 4):
        assert abs((low_bytes[0] == low_bytes[index]).mean() - jaccard(texts[0], texts[index])) < 0.06


def test_minhash_is_the_least_hash_of_each_permutation():
    """Against the definition in numpy, on the same n-gram hashes."""
    keys, config = keys_of(from_strings(["春眠不觉晓处处闻啼鸟", "甲", ""])), Settings(num_perm=24, bands=4)
    _, low_bytes = minhash(keys, config)
    from data_clean.signatures import gram_hashes

    factors, shifts = (part.astype(np.uint64)[:, None] for part in config.hashes)
    for text in range(2):
        grams = np.empty(100, np.uint32)
        count = gram_hashes(keys.codes, keys.starts[text], keys.starts[text + 1], 3, grams)
        assert count == max(1, keys.starts[text + 1] - keys.starts[text] - 2)
        least = ((factors * grams[:count].astype(np.uint64) + shifts) % 2**32).min(axis=1)
        assert (low_bytes[text] == least % 256).all()


# --- clusters ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("small_blocks", [False, True])
def test_near_duplicates_against_brute_force(tmp_path, monkeypatch, seed, small_blocks):
    if small_blocks:  # the ways that only a large corpus takes
        monkeypatch.setattr(duplicates, "PARTITION", 50)
        monkeypatch.setattr(duplicates, "BLOCK", 7)
        monkeypatch.setattr(duplicates, "VERIFY_CHARACTERS", 500)
    rng = random.Random(seed)
    base = [sentence(rng, rng.randrange(40, 200)) for _ in range(60)]
    facts = [f"{sentence(rng, 8)}位于{sentence(rng, 8)}，它的省会是{sentence(rng, 8)}。" for _ in range(40)]
    near = [edited(rng, rng.choice(base), rng.randrange(0, 25)) for _ in range(80)]
    texts = base + facts + near + ["。", "！", "甲", "乙"]
    rng.shuffle(texts)
    dropped, exact = clusters_of(tmp_path, texts, Settings(seed=seed), shards=3)
    cluster = {index: dropped.get(index, index) for index in range(len(texts))}
    values = {(a, b): jaccard(texts[a], texts[b]) for a, b in itertools.combinations(range(len(texts)), 2)}
    similar = {
        pair for pair, value in values.items() if value >= 0.65 and len(comparison_key(texts[pair[0]]))
    }
    assert all(cluster[a] == cluster[b] for a, b in similar if values[a, b] >= 0.8)
    found = sum(cluster[a] == cluster[b] for a, b in similar)
    assert found >= 0.95 * len(similar)
    # Every cluster hangs together by similar pairs alone.
    linked = {a for pair in similar for a in pair}
    assert set(dropped) <= linked
    for index, kept in dropped.items():
        assert kept not in dropped
        assert (-len(texts[kept]), kept) < (-len(texts[index]), index)
    assert all(texts.index(text) not in dropped for text in facts)
    assert exact == {i for i in range(len(texts)) if comparison_key(texts[i]) and i in dropped
                     and any(comparison_key(texts[j]) == comparison_key(texts[i]) and
                             (-len(texts[j]), j) < (-len(texts[i]), i) for j in range(len(texts)))}  # fmt: skip


def test_shards_partitions_and_order_do_not_change_the_result(tmp_path, monkeypatch):
    rng = random.Random(9)
    base = [sentence(rng, rng.randrange(30, 90)) for _ in range(100)]
    texts = base + [edited(rng, rng.choice(base), 3) for _ in range(100)]
    one, _ = clusters_of(tmp_path / "a", texts, shards=1) if (tmp_path / "a").mkdir() is None else None
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(duplicates, "PARTITION", 20)
    other, _ = clusters_of(tmp_path / "b", texts, shards=7)
    assert one == other


def test_what_stays_is_reference_then_rank_then_length_then_order(tmp_path):
    text = sentence(random.Random(0), 300)
    texts = [text[:295], text, text + "一", text + "二", text + "三四"]
    for name in "abcd":
        (tmp_path / name).mkdir()
    everything = {0, 1, 2, 3, 4}
    assert set(clusters_of(tmp_path / "a", texts)[0]) == everything - {4}
    sources = ["x", "y", "x", "x", "x"]
    rank = {"y": 0, "x": 1}.get
    assert set(clusters_of(tmp_path / "b", texts, sources=sources, rank=rank)[0]) == everything - {1}
    assert set(clusters_of(tmp_path / "c", texts, shards=5, references=1)[0]) == everything - {0}
    assert set(clusters_of(tmp_path / "d", texts[:4])[0]) == everything - {2, 4}


def test_other_scripts_and_empty_keys_do_not_collide(tmp_path):
    texts = [
        "Привет мир сегодня",
        "สวัสดีชาวโลกวันนี้",
        "नमस्ते दुनिया आज",
        "γειά σου κόσμε σήμερα",
        "？",
        "。",
        "🙂",
        "🙂🙂",
    ]
    for number, method in enumerate(("minhash", "simhash", "none")):
        (tmp_path / method).mkdir()
        assert clusters_of(tmp_path / method, texts, Settings(method=method))[0] == {}, number


def test_a_large_bucket_is_quick_and_its_documents_survive(tmp_path):
    rng = random.Random(2)
    texts = [
        f"题目{n}{sentence(rng, 6)}的面积是多少平方公里答案是{rng.randrange(10**8)}" for n in range(5000)
    ]
    assert len(clusters_of(tmp_path, texts)[0]) < 50


def test_a_thousand_copies_leave_one(tmp_path):
    rng = random.Random(3)
    text = sentence(rng, 200)
    assert len(clusters_of(tmp_path, [edited(rng, text, 4) for _ in range(1000)])[0]) == 999


# --- references ---


def test_datasketch_finds_the_same(tmp_path):
    rng = random.Random(3)
    texts = [sentence(rng, 300) for _ in range(60)]
    texts += [edited(rng, texts[i], 2 + i) for i in range(60)]
    corpus = corpus_of(tmp_path, texts)
    ours, theirs = (find_clusters(corpus, Settings(), join) for join in (join_near, reference.join_near))
    # Which pairs just above the threshold become candidates is chance, of each one's own hashes.
    differing = set(ours.members.tolist()) ^ set(theirs.members.tolist())
    assert len(ours.members) > 40 and len(differing) <= 4


def test_simhash_package_finds_the_same(tmp_path):
    rng = random.Random(4)
    texts = [sentence(rng, 300) for _ in range(200)]
    texts += [edited(rng, texts[i], 1) for i in range(100)]
    config = Settings(method="simhash")
    corpus = corpus_of(tmp_path, texts, config)
    found = [find_clusters(corpus, config, join) for join in (join_near, reference.join_near)]
    dropped = [set(f.members[f.members != f.kept].tolist()) for f in found]
    assert all(len(part) > 90 for part in dropped) and len(dropped[0] ^ dropped[1]) <= 6


@pytest.mark.parametrize("documents", [100, 10**5, 10**9])
def test_simhash_masks_find_all_pairs_within_the_distance(documents):
    rng = random.Random(documents)
    for distance in (0, 3, 6):
        masks = duplicates.simhash_masks(documents, distance)
        for _ in range(200):
            bits = sum(1 << place for place in rng.sample(range(64), distance))
            assert any(int(mask) & bits == 0 for mask in masks)


def test_simhash_is_the_majority_of_bits():
    texts = [sentence(random.Random(i), 200) for i in range(200)]
    ones = [value.bit_count() for value in map(int, simhash(keys_of(from_strings(texts)), Settings()))]
    assert 28 < sum(ones) / len(ones) < 36  # no bit is biased
