"""Every format of dialogues, preferences, judged answers and references: what a row becomes, and what is mended."""

import json
import zipfile

import pandas as pd
import pytest

from sources.aside import SetAside
from sources.preferences import as_dialogue, to_record
from sources.records import read_records
from sources.turns import CUT, JOINED, Unusable

Q, A = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
HUMAN, GPT = {"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}
PAIR = {"messages": [Q], "chosen": "好", "rejected": "坏"}


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [HUMAN], "chosen": "好", "rejected": "坏"},
        {"conversations": [HUMAN], "chosen": {**GPT, "value": "好"}, "rejected": {**GPT, "value": "坏"}},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {"question": "问", "answer_zh": "好", "answer_en": "坏"},
        {"instruction": "问", "input": "", "output": ["好", "坏"]},
        {"instruction": "问", "chosen": "好", "rejected": "坏"},
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"prompt": [Q], "chosen": [said("assistant", "好")], "rejected": [said("assistant", "坏")]},
        {"prompt": "问", "chosen": [Q, said("assistant", "好")], "rejected": [Q, said("assistant", "坏")]},
        {"chosen": [Q, said("assistant", "好")], "rejected": [Q, said("assistant", "坏")]},
        {"messages": [Q], "chosen": [{"type": "text", "text": "好"}], "rejected": "坏"},
    ],
)  # fmt: skip
def test_preferences(row):
    assert to_record(row) == PAIR


def test_turns_in_cells_of_a_table():
    rows = [
        {"chosen": [Q, said("assistant", "好")], "rejected": [Q, said("assistant", "坏")]},
        {"prompt": [Q], "chosen": [said("assistant", "好")], "rejected": [said("assistant", "坏")]},
        {"prompt": [Q], "completion": [A]},
    ]
    for row in rows:
        in_cells = {name: json.dumps(turns, ensure_ascii=False) for name, turns in row.items()}
        assert to_record(in_cells) == to_record(row)
    listed = '[{"name": "甲"}]'  # an answer that happens to be JSON
    assert to_record({"prompt": "问", "chosen": listed, "rejected": "坏"}) == {**PAIR, "chosen": listed}


def test_answers_that_hold_the_whole_dialogue():
    before = [said("system", "守"), said("user", "前问"), said("assistant", "前答"), Q]
    row = {"chosen": [*before, said("assistant", "好")], "rejected": [*before, said("assistant", "坏")]}
    for prompt in ({}, {"prompt": "前问"}, {"prompt": before}):
        assert to_record({**prompt, **row}) == {**PAIR, "messages": before[1:], "system": "守"}
    row = {"messages": before, "chosen": [Q, said("assistant", "好")], "rejected": "坏"}
    assert to_record(row)["messages"] == before[1:]


def test_preferences_keep_system_and_history():
    row = {"system": "守", "history": [["前问", "前答"]], "question": "问"}
    row |= {"response_chosen": "好", "response_rejected": "坏"}
    record = to_record(row)
    assert record["system"] == "守" and [m["content"] for m in record["messages"]] == ["前问", "前答", "问"]


def test_verdicts_and_references():
    assert to_record({"messages": [Q, A], "label": False}) == {"messages": [Q, A], "label": False}
    assert to_record({"instruction": "问", "output": "答", "kto_tag": True})["label"] is True
    assert to_record({"prompt": "问", "completion": "答", "label": True})["messages"] == [Q, A]
    assert "label" not in to_record({"instruction": "问", "output": "答", "label": "类别"})
    for value, label in [(0, False), ("False", False), ("0", False), (1.0, True), ("true", True)]:
        for name in ("label", "kto_tag"):
            assert to_record({"instruction": "问", "output": "答", name: value})["label"] is label
    record = to_record({"question": "问", "answer": "答"})
    assert record == {"messages": [Q], "reference": "答"} and as_dialogue(record)["messages"] == [Q, A]
    for answered in (
        {"messages": [Q, A]},
        {"instruction": "问", "output": "答"},
        {"prompt": "问", "answer": "答"},
    ):
        assert to_record({**answered, "reference": "https://出处"}) == {"messages": [Q, A]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, {"role": "assistant", "content": [{"type": "text", "text": "答"}]}]},
        {"instruction": "问", "response": "答"},
        {"input": "问", "output": "答"},
        {"prompt": [Q], "completion": [A]},
        {"prompt": [Q], "completion": [Q, A]},
        {"prompt": [Q], "answer": "答"},
        {"instruction": "问", "output": "答", "history": "null", "data": "2023-01-01", "images": "[]"},
        {"conversations": [Q, A], "tools": "[]"},
        {"conversations": [said("User", "问"), said("chatgpt", "答")]},
        {
            "meta_instruction": "",
            "num_turns": 1,
            "chat": {
                "turn_1": {"Human": "<|Human|>: 问<eoh>\n", "MOSS": "<|MOSS|>: 答<sup><|1|></sup><eom>\n"}
            },
        },
    ],
)
def test_more_dialogues(row):
    assert to_record(row) == {"messages": [Q, A]}


def test_every_field_of_a_question_is_in_it():
    for answer in ("output", "target", "response"):
        assert (
            to_record({"instruction": "译", "input": "hi", answer: "嗨"})["messages"][0]["content"]
            == "译\nhi"
        )


