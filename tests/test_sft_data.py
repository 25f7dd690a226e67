"""Stage 3: every instruction format becomes messages; which are kept, and how they are written and read."""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.aside import SetAside
from sources.instructions import to_messages
from sources.records import read_records
from sources.sft_csv import read_sft_csv, write_sft_csv
from sources.turns import Unusable
from stage import UserError

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "sft"
QUESTION, ANSWER = "请问中国的首都是哪一座城市？", "中国的首都是北京。"


# --- formats -> messages, and the file between stages ---

USER_ASSISTANT = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]


def read_csv(path, aside):
    """The usable rows without their numbers, which only messages need."""
    return [{k: v for k, v in row.items() if k != "row"} for row in read_sft_csv(path, aside)]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "问", "input": "", "output": "答"},
        {"instruction": "问", "input": None, "output": "答"},
        {"instruction": "问", "output": "答"},
        {"instruction": "", "input": "问", "output": "答"},
        {"input": "问", "target": "答"},
        {"kind": "x", "input": "问", "target": "答"},
        {"query": "问", "response": "答"},
        {"prompt": "问", "answer": "答"},
        {"messages": USER_ASSISTANT},
        {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
        {"_id": 1, "source": "x", "conversation": USER_ASSISTANT},
        {"conversation": [{"human": "问", "assistant": "答"}]},
        {"data": ["问：问", "答：答"]},
    ],
)
def test_instruction_formats(row):
    assert to_messages(row) == {"messages": USER_ASSISTANT}


def test_instruction_input_history_and_system():
    assert (
        to_messages({"instruction": "译", "input": "hi", "output": "嗨"})["messages"][0]["content"]
        == "译\nhi"
    )
    row = {"instruction": "问", "output": "答", "history": [["前问", "前答"]], "system": "你是医生"}
    result = to_messages(row)
    assert [m["content"] for m in result["messages"]] == ["前问", "前答", "问", "答"]
    assert result["system"] == "你是医生"
    assert to_messages({"messages": [{"role": "system", "content": "守"}, *USER_ASSISTANT]})["system"] == "守"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "甲"}, "现有字段：text"),
        ({"instruction": "问", "output": None}, "为空"),
        ({"instruction": ["问"], "output": "答"}, "不是文字"),
        ({"instruction": "问", "output": "答", "history": "[[1]"}, "history"),
        ({"conversations": [{"from": "gpt", "value": "答"}]}, "一问一答"),
        (
            {"conversations": [{"from": "human", "value": "问"}, {"from": "function_call", "value": "x"}]},
            "工具",
        ),
        ({"conversations": ["问"]}, "缺少"),
        ({"conversations": [{"from": ["x"], "value": "问"}]}, "角色"),
        ({"messages": "问"}, "不是列表"),
        ({"messages": []}, "为空"),
        ({"data": ["问：x"]}, "没有回答"),
    ],
)
def test_unusable_instructions(row, reason):
    with pytest.raises(Unusable, match=reason):
        to_messages(row)


def test_read_records_counts_add_up(tmp_path):
    rows = [{"instruction": "问", "output": "答"}, {"instruction": 3, "output": "答"}, {}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "b").write_text('prompt,answer\n"问,\n{}",答\n问,\n1,2,3\n', encoding="utf-8")
    aside = SetAside()
    read = list(read_records(tmp_path, aside))
    assert [row["source"] for row in read] == ["a", "b"] and read[1]["messages"][0]["content"] == "问,\n{}"
    assert len(aside) == 4


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            CELL,
            CELL,
            st.sampled_from(["", "系统"]),
            st.lists(st.lists(CELL, min_size=2, max_size=2), max_size=2),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_sft_csv_round_trip(cells):
    rows = [dict(zip(("prompt", "answer", "system", "history"), cell, strict=True)) for cell in cells]
    with tempfile.TemporaryDirectory() as folder:
        path, aside = Path(folder) / "sft.csv", SetAside()
        write_sft_csv(path, rows)
        read = read_csv(path, aside)
        header = path.read_text(encoding="utf-8").splitlines()[0]
    usable = [row for row in rows if row["prompt"].strip() and row["answer"].strip()]
    assert read == usable and len(aside) == len(rows) - len(usable)
    has_dialogue = any(row["system"] or row["history"] for row in rows)
    assert header == ("prompt,answer,system,history" if has_dialogue else "prompt,answer")


