"""The account of a cleaning run: exact whatever the division of the work, and small whatever the corpus."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.benchmarks import Benchmarks, Item
from data_clean.duplicates import Clusters, find_clusters, join_near
from data_clean.examples import pair_example, spread_order
from data_clean.keys import keys_of
from data_clean.shards import Corpus, Documents, Shard, write_shard
from data_clean.signatures import Settings, sign
from data_clean.tally import (
    CONTAMINATED,
    EXACT,
    EXAMPLES,
    FEW,
    LENGTHS,
    MOST_SOURCES,
    NEAR,
    OTHERS,
    SHARES,
    SIZES,
    Tally,
)  # fmt: skip
from data_clean.texts import from_strings

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
DOCUMENT = st.tuples(TEXT, st.sampled_from(["维基", "C4_zh", "书"]), st.sampled_from([None, "过短", "乱码"]))


def names(*sources):
    return np.array(sources, object)


def task(documents):
    """One process: read all, drop some, keep the rest."""
    tally = Tally()
    texts, sources, rules = zip(*documents, strict=True) if documents else ((), (), ())
    texts, sources, rules = from_strings(texts), names(*sources), names(*rules)
    read = tally.count_read(texts, sources)
    for rule in ("乱码", "过短"):
        tally.drop(rule, texts, sources, np.flatnonzero(rules == rule))
    kept = np.array([rule is None for rule in rules], bool)
    written = tally.count_kept(texts.take(np.flatnonzero(kept)), sources[kept])
    tally.step("过滤", len(kept), int(kept.sum()), read, written, 0.25)
    tally.count("隐私", {"邮箱": len(kept)})
    tally.histogram("汉字占比", np.linspace(-0.5, 1.5, len(kept)), SHARES)
    return json.loads(json.dumps(tally.to_json()))


def merged(accounts):
    tally = Tally()
    for account in accounts:
        tally.merge(account)
    return tally


@settings(max_examples=60, deadline=None)
@given(st.lists(DOCUMENT, max_size=25), st.lists(st.integers(0, 25), max_size=4))
def test_the_division_of_the_work_changes_nothing(documents, cuts):
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    tally = merged(task(documents[a:b]) for a, b in pairwise(bounds))
    report = json.loads(json.dumps(tally.report()))
    for source in {source for _, source, _ in documents}:
        mine = [(text, rule) for text, name, rule in documents if name == source]
        account = report["sources"][source]
        assert account["rows_in"] == len(mine) == account["rows_out"] + sum(account["dropped"].values())
        assert account["characters_in"] == sum(len(text) for text, _ in mine)
        assert account["characters_out"] == sum(len(text) for text, rule in mine if rule is None)
        for rule, rows in account["dropped"].items():
            assert rows == sum(broken == rule for _, broken in mine)
            assert account["dropped_characters"][rule] == sum(len(t) for t, broken in mine if broken == rule)
    for rule in ("乱码", "过短"):
        dropped = [(text, source) for text, source, broken in documents if broken == rule]
        if dropped:
            assert report["rules"][rule]["rows"] == len(dropped)
            assert report["rules"][rule]["characters"] == sum(len(text) for text, _ in dropped)
            expected = [{"source": source, "text": text[:120]} for text, source in dropped[:FEW]]
            assert report["rules"][rule]["examples"] == expected
        else:
            assert rule not in report["rules"]
    (step,) = report["steps"]
    assert step["rows_in"] == len(documents) and step["seconds"] == 0.25 * (len(bounds) - 1)
    assert step["documents_per_second"] == round(len(documents) / step["seconds"])
    assert tally.kept_rows == step["rows_out"] and tally.kept_characters == step["characters_out"]
    lengths = report["histograms"]["每篇字符数"]["series"]
    assert sum(lengths["清洗前"]) == len(documents) and sum(lengths["清洗后"]) == step["rows_out"]
    assert report["counts"]["隐私"]["邮箱"] == len(documents)


@given(st.lists(st.one_of(st.floats(-10, 40_000_000), st.just(float("nan")))))
def test_histograms_count_every_value_once(values):
    tally = Tally()
    tally.histogram("长度", np.array(values, float), LENGTHS, "前")
    counts = tally.report()["histograms"]["长度"]["series"]["前"]
    expected = [0] * (len(LENGTHS) - 1)
    for value in values:
        if value == value:
            inside = [i for i, edge in enumerate(LENGTHS[:-1]) if edge <= value]
            expected[inside[-1] if inside else 0] += 1
    assert counts == expected


def test_histograms_of_one_name_have_the_same_edges():
    tally = Tally()
    tally.histogram("长度", np.ones(3), SIZES)
    with pytest.raises(ValueError, match="edges"):
        tally.histogram("长度", np.ones(3), SHARES)
    other = Tally()
    other.histogram("长度", np.ones(3), SHARES)
    with pytest.raises(ValueError, match="edges"):
        tally.merge(other.to_json())


def test_steps_keep_the_order_of_first_appearance_and_small_numbers():
    tally = Tally()
    tally.step("读取", 10, 10, 100, 100, 1.0)
    tally.add_seconds("近似去重", 0.5)
    tally.step("读取", 5, 5, 50, 50, 0.0)
    assert [(s["step"], s["rows_in"], s["seconds"]) for s in tally.report()["steps"]] == [
        ("读取", 15, 1.0), ("近似去重", 0, 0.5),
    ]  # fmt: skip


def test_memory_is_bounded():
    tally = Tally()
    for batch in range(40):
        sources = names(*(f"来源{batch * 100 + n}" for n in range(100)))
        texts = from_strings([f"很长的一篇文档{n}" * 1000 for n in range(100)])
        part = Tally()
        part.count_read(texts, sources)
        part.drop("过短", texts, sources, np.arange(100))
        tally.merge(part.to_json())
    report = tally.report()
    assert len(report["sources"]) == MOST_SOURCES + 1
    assert report["sources"][OTHERS]["rows_in"] == 4000 - MOST_SOURCES
    assert all(s["rows_in"] == s["dropped"]["过短"] for s in report["sources"].values())
    assert report["rules"]["过短"]["rows"] == 4000 and len(report["rules"]["过短"]["examples"]) == FEW
    assert len(json.dumps(tally.to_json())) < 300_000


def test_descriptions_are_given_only_to_rules_that_dropped_something():
    tally = Tally()
    tally.drop("过短", from_strings(["略"]), names("甲"), np.array([0]))
    rules = tally.report({"过短": "文字少于 10 个", "乱码": "…"})["rules"]
    assert list(rules) == ["过短"] and rules["过短"]["description"] == "文字少于 10 个"


def test_examples_show_what_the_rule_measured():
    tally = Tally()
    tally.drop(
        "困惑度过高", from_strings(["好文", "乱文"]), names("甲", "乙"), np.array([1]), np.array([0.5, 7.25])
    )
    example = {"source": "乙", "text": "乱文", "value": 7.25}
    assert json.loads(json.dumps(tally.to_json()))["examples"] == {"困惑度过高": [example]}


def test_contaminated_documents_are_listed_with_their_questions():
    question = "大熊猫在自然界里主要以哪一种植物的茎叶为食？"
    benchmarks = Benchmarks([Item(Path("题.csv"), 7, question, ("竹子", "松针"))])
    texts = from_strings(
        ["无关的文章。" * 50, "前面的话。" * 200 + question + "竹子、松针" + "后面的话。" * 200] * 60
    )
    tally, sources = Tally(), names(*["网页", "题库"] * 60)
    tally.drop_contaminated(texts, sources, benchmarks.hits(*keys_of(texts)), benchmarks)
    report = json.loads(json.dumps(tally.report()))
    rule = report["rules"][CONTAMINATED]
    assert rule["rows"] == 60 and len(rule["examples"]) == min(60, EXAMPLES[CONTAMINATED])
    assert rule["examples"][0]["text"].startswith(question) and rule["examples"][0]["source"] == "题库"
    assert rule["examples"][0]["benchmark"] == {"file": "题.csv", "row": 7, "question": question}
    assert report["counts"]["各评测文件剔除的文档"] == {"题.csv": 60}
    assert report["sources"]["题库"]["dropped"] == {CONTAMINATED: 60}


# --- duplicates ---


def letters(rng, length):
    return "".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(length))


def edited(rng, text, edits):
    text = list(text)
    for place in rng.sample(range(len(text)), edits):
        text[place] = chr(0x4E00 + rng.randrange(3000))
    return "".join(text)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards; texts with punctuation variants, and with copies that differ ever more."""
    rng, texts = random.Random(0), []
    for _ in range(60):
        text = letters(rng, 600)
        texts += [text, text + "。", edited(rng, text, rng.randrange(1, 60)), letters(rng, 100)]
    chosen, folder = Settings(), tmp_path_factory.mktemp("shards")
    shards = []
    for number, part in enumerate((texts[:120], texts[120:])):
        documents = Documents(
            from_strings(part), names(*["甲", "乙", "丙", "丁"] * 30), np.arange(120, dtype=np.uint64)
        )
        path = folder / str(number)
        sources = write_shard(path, [documents], [sign(keys_of(documents.texts), chosen)], np.zeros(120, int))
        shards.append(Shard(path, sources))
    return Corpus(shards), chosen


