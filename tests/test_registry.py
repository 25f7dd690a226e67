"""dataset_info.json: both schemes, checksums, columns, role names, sampling, weights, the hub without a network."""

import hashlib
import json

import pytest
from conftest import script

from sources.aside import SetAside
from sources.registry import find_data_sets
from stage import UserError

ROWS = [
    {"q": f"这是第 {n} 个问题，请回答。", "a": f"第 {n} 个回答。", "input": "不是一列"} for n in range(200)
]


@pytest.fixture
def registry(tmp_path):
    """A folder with data files and a registry of them."""
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(ROWS), encoding="utf-8")
    turns = [{"who": "系统", "says": "守"}, {"who": "病人", "says": "问"}, {"who": "医生", "says": "答"}]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"talk": turns}), encoding="utf-8")
    (tmp_path / "dpo.json").write_text(
        json.dumps(
            [{"p": "问", "good": {"who": "医生", "says": "好"}, "bad": {"who": "医生", "says": "坏"}}]
        ),
        encoding="utf-8",
    )
    (tmp_path / "kto.json").write_text(
        json.dumps([{"instruction": "问", "output": "答", "ok": ok} for ok in (2, None, "False", 1)]),
        encoding="utf-8",
    )
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:7]), encoding="utf-8")
    columns = {"prompt": "q", "query": "", "response": "a", "history": ""}
    tags = {
        "role_tag": "who",
        "content_tag": "says",
        "user_tag": "病人",
        "assistant_tag": "医生",
        "system_tag": "系统",
    }
    entries = {
        "careful": {
            "file_name": "pairs.json",
            "file_sha1": hashlib.sha1(pairs.read_bytes()).hexdigest(),
            "columns": columns,
        },
        "damaged": {"file_name": "pairs.json", "file_sha1": "0" * 40, "columns": columns},
        "few": {"file_name": "pairs.json", "columns": columns, "num_samples": 20},
        "talk": {"file_name": "turns.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": tags},
        "pref": {
            "file_name": "dpo.json", "ranking": True, "tags": tags,
            "columns": {"prompt": "p", "chosen": "good", "rejected": "bad"},
        },
        "judged": {
            "file_name": "kto.json", "columns": {"prompt": "instruction", "response": "output", "kto_tag": "ok"},
        },
        "folder": {"hf_hub_url": "hub", "columns": columns, "split": "train"},
        "script": {"script_url": "x.py"},
        "lost": {"file_name": "missing.json"},
    }  # fmt: skip
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def read(registry, *names):
    aside = SetAside()
    records = [record for part in find_data_sets(names, registry) for _, record in part.read(aside)]
    return records, aside


def test_columns_with_an_empty_string_are_no_columns(registry):
    records, aside = read(registry, "careful")
    assert len(records) == 200 and not len(aside)
    assert records[3]["messages"][0]["content"] == ROWS[3]["q"]


def test_role_names_rankings_verdicts(registry):
    records, aside = read(registry, "talk,pref")
    assert records[0] == {
        "system": "守",
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
    }
    assert records[1] == {"messages": [{"role": "user", "content": "问"}], "chosen": "好", "rejected": "坏"}
    records, aside = read(registry, "judged")
    assert [record["label"] for record in records] == [False, True] and len(aside) == 2
    assert "kto_tag" in aside.examples[0]["reason"]


TAGGED = {"role_tag": "who", "content_tag": "says", "user_tag": "病人", "assistant_tag": "医生"}
ASKED, GOOD = {"who": "病人", "says": "问"}, {"who": "医生", "says": "好"}
BAD = {"who": "医生", "says": "坏"}
PROMPT = {"prompt": "instruction", "query": "input"}