def test_sft_csv_by_hand(tmp_path):
    path, aside = tmp_path / "sft.csv", SetAside()
    path.write_text('﻿prompt,answer\nNA,nan\n,空\n"多\n行","引""号"""\n问\n', encoding="utf-8")
    read = read_csv(path, aside)
    assert [(row["prompt"], row["answer"]) for row in read] == [("NA", "nan"), ("多\n行", '引"号"')]
    assert [example["row"] for example in aside.examples] == [2, 4]
    path.write_text("question,answer\n问,答\n", encoding="utf-8")
    with pytest.raises(UserError, match="缺少列 prompt"):
        list(read_sft_csv(path, SetAside()))
    with pytest.raises(UserError, match="sft_data_process"):
        list(read_sft_csv(tmp_path / "missing.csv", SetAside()))
    path.write_text("prompt,answer,history\n问,答,[1]\n", encoding="utf-8")
    assert list(read_sft_csv(path, aside)) == [] and "history" in aside.examples[-1]["reason"]


def test_a_quote_without_its_partner_is_told(tmp_path):
    """Else the rest of a file would silently be one cell."""
    path, head = tmp_path / "sft.csv", 'prompt,answer\n问,"多\n行"\n'
    for end, bad in [("", 0), ('问,"答\n问,答\n问,答', 1), ('问,答,"', 1), ('"问', 1), ('问,"答\ud800"', 0)]:
        path.write_text(head + end, encoding="utf-8", errors="replace")
        aside = SetAside()
        assert len(read_csv(path, aside)) == 2 - bad - (not end) and len(aside) == bad
        assert all("双引号" in example["reason"] and example["row"] == 2 for example in aside.examples)


# --- the command line ---


def process(*args):
    """Run the stage as a user does; never a traceback."""
    command = [sys.executable, "sft_data_process.py", *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert "Traceback" not in result.stderr
    return result


def alpaca(question=QUESTION, answer=ANSWER, **more):
    return {"instruction": question, "output": answer, **more}


def test_rules_counts_and_columns(tmp_path):
    rows = [
        alpaca(),
        alpaca(),
        alpaca(input='含有\n换行和"引号"'),
        alpaca(question="短"),
        alpaca(question="长" * 257),
        alpaca(answer="短"),
        alpaca(answer="长" * 257),
        alpaca(question="长" * 256, answer="长" * 256),
        {"instruction": None, "output": ANSWER},
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "alpaca.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    limits = ["--min_question", "10", "--max_question", "256", "--min_answer", "5", "--max_answer", "256"]
    result = process("--data", tmp_path / "raw", "--out", tmp_path / "sft.csv", *limits)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "sft.csv", encoding="utf-8", newline="") as handle:
        written = list(csv.reader(handle))
    assert written == [
        ["prompt", "answer"],
        [QUESTION, ANSWER],
        [QUESTION + '\n含有\n换行和"引号"', ANSWER],
        ["长" * 256, "长" * 256],
    ]
    report = json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))
    assert report["sources"]["alpaca"] == {
        "读入": 9,
        "保留": 3,
        "问题过短": 1,
        "问题过长": 1,
        "回答过短": 1,
        "回答过长": 1,
        "完全重复": 1,
        "近似重复": 0,
        "未抽中": 0,
        "搁置": 1,
    }
    assert report["set_aside"]["rows"] == 1 and "问题过短" in result.stdout


def test_the_screen_says_how_to_keep_more_and_near_duplicates_go(tmp_path):
    long = "请根据下面的病历，用通俗的语言向病人说明诊断结果和今后需要注意的事项："
    rows = [alpaca(f"{long}第{n}份。") for n in (1, 2)] + [
        alpaca(),
        alpaca(answer="长" * 5000),
        alpaca("完全不同的另一问"),
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    result = process("--data", tmp_path / "a.json", "--out", tmp_path / "sft.csv", "--near_duplicates")
    counts = json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))["sources"]["a"]
    assert (counts["保留"], counts["近似重复"], counts["回答过长"]) == (3, 1, 1)
    assert "--max_answer 0" in result.stdout
    result = process("--data", tmp_path / "a.json", "--out", tmp_path / "sft.csv", "--max_answer", 0)
    assert "5 条" in result.stdout and "--max_answer 0" not in result.stdout


def test_dialogues_keep_their_history_and_system(tmp_path):
    dialogue = {
        "system": "你是地理老师。",
        "conversations": [
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER},
            {"from": "human", "value": "谢谢"},
            {"from": "gpt", "value": "不客气。"},
        ],
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(dialogue) + "\n" + json.dumps(alpaca()), encoding="utf-8")
    assert process("--data", tmp_path / "a.jsonl", "--out", tmp_path / "sft.csv").returncode == 0
    assert read_csv(tmp_path / "sft.csv", SetAside()) == [
        {"prompt": "谢谢", "answer": "不客气。", "system": "你是地理老师。", "history": [[QUESTION, ANSWER]]},
        {"prompt": QUESTION, "answer": ANSWER, "system": "", "history": []},
    ]