def test_duplicates_are_counted_and_shown_from_little_to_very_similar(corpus):
    corpus, chosen = corpus
    clusters = find_clusters(corpus, chosen, join_near)
    tally, keep = Tally(), np.ones(len(corpus), bool)
    keep[1] = False  # was dropped before
    tally.add_duplicates(corpus, clusters, keep, 1.5, chosen)
    report = json.loads(json.dumps(tally.report()))
    gone = clusters.members[(clusters.members != clusters.kept) & keep[clusters.members]]
    exact, near = report["rules"][EXACT], report["rules"][NEAR]
    assert exact["rows"] + near["rows"] == len(gone) > 100
    texts = [text for shard in corpus.shards for text in shard.texts().texts()]
    assert exact["characters"] + near["characters"] == sum(len(texts[i]) for i in gone.tolist())
    (step,) = report["steps"]
    assert step["rows_in"] - step["rows_out"] == len(gone)
    assert step["characters_in"] == sum(len(t) for t, k in zip(texts, keep.tolist(), strict=True) if k)
    assert step["characters_in"] - step["characters_out"] == exact["characters"] + near["characters"]
    similar = [example["similarity"] for example in near["examples"]]
    assert len(similar) == EXAMPLES[NEAR] and similar == sorted(similar)
    assert len({int(value * 20) for value in similar}) >= 5  # not only nearly equal ones
    assert min(similar) >= chosen.threshold and {e["similarity"] for e in exact["examples"]} == {1.0}
    for example in near["examples"]:
        assert example["text"] != example["kept"]
    sizes = report["histograms"]["重复的一组有几篇"]["series"][""]
    assert sum(sizes) == len(np.unique(clusters.kept))
    assert sum(source["dropped"].get(NEAR, 0) for source in report["sources"].values()) == near["rows"]