@pytest.mark.parametrize("write", ["parquet", "csv"])
def test_a_table_that_several_formats_were_put_into(tmp_path, write):
    """Every row has all columns, null or empty where they are not its own; so have structs, turn_2 for example."""
    moss = {"turn_1": {"Human": "<|Human|>: 问<eoh>", "MOSS": "<|MOSS|>: 答<eom>"}}
    rows = [
        {"messages": [Q, A]},
        {"conversations": [HUMAN, GPT]},
        {"instruction": "问", "output": "答"},
        {"chat": moss},
        {"chat": {**moss, "turn_2": moss["turn_1"]}},
        {"question": "问", "answer": "答"},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {"question": "问", "response_chosen": "好"},
    ]
    table = pd.DataFrame(rows)
    if write == "csv":
        table = table.map(lambda cell: json.dumps(cell) if isinstance(cell, list | dict) else cell)
        table.to_csv(tmp_path / "all", index=False)
    else:
        table.to_parquet(tmp_path / "all")
    aside = SetAside()
    records = [{k: v for k, v in r.items() if k != "source"} for r in read_records(tmp_path / "all", aside)]
    assert records[:4] == [{"messages": [Q, A]}] * 4 and records[4] == {"messages": [Q, A, Q, A]}
    assert records[5:] == [{"messages": [Q], "reference": "答"}, PAIR]
    assert [example["row"] for example in aside.examples] == [8]  # one answer is no pair


def test_moss_turns_in_the_order_of_their_numbers(tmp_path):
    turns = {
        f"turn_{n}": {"Human": f"<|Human|>: 问{n}<eoh>", "MOSS": f"<|MOSS|>: 答{n}<eom>"} for n in (10, 2, 1)
    }
    with zipfile.ZipFile(tmp_path / "moss.zip", "w") as archive:
        archive.writestr(
            "moss.jsonl", json.dumps({"meta_instruction": "你是 MOSS", "num_turns": 3, "chat": turns})
        )
    [record] = read_records(tmp_path / "moss.zip", SetAside())
    assert [m["content"] for m in record["messages"]] == ["问1", "答1", "问2", "答2", "问10", "答10"]
    assert record["system"] == "你是 MOSS" and record["source"] == "moss"


def test_huatuo_turns_are_told_by_their_marks():
    record = to_record({"data": ["问：甲", "问：乙", "答：丙", "丁", "戊"]})
    assert [m["content"] for m in record["messages"]] == ["甲\n乙", "丙", "丁", "戊"]


def test_what_is_mended_is_said():
    turns = [
        said("system", "甲"),
        said("system", "乙"),
        Q,
        said("user", "再问"),
        A,
        said("assistant", "再答"),
        Q,
    ]
    record = to_record({"messages": turns, "system": "总"})
    assert record == {
        "system": "总\n甲\n乙",
        "messages": [said("user", "问\n再问"), said("assistant", "答\n再答")],
        "changes": [JOINED, CUT],
    }


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [A, Q, A]}, "以回答开头"),
        ({"messages": [Q]}, "没有回答"),
        ({"messages": [Q, A, said("system", "守"), Q, A]}, "system 不在对话开头"),
        ({"conversations": [HUMAN, GPT], "tools": '[{"name": "f"}]'}, "工具"),
        ({"conversations": [HUMAN, {"from": "observation", "value": "x"}]}, "工具"),
        ({"messages": [Q, {**A, "content": None, "tool_calls": [{}]}]}, "工具"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "图片"),
        ({"messages": [Q, A], "images": ["a.jpg"]}, "图片"),
        ({"conversations": [HUMAN, GPT], "image": "a.jpg"}, "图片"),
        ({"instruction": "问", "output": "答", "history": ["你好", "您好"]}, "history 不是"),
        ({"instruction": "问", "output": "答", "history": {"你好": "您好"}}, "history 不是"),
        ({"instruction": "问", "output": "答", "history": [["问", "答", "问"]]}, "history 不是"),
        ({"instruction": "问", "output": ["只有一个"]}, "较差"),
        ({"question": "问", "response_chosen": "同", "response_rejected": "同"}, "相同"),
        ({"conversations": [HUMAN, GPT], "chosen": "好", "rejected": "坏"}, "没有以提问结尾"),
        ({"question": "问", "answer": ""}, "参考答案为空"),
        ({"chosen": "好", "rejected": "坏"}, "没有已知的提问字段"),
        ({"chat": {"turn_1": {"Human": "问"}}}, "MOSS"),
        ("一行文字", "不是 JSON 对象"),
        ({"instruction": "问", "output": "答", "kto_tag": "坏"}, "kto_tag"),
        ({"data": ["答：您好", "问：甲", "答：乙"]}, "以回答开头"),
    ],
)
def test_what_is_refused(row, reason):
    with pytest.raises(Unusable, match=reason):
        to_record(row)


def test_shared_files_are_accounted_for(shared):
    rows = {"sft": 12802, "preference": 832}
    for folder, count in rows.items():
        aside = SetAside()
        assert len(list(read_records(shared / folder, aside))) + len(aside) == count
        assert len(aside) <= 2