def test_its_own_output_can_be_read_again(tmp_path):
    rows = [alpaca(history=[["在吗？", "在的。"]]), alpaca(question="NA" * 8, answer="nan，不是数字。")]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    process("--data", tmp_path / "a.json", "--out", tmp_path / "one.csv")
    process("--data", tmp_path / "one.csv", "--out", tmp_path / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_what_an_earlier_run_wrote_does_not_stay(tmp_path):
    pair = {"instruction": QUESTION, "chosen": "好", "rejected": "坏"}
    for name, rows in {"sft": [alpaca()], "preference": [pair]}.items():
        (tmp_path / f"{name}.in").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "kto.jsonl").write_text("no output of ours", encoding="utf-8")
    files = {"sft": "sft_data.csv", "preference": "preference.jsonl"}
    for name in ("sft", "preference", "sft"):
        result = process("--data", tmp_path / f"{name}.in", "--out", tmp_path / "sft_data.csv")
        assert result.returncode == 0, result.stderr
        assert [file for file in files.values() if (tmp_path / file).exists()] == [files[name]]
    assert "preference.jsonl" in result.stdout and (tmp_path / "kto.jsonl").exists()
    # What is read is never removed.
    process("--data", tmp_path / "preference.in", "--out", tmp_path / "sft_data.csv")
    flat = [{"instruction": QUESTION, "output": ANSWER}]
    (tmp_path / "preference.jsonl").write_text(json.dumps(flat[0]), encoding="utf-8")
    process("--data", tmp_path / "preference.jsonl", "--out", tmp_path / "sft_data.csv")
    assert (tmp_path / "preference.jsonl").exists() and (tmp_path / "sft_data.csv").exists()


def test_a_folder_that_holds_the_outputs_is_read_without_them(tmp_path):
    rows = [alpaca(), {"instruction": QUESTION, "chosen": "好", "rejected": "坏"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    for _ in range(2):
        assert process("--data", tmp_path, "--out", tmp_path / "sft_data.csv").returncode == 0
        report = json.loads((tmp_path / "sft_data.json").read_text(encoding="utf-8"))
        assert list(report["sources"]) == ["a"] and report["sources"]["a"]["读入"] == 2
        assert not report["set_aside"]["rows"] and (tmp_path / "preference.jsonl").exists()


def test_what_is_written_beside_never_replaces_an_input(tmp_path):
    pair = {"instruction": QUESTION, "chosen": "好", "rejected": "坏"}
    for name, row, out in [("train.json", alpaca(), "train.csv"), ("preference.jsonl", pair, "sft_data.csv")]:
        (tmp_path / name).write_text(json.dumps(row), encoding="utf-8")
        result = process("--data", tmp_path / name, "--out", tmp_path / out)
        assert result.returncode and "会被覆盖" in result.stderr
        assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == row
        assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "空文件"),
        (b'{"bad', "不是有效的 JSON"),
        (json.dumps([alpaca()], ensure_ascii=False).encode("gbk"), "iconv -f GBK"),
        (b'[{"text": "x"}]', "现有字段：text"),
        (b"question,reply\n1,2\n", "现有字段：question、reply"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(tmp_path, content, message):
    (tmp_path / "bad").write_bytes(content)
    result = process("--data", tmp_path / "bad", "--out", tmp_path / "sft.csv")
    assert result.returncode and message in result.stdout and "没有一条可用" in result.stderr
    assert not (tmp_path / "sft.csv").exists()


def test_missing_folder_and_folder_as_output(tmp_path):
    result = process("--data", tmp_path / "missing", "--out", tmp_path / "sft.csv")
    assert result.returncode and "找不到" in result.stderr
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.json").write_text(json.dumps([alpaca()]), encoding="utf-8")
    result = process("--data", tmp_path / "raw", "--out", tmp_path / "raw")
    assert result.returncode and (tmp_path / "raw" / "a.json").exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the shared development data is not here")
def test_public_sets_are_read_whole(tmp_path):
    assert process("--data", SHARED, "--out", tmp_path / "sft.csv").returncode == 0
    report = json.loads((tmp_path / "sft.json").read_text(encoding="utf-8"))
    read = {name: counts["读入"] for name, counts in report["sources"].items()}
    assert sum(read.values()) == 1000 + 8658 + 1000 + 1000 + 1144
    assert report["set_aside"]["rows"] < 5 and report["rows"] > 12_750  # the defaults lose next to nothing