def test_without_duplicates_there_is_only_the_step(corpus):
    corpus, chosen = corpus
    none = Clusters(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, bool))
    tally = Tally()
    tally.add_duplicates(corpus, none, np.ones(len(corpus), bool), 0.0, chosen)
    report = tally.report()
    assert report["rules"] == {} and report["steps"][0]["rows_out"] == len(corpus)
    assert report["steps"][0]["documents_per_second"] is None


def test_spread_takes_one_of_each_before_a_second():
    values = np.array([0.99] * 50 + [0.71, 0.66, 0.98])
    assert {50, 51} <= set(spread_order(values)[:3].tolist())


def test_pairs_begin_a_little_before_they_differ():
    common = "一二三四五六七八九十" * 100
    for texts in ((common + "甲" + common, common + "乙" + common), (common, common + "丙"), ("短。", "短")):
        example = pair_example(from_strings(texts), names("子", "丑"), 0, 1, 0.5)
        assert example["text"] != example["kept"] or texts[0] == common
        assert max(len(example["text"]), len(example["kept"])) <= 241
        assert (example["source"], example["kept_source"]) == ("子", "丑")
    assert example["text"] == "短。"


# --- the terminal ---


@pytest.mark.parametrize("sources", [1, 3, 30])
def test_tables_fit_a_terminal(capsys, sources):
    tally = Tally()
    for number in range(sources):
        name = names(*["名字很长很长很长很长很长很长很长很长很长很长的来源" + str(number) * 40] * 5)
        texts = from_strings(["文档"] * 5)
        tally.count_read(texts, name)
        tally.drop("过短", texts, name, np.arange(3))
        tally.count_kept(texts.take(np.arange(2)), name[:2])
    tally.step("读取", 5 * sources, 5 * sources, 10 * sources, 10 * sources, 0.1)
    tally.count("隐私", {"邮箱": 3, "手机号": 0})
    tally.show()
    shown = capsys.readouterr().out
    assert "邮箱 3" in shown and "手机号" not in shown
    assert max(map(len, shown.splitlines())) < 160
    row = next(line for line in shown.splitlines() if line.strip().startswith("过短"))
    assert row.split()[1] == f"{3 * sources}"
    assert sum(int(n) for n in row.split()[1:]) == 3 * sources * (1 if sources == 1 else 2)
