"""Tests of the demo corpus: determinism, formats, disjoint evaluation sets, correct facts."""

from __future__ import annotations

import csv
import datetime
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from demo.chance import Chance
from demo.facts import load_facts, load_tables
from demo.make import build_documents, make_demo
from demo.patterns import Speaker, check_heldout, expand, skeleton

SIZE_MB = 1.0
LINE_FILES = [
    "raw/563w_baidubaike_demo.json",
    *[f"raw/C4_zh/part-{number:03d}.jsonl" for number in range(3)],
    "raw/medical/medical_book_zh.json",
    "raw/medical/train_encyclopedia.json",
    "sft/Belle_open_source_demo.json",
    "sft/medical_train_zh_0_demo.json",
]
ARRAY_FILES = [
    "raw/wikipedia-cn-demo.json",
    "raw/WuDaoCorpus_demo/part-0001.json",
    "raw/WuDaoCorpus_demo/part-0002.json",
    "sft/alpaca_gpt4_data_zh_demo.json",
    "preference/dpo_demo.json",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo corpus."""
    out = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo(out, seed=3, size_mb=SIZE_MB)
    return out


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    """All phrasings."""
    return Speaker(load_tables())


def read_lines(path: Path) -> tuple[list[dict], int]:
    """Return the rows of a JSON lines file and the number of lines that are not JSON."""
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            broken += 1
    return rows, broken


def read_array(path: Path) -> list[dict]:
    """Return a JSON array."""
    return json.loads(path.read_text(encoding="utf-8"))


def sft_rows(demo: Path) -> list[dict]:
    """Return all fine-tuning rows, the dirty ones included."""
    rows = read_array(demo / "sft/alpaca_gpt4_data_zh_demo.json")
    for name in ("Belle_open_source", "medical_train_zh_0"):
        rows += read_lines(demo / f"sft/{name}_demo.json")[0]
    return rows


def grams(text: str) -> frozenset[str]:
    """Return the character trigrams of a text."""
    return frozenset(text[start : start + 3] for start in range(len(text) - 2))


def test_two_runs_give_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "again", seed=3, size_mb=SIZE_MB)
    first = {p.relative_to(demo): p.read_bytes() for p in demo.rglob("*") if p.is_file()}
    second = {p.relative_to(tmp_path / "again"): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert first == second


def test_another_seed_gives_another_corpus(demo: Path, tmp_path: Path) -> None:
    make_demo(tmp_path / "other", seed=4, size_mb=0.1)
    name = "raw/wikipedia-cn-demo.json"
    assert (demo / name).read_bytes()[:2000] != (tmp_path / "other" / name).read_bytes()[:2000]


def test_manifest_lists_every_file(demo: Path) -> None:
    manifest = json.loads((demo / "manifest.json").read_text(encoding="utf-8"))
    files = {p.relative_to(demo).as_posix() for p in demo.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["files"]) == files
    for name, entry in manifest["files"].items():
        assert hashlib.sha256((demo / name).read_bytes()).hexdigest() == entry["sha256"]
    assert manifest["counts"]["clean_text_bytes"] >= SIZE_MB * 1_000_000
    assert manifest["counts"]["facts"] >= 900
    assert 19000 <= manifest["counts"]["clean_sft_rows"] <= 21000


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(FileExistsError):
        make_demo(tmp_path, size_mb=0.1)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@pytest.mark.parametrize("name", LINE_FILES)
def test_line_files_hold_rows_and_a_few_broken_lines(demo: Path, name: str) -> None:
    rows, broken = read_lines(demo / name)
    assert len(rows) > 50
    assert 0 < broken < 0.02 * len(rows) + 2


@pytest.mark.parametrize("name", ARRAY_FILES)
def test_array_files_are_json(demo: Path, name: str) -> None:
    rows = read_array(demo / name)
    assert len(rows) > 50
    assert all(isinstance(row, dict) for row in rows)


def test_fields_of_the_raw_rows(demo: Path) -> None:
    wiki = Counter(frozenset(row) for row in read_array(demo / "raw/wikipedia-cn-demo.json"))
    assert wiki.most_common(1)[0][0] == {"completion", "source"}
    wudao = Counter(frozenset(row) for row in read_array(demo / "raw/WuDaoCorpus_demo/part-0001.json"))
    assert wudao.most_common(1)[0][0] == {"id", "uniqueKey", "titleUkey", "dataType", "title", "content"}
    baidu = read_lines(demo / "raw/563w_baidubaike_demo.json")[0]
    without = sum(not row.get("summary") for row in baidu) / len(baidu)
    assert 0.25 < without < 0.45
    assert any(row.get("sections") is None for row in baidu)
    assert any(row.get("sections") == [] for row in baidu)
    section = next(row["sections"][0] for row in baidu if row.get("sections"))
    assert set(section) == {"title", "content"}


def test_planted_dirt_is_counted(demo: Path) -> None:
    planted = json.loads((demo / "manifest.json").read_text(encoding="utf-8"))["planted"]
    kinds = {name.split("/")[1] for name in planted}
    assert {"exact_duplicate", "near_duplicate", "spam", "garbled", "too_short", "empty", "null"} <= kinds
    assert {"wrong_type", "missing_field", "not_json", "empty_output", "too_long"} <= kinds
    assert all(count > 0 for count in planted.values())


def test_sft_questions_have_one_answer_and_fit(demo: Path) -> None:
    answers: dict[str, set[str]] = {}
    for row in sft_rows(demo):
        if 5 <= len(row["output"]) <= 256:
            answers.setdefault(row["instruction"] + row["input"], set()).add(row["output"])
    assert all(len(found) == 1 for found in answers.values())
    assert all(10 <= len(question) <= 256 for question in answers)
    assert len(answers) >= 9000


def test_heldout_questions_never_occur_in_training(demo: Path) -> None:
    heldout = read_lines(demo / "eval/heldout.jsonl")[0]
    training = {row["instruction"] + row["input"] for row in sft_rows(demo)}
    training |= {row["question"] for row in read_lines(demo / "preference/reward_demo.json")[0]}
    training |= {row["conversations"][0]["value"] for row in read_array(demo / "preference/dpo_demo.json")}
    known = {skeleton(question) for question in training}
    assert len(heldout) >= 400
    assert not [row for row in heldout if skeleton(row["question"]) in known]
    raw = "".join(p.read_text(encoding="utf-8") for p in sorted((demo / "raw").rglob("*.json*")))
    assert not [row for row in heldout if row["question"] in raw]


def test_heldout_templates_cover_all_relations(demo: Path, speaker: Speaker) -> None:
    check_heldout(speaker)
    relations = {row["relation"] for row in read_lines(demo / "eval/heldout.jsonl")[0]}
    assert relations == set(speaker.phrasings)


def test_seen_questions_come_from_training(demo: Path) -> None:
    training = {(row["instruction"] + row["input"], row["output"]) for row in sft_rows(demo)}
    seen = read_lines(demo / "eval/seen.jsonl")[0]
    assert len(seen) == 300
    assert all((row["question"], row["answer"]) in training for row in seen)


@pytest.mark.parametrize(("name", "count"), [("dev", 5), ("test", 200)])
def test_choice_sets(demo: Path, name: str, count: int) -> None:
    with open(demo / f"eval/choice_{name}.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == count
    assert list(rows[0]) == ["", "Question", "A", "B", "C", "D", "Answer"]
    assert all(len({row[letter] for letter in "ABCD"}) == 4 for row in rows)
    letters = Counter(row["Answer"] for row in rows)
    assert max(letters.values()) - min(letters[letter] for letter in "ABCD") <= 2


def test_preferences_differ(demo: Path) -> None:
    reward, broken = read_lines(demo / "preference/reward_demo.json")
    assert broken == 0 and len(reward) >= 300
    assert all(row["response_chosen"] != row["response_rejected"] for row in reward)
    for row in read_array(demo / "preference/dpo_demo.json"):
        assert row["chosen"]["value"] != row["rejected"]["value"]
    assert len((demo / "eval/prompts.txt").read_text(encoding="utf-8").splitlines()) == 10


def test_clean_documents_are_not_near_duplicates(speaker: Speaker) -> None:
    facts = load_facts(list(speaker.phrasings))
    groups = build_documents(facts, speaker, 5, SIZE_MB)
    texts = [document.text for documents in groups.values() for document in documents]
    assert len(set(texts)) == len(texts)
    assert all(40 <= len(text) <= 600 for text in texts)
    assert not [text for text in texts if re.search(r"[{}\[\]|]|。。|：。|。”。", text)]
    index: dict[str, list[int]] = {}
    sets = [grams(text) for text in Chance(0).some(texts, 900)]
    close = 0
    for number, current in enumerate(sets):
        shared = Counter(other for gram in current for other in index.get(gram, ()))
        if any(n / (len(current) + len(sets[other]) - n) >= 0.65 for other, n in shared.items()):
            close += 1
        for gram in current:
            index.setdefault(gram, []).append(number)
    assert close < 0.03 * len(sets)


def test_weekdays_and_sums_in_the_text_are_right(speaker: Speaker) -> None:
    facts = load_facts(list(speaker.phrasings))
    groups = build_documents(facts, speaker, 6, SIZE_MB)
    text = "\n".join(document.text for documents in groups.values() for document in documents)
    days = re.findall(r"(\d{4})年(\d+)月(\d+)日是星期(.)", text)
    assert len(days) > 20
    for year, month, day, name in days:
        assert "一二三四五六日"[datetime.date(int(year), int(month), int(day)).weekday()] == name
    sums = re.findall(r"(?<!\d)(\d+)([×÷+-])(\d+)=(\d+)", text)
    assert len(sums) > 200
    for left, sign, right, result in sums:
        a, b, c = int(left), int(right), int(result)
        assert c == {"×": a * b, "÷": a // b, "+": a + b, "-": a - b}[sign]
    for year, february in re.findall(r"(\d{4})年是[闰平]年，二月有(\d+)天", text):
        march = datetime.date(int(year), 3, 1)
        assert (march - datetime.timedelta(days=1)).day == int(february)


def test_computed_facts(speaker: Speaker) -> None:
    facts = {(fact.relation, fact.entity): fact.value for fact in load_facts(list(speaker.phrasings))}
    assert facts["math.mul", "7乘以8"] == "56"
    assert facts["math.add", "9加6"] == "15"
    assert facts["calendar.zodiac", "2024年"] == "龙"
    assert facts["calendar.zodiac", "2020年"] == "鼠"
    assert facts["provinces.capital", "浙江省"] == "杭州市"


def test_no_fact_is_listed_twice(speaker: Speaker) -> None:
    facts = load_facts(list(speaker.phrasings))
    keys = Counter((fact.relation, fact.entity) for fact in facts)
    assert max(keys.values()) == 1
    assert all(fact.value and "," not in fact.value for fact in facts)


def test_expand_reads_alternatives() -> None:
    assert expand("[甲|乙]在[这|那]里") == ["甲在这里", "甲在那里", "乙在这里", "乙在那里"]


def test_chance_is_stable() -> None:
    chance = Chance(1, 2)
    assert [chance.below(100) for _ in range(5)] == [27, 7, 55, 27, 36]
