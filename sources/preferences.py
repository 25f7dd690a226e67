"""Preferences of every public format, answers with a verdict, questions with a reference answer.

Which of the shapes of `to_record` a row has is told by its fields. The question may stand in any of the formats of
`PROMPTS` (instructions.py).
"""

from typing import Any

from sources.instructions import answered_format, prompt_format, system_of, to_messages
from sources.turns import (
    Row,
    Unusable,
    any_messages,
    are_turns,
    check_attachments,
    dialogue,
    is_missing,
    text_of,
    turns_in_cell,
)

# Better and worse answer: DPO sets and MedicalGPT; shibing624/medical; DPO-zh-en-emoji.
PAIRS = [("chosen", "rejected"), ("response_chosen", "response_rejected"), ("answer_zh", "answer_en")]
VERDICTS = {1: True, 0: False, "1": True, "0": False, "true": True, "false": False}  # True is 1, too
ANSWERS = {*(name for pair in PAIRS for name in pair), "reference", "answer"}  # beside those of FORMATS
SAME = "两个回答相同"


def to_record(row: Any) -> dict[str, Any]:
    """A row of any format in one of four shapes, told apart by their fields; raises Unusable.

    {"messages"}: a dialogue that ends with an answer; with "label" (bool) one that is judged (KTO).
    {"messages", "chosen", "rejected"}: a dialogue that ends with a question, and two answers.
    {"messages", "reference"}: a dialogue that ends with a question, and what is right (reinforcement learning).
    All of them with "system" where there is such a text, and "changes" where something had to be mended.
    """
    if not isinstance(row, dict):
        raise Unusable("不是 JSON 对象")
    try:
        return _record(_without_gaps(row))
    except RecursionError:
        raise Unusable("嵌套过深") from None


def _record(row: Row) -> dict[str, Any]:
    for better, worse in PAIRS:
        if better in row and worse in row:
            return _pair(row, turns_in_cell(row[better]), turns_in_cell(row[worse]))
    if isinstance(row.get("output"), list) and "instruction" in row:  # CareGPT
        if len(row["output"]) != 2:
            raise Unusable("output 不是 [较好的回答, 较差的回答]")
        return _pair({k: v for k, v in row.items() if k != "output"}, *row["output"])
    verdict = _verdict(row)
    if verdict is not None:
        return {**to_messages(row), "label": verdict}
    reference = _reference_field(row)
    return _referenced(row, text_of(row[reference], reference)) if reference else to_messages(row)


def _without_gaps(row: Row) -> Row:
    """The row without the fields that hold nothing, where the others tell what it is.

    A table has every column in every row, also those of other formats that were put into it. But a pair that
    lacks one of its answers is a broken pair, and what lacks the answer is shown as it is.
    """
    filled = {n: v for n, v in row.items() if n == "kto_tag" or not (is_missing(v) or v == "")}
    if len(filled) == len(row):
        return row
    is_broken = any({a, b} <= set(row) and (a in filled) != (b in filled) for a, b in PAIRS)
    is_known = answered_format(tuple(filled)) or ANSWERS & set(filled)
    return filled if is_known and not is_broken else row


def _reference_field(row: Row) -> str | None:
    """The field that holds what is right, if no other field answers the question."""
    name = next((name for name in ("reference", "answer") if name in row), None)
    ask, answered = prompt_format(tuple(row)), answered_format(tuple(row))
    if not (name and ask) or answered not in (ask, None):
        return None
    # A list of turns may hold the answer itself.
    ends_with_answer = answered and [message["role"] for message in ask(row)][-1:] == ["assistant"]
    return None if ends_with_answer else name


def as_dialogue(record: dict[str, Any]) -> dict[str, Any]:
    """A question with its reference answer as a dialogue; other records as they are."""
    if "reference" not in record:
        return record
    answer = {"role": "assistant", "content": record["reference"]}
    return {**record, "messages": [*record["messages"], answer]}


def _verdict(row: Row) -> bool | None:
    """Whether the answer is a good one; None where no one says so. CSV files hold the verdict as text."""
    for name in ("label", "kto_tag"):
        value = row.get(name)
        value = value.strip().lower() if isinstance(value, str) else value
        if isinstance(value, str | int | float) and value in VERDICTS:
            return VERDICTS[value]
    if "kto_tag" in row:  # a `label` may be anything, a class for example
        raise Unusable("kto_tag 不是 true 或 false")
    return None


def _prompt(row: Row) -> dict[str, Any]:
    convert = prompt_format(tuple(row))
    if not convert:
        raise Unusable("有回答的字段，但没有已知的提问字段")
    check_attachments(row)
    return dialogue(system_of(row), convert(row), answered=False)


def _referenced(row: Row, reference: str) -> dict[str, Any]:
    record = {**_prompt(row), "reference": reference}
    if not reference:
        raise Unusable("参考答案为空")
    return record


def _pair(row: Row, better: Any, worse: Any) -> dict[str, Any]:
    if isinstance(better, list) and isinstance(worse, list) and _tell_more(better, row):
        return _two_dialogues(row, better, worse)
    answers = {"chosen": _answer(better, "chosen"), "rejected": _answer(worse, "rejected")}
    record = {**_prompt(row), **answers}
    if not all(answers.values()):
        raise Unusable("问题或回答为空")
    if answers["chosen"] == answers["rejected"]:
        raise Unusable(SAME)
    return record


def _answer(value: Any, field: str) -> str:
    """An answer as text, as one message under any names, or as the last one of a dialogue."""
    if isinstance(value, dict):
        value = [value]
    if are_turns(value):
        last = any_messages(value, field)[-1]
        if last["role"] != "assistant":
            raise Unusable(f"{field} 不是助手的回答")
        return last["content"]
    return text_of(value, field)


def _tell_more(answer: list[Any], row: Row) -> bool:
    """Whether a list holds more of the dialogue than the row's question and its answer."""
    ask = prompt_format(tuple(row))
    return not ask or (are_turns(answer) and len(answer) > len(ask(row)) + 1)


def _two_dialogues(row: Row, better: list[Any], worse: list[Any]) -> dict[str, Any]:
    """Two dialogues that differ in their last answer alone (UltraFeedback)."""
    check_attachments(row)
    system = system_of(row)
    one, other = (dialogue(system, any_messages(turns, "chosen")) for turns in (better, worse))
    if one["messages"][:-1] != other["messages"][:-1] or one.get("system") != other.get("system"):
        raise Unusable("chosen 与 rejected 的提问不同")
    chosen, rejected = one["messages"][-1]["content"], other["messages"][-1]["content"]
    if chosen == rejected:
        raise Unusable(SAME)
    return {**one, "messages": one["messages"][:-1], "chosen": chosen, "rejected": rejected}
