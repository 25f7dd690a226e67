"""sft_tools.py: validate, count, dedup, sample, convert, through the command line."""

import json

import pytest
from conftest import script

from sources.aside import SetAside
from sources.records import read_records

PAIR = {"id": 7, "instruction": "问题", "output": "回答"}
OTHER = {"id": 8, "instruction": "问题", "output": "另一个回答"}
TALK = {
    "conversations": [
        {"from": "system", "value": "守"},
        *({"from": who, "value": f"{who}{n}"} for n in range(2) for who in ("human", "gpt")),
    ]
}
DPO = {"question": "问题", "response_chosen": "好", "response_rejected": "坏"}
MIXED = [
    PAIR,
    OTHER,
    PAIR,
    {**PAIR, "id": 9},
    TALK,
    DPO,
    {"question": "几", "answer": "三"},
    {"text": "无用"},
]


@pytest.fixture
def mixed(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in MIXED), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_validate_counts_and_fails_for_bad_rows(mixed, tmp_path):
    done = script("sft_tools.py", "validate", mixed, ok=False)
    counts = done.stdout.splitlines()[1].split()
    assert counts == ["mixed.jsonl", "8", "4", "1", "1", "0", "1", "1"] and "现有字段：text" in done.stdout
    good = tmp_path / "good.json"
    good.write_text(json.dumps([PAIR]), encoding="utf-8")
    script("sft_tools.py", "validate", good)
    assert "至少一个文件" in script("sft_tools.py", "validate", ok=False).stderr


def test_count(mixed, vocabulary):
    done = script("sft_tools.py", "count", mixed, "--tokenizer", vocabulary)
    name, records, turns, characters, tokens, answers = done.stdout.splitlines()[1].split()
    assert (name, records, turns) == ("mixed.jsonl", "7", "8") and 0 < int(answers) < int(tokens) <= 2 * int(
        characters
    )


def test_dedup_keeps_rows_as_they_are(mixed, tmp_path):
    out = tmp_path / "out.jsonl"
    script("sft_tools.py", "dedup", mixed, "--out", out)
    assert lines(out) == [PAIR, OTHER, *MIXED[4:7]]
    script("sft_tools.py", "dedup", mixed, "--by", "question", "--out", out)
    assert lines(out) == [PAIR, TALK, MIXED[6]]


def test_sample_is_repeatable_and_ordered(tmp_path):
    rows = [{"instruction": f"问题{n}", "output": "答", "n": n} for n in range(500)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")

    def drawn(*options):
        script("sft_tools.py", "sample", tmp_path / "a.json", "--out", tmp_path / "b.json", *options)
        return [row["n"] for row in json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))]

    some = drawn("--rows", 40)
    assert len(some) == 40 and some == sorted(some) == drawn("--rows", 40) != drawn("--rows", 40, "--seed", 1)
    assert 70 < len(drawn("--share", 0.2)) < 130
    assert "--rows" in script("sft_tools.py", "sample", tmp_path / "a.json", "--out", "x", ok=False).stderr


def test_convert_there_and_back(mixed, tmp_path):
    def records(path):
        found = [dict(record) for record in read_records(path, SetAside())]
        return [{key: value for key, value in record.items() if key != "source"} for record in found]

    path = mixed
    for number, style in enumerate(["sharegpt", "alpaca", "openai", "alpaca"]):
        out = tmp_path / f"{number}.json"
        script("sft_tools.py", "convert", path, "--to", style, "--out", out)
        assert records(out) == records(mixed)
        path = out
    first = json.loads((tmp_path / "1.json").read_text(encoding="utf-8"))[4]
    assert first["history"] == [["human0", "gpt0"]] and first["system"] == "守" and first["output"] == "gpt1"


def test_nothing_usable_writes_nothing(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "x"}]', encoding="utf-8")
    done = script(
        "sft_tools.py", "convert", tmp_path / "a.json", "--to", "openai", "--out", tmp_path / "b", ok=False
    )
    assert "没有一条可写" in done.stderr and not (tmp_path / "b").exists()


def test_names_of_other_containers_are_refused(mixed, tmp_path):
    for name in ("b.csv", "b.jsonl.gz"):
        done = script("sft_tools.py", "dedup", mixed, "--out", tmp_path / name, ok=False)
        assert ".jsonl 或 .json" in done.stderr and not (tmp_path / name).exists()