@pytest.mark.parametrize(
    ("entry", "row"),
    [
        ({}, {"instruction": "问", "input": "", "output": ["好", "坏"]}),
        ({"columns": {**PROMPT, "response": "output"}}, {"instruction": "问", "output": ["好", "坏"]}),
        ({}, {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"}),
        ({"columns": PROMPT}, {"instruction": "问", "chosen": "好", "rejected": "坏"}),
        (
            {"formatting": "sharegpt", "tags": TAGGED},
            {"conversations": [ASKED], "chosen": GOOD, "rejected": BAD},
        ),
    ],
)
def test_rankings_need_only_the_columns_that_are_named(tmp_path, entry, row):
    rows = [row, {"instruction": "问", "output": "不知好坏"}]
    (tmp_path / "cmp.json").write_text(json.dumps(rows), encoding="utf-8")
    entries = {"cmp": {"file_name": "cmp.json", "ranking": True, **entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    records, aside = read(tmp_path / "dataset_info.json", "cmp")
    assert records == [{"messages": [{"role": "user", "content": "问"}], "chosen": "好", "rejected": "坏"}]
    assert len(aside) == 1


def test_role_names_without_columns_and_deep_nesting(tmp_path):
    lines = [json.dumps({"messages": [ASKED, GOOD]}), '{"conversations": ' + "[" * 900 + "]" * 900 + "}"]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines), encoding="utf-8")
    entry = {"file_name": "talk.jsonl", "formatting": "sharegpt"}
    entries = {
        "tags": {**entry, "tags": TAGGED},
        "columns": {**entry, "columns": {"messages": "conversations"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    records, aside = read(tmp_path / "dataset_info.json", "tags")
    assert [[m["content"] for m in record["messages"]] for record in records] == [["问", "好"]]
    assert len(aside) == 1
    records, aside = read(tmp_path / "dataset_info.json", "columns")
    assert not records and len(aside) == 2


def test_nulls_are_no_settings_and_tags_must_be_names(tmp_path):
    (tmp_path / "a.json").write_text('[{"instruction": "问", "output": "答"}]', encoding="utf-8")
    nothing = dict.fromkeys(["columns", "tags", "formatting", "ranking", "num_samples", "hf_hub_url"])
    entries = {"null": {"file_name": "a.json", **nothing}, "list": {"file_name": "a.json", "tags": ["role"]}}
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert len(read(path, "null")[0]) == 1
    with pytest.raises(UserError, match="tags 应为对象"):
        find_data_sets(["list"], path)
    records, aside = read(path, str(tmp_path))  # the folder itself: the registry is no data
    assert len(records) == 1 and not len(aside)


def test_plain_paths_and_commas(registry):
    assert (
        len(read(registry, "careful, talk", str(registry.parent / "pairs.json"))[1]) == 200
    )  # unknown fields: aside


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged", "0000"),
        ("carefull", "careful"),
        ("script", "file_name"),
        ("lost", "missing.json"),
        ("so/typo.json", "找不到 so/typo.json"),
    ],
)
def test_mistakes_are_named(registry, name, message):
    with pytest.raises(UserError, match=message):
        find_data_sets([name], registry)


def test_no_name_is_not_the_folder_where_one_is(registry):
    assert find_data_sets([""], registry) == []


def test_checksum_error_names_both(registry):
    actual = hashlib.sha1((registry.parent / "pairs.json").read_bytes()).hexdigest()
    with pytest.raises(UserError, match=actual):
        find_data_sets(["damaged"], registry)


def test_a_folder_that_datasets_loads(registry, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(registry.parent / "cache"))
    records, aside = read(registry, "folder")
    assert len(records) == 7 and not len(aside)
    entry = {"hf_hub_url": "hub", "split": "nosuch"}
    registry.write_text(json.dumps({"folder": entry}), encoding="utf-8")
    with pytest.raises(UserError, match="请检查 split"):
        read(registry, "folder")


def test_no_network_says_what_to_do(registry, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"huggingface.co/datasets/owner/name .*dataset_info|--data"):
        read(registry, "owner/name")


def test_command_line_samples_and_weighs(registry, tmp_path):
    def run(*more):
        out = tmp_path / "sft.csv"
        script(
            "sft_data_process.py",
            "--datasets",
            "few,talk",
            "pref",
            "--registry",
            registry,
            "--out",
            out,
            *more,
        )
        return json.loads(out.with_suffix(".json").read_text(encoding="utf-8")), out.read_text(
            encoding="utf-8"
        )

    report, text = run("--weights", "few=2.5", "--min_question", 0)
    assert report["sources"]["few"]["保留"] == 20 and report["sources"]["few"]["未抽中"] == 180
    assert 41 < report["written"]["sft.csv"] < 61 and report["written"]["preference.jsonl"] == 1
    assert run("--weights", "few=2.5", "--min_question", 0)[1] == text
    failed = script(
        "sft_data_process.py", "--datasets", "few", "--registry", registry, "--weights", "fw=2", ok=False
    )
    assert "fw" in failed.stderr and "few" in failed.stderr
