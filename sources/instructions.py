"""Instructions and dialogues of every public format -> one shape: messages, and optionally a system text.

A format is one line of `FORMATS` (with an answer) or `PROMPTS` (the question alone, whose answers stand in fields
of their own: see preferences.py): the fields that tell it, and what makes its messages.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from sources.turns import (
    Messages,
    Row,
    Unusable,
    any_messages,
    check_attachments,
    decoded,
    dialogue,
    history_of,
    list_of,
    pairs_of,
    text_of,
    turns_in_cell,
)

Convert = Callable[[Row], Messages]
Formats = list[tuple[tuple[str, ...], Convert]]

# fnlp's moss-003: <|Human|>: … <eoh>, <|MOSS|>: … <eom>, and <sup><|1|></sup> where a web page is quoted
MOSS_MARKERS = re.compile(r"<sup><\|\d+\|></sup>|^\s*<\|(Human|MOSS)\|>:?|<eo[hmtcr]>\s*$")
HUATUO_TURN = re.compile("(?:(问|答)[：:])?(.*)", re.DOTALL)
HUATUO_SIDES = {"问": "user", "答": "assistant"}
MOSS_SIDES = ("Human", "MOSS")
MOSS_TOOLS = ("Commands", "Tool Responses")


def to_messages(row: Row) -> dict[str, Any]:
    """{"messages": alternating user and assistant turns, "system": optional, "changes": optional}.

    changes: what had to be mended, in words. Raises Unusable.
    """
    convert = answered_format(tuple(row))
    if not convert:
        names = "、".join(str(name)[:30] for name in list(row)[:6])
        raise Unusable(f"没有已知的指令字段（现有字段：{names or '无'}）")
    check_attachments(row)
    return dialogue(system_of(row), convert(row))


@lru_cache(maxsize=1024)
def answered_format(fields: tuple[str, ...]) -> Convert | None:
    """What makes messages of rows with these fields, question and answer; None if nothing does."""
    return _first(FORMATS, fields)


@lru_cache(maxsize=1024)
def prompt_format(fields: tuple[str, ...]) -> Convert | None:
    """What makes messages of rows with these fields, up to the question; None if nothing does."""
    return _first(PROMPTS, fields)


def _first(formats: Formats, fields: tuple[str, ...]) -> Convert | None:
    return next((convert for telling, convert in formats if set(telling) <= set(fields)), None)


def system_of(row: Row) -> str:
    """The system text that a field of its own holds."""
    if "system" not in row and "meta_instruction" not in row:
        return ""
    return "\n".join(filter(None, (text_of(row.get(name), name) for name in ("system", "meta_instruction"))))


def _question(*fields: str) -> Callable[[Row], Messages]:
    """A question that fields make together, a line each, behind an optional history."""

    def convert(row: Row) -> Messages:
        question = "\n".join(filter(None, (text_of(row.get(field), field) for field in fields)))
        return [*history_of(row), {"role": "user", "content": question}]

    return convert


def _pair(*fields: str) -> Callable[[Row], Messages]:
    """Fields that make the question, and last the one with the answer."""
    *question, answer = fields
    return _answered(_question(*question), answer)


def _answered(ask: Convert, field: str) -> Convert:
    return lambda row: [*ask(row), {"role": "assistant", "content": text_of(row[field], field)}]


def _turns(field: str) -> Callable[[Row], Messages]:
    return lambda row: any_messages(list_of(row, field), field)


def _prompt(row: Row) -> Messages:
    """A question, or a dialogue that ends with one."""
    row = {**row, "prompt": turns_in_cell(row["prompt"])}
    is_list = isinstance(row["prompt"], list)
    return _turns("prompt")(row) if is_list else _question("prompt")(row)


def _huatuo(row: Row) -> Messages:
    """HuatuoGPT: ["问：…", "答：…", …]; a turn without its mark is the other side's."""
    messages, role = [], "assistant"
    for turn in list_of(row, "data"):
        mark, text = HUATUO_TURN.fullmatch(text_of(turn, "data")).groups()
        role = HUATUO_SIDES.get(mark) or ("user" if role == "assistant" else "assistant")
        messages.append({"role": role, "content": text.strip()})
    return messages


def _moss(row: Row) -> Messages:
    """fnlp's moss-003-sft: chat = {"turn_1": {"Human": …, "MOSS": …}, …}, in the order of their numbers."""
    chat = decoded(row["chat"])
    if isinstance(chat, list):
        return any_messages(chat, "chat")
    if isinstance(chat, dict):  # parquet has the turns of the longest dialogue in every row
        chat = {name: turn for name, turn in chat.items() if turn is not None}
    if not isinstance(chat, dict) or not all(isinstance(turn, dict) for turn in chat.values()):
        raise Unusable("chat 不是 {turn_1: {Human, MOSS}, …}")
    pairs = []
    for name in sorted(chat, key=lambda name: int("0" + "".join(re.findall("[0-9]", name))[:9])):
        turn = chat[name]
        if not set(MOSS_SIDES) <= set(turn):
            raise Unusable("chat 里的轮次缺少 Human 或 MOSS")
        for tool in MOSS_TOOLS:  # "None" where none is used
            if _without_markers(re.sub(r"^\s*<\|[^|]*\|>:?", "", text_of(turn.get(tool), tool))) not in (
                "",
                "None",
            ):
                raise Unusable("含工具调用，暂不支持")
        pairs.append(tuple(_without_markers(text_of(turn[side], side)) for side in MOSS_SIDES))
    if not pairs:
        raise Unusable("对话为空")
    return pairs_of(pairs)


def _without_markers(text: str) -> str:
    return MOSS_MARKERS.sub("", text).strip()


def _completed(row: Row) -> Messages:
    """TRL: a prompt and what completes it, each a text or turns; kto-mix repeats the whole dialogue in the latter."""
    value = turns_in_cell(row["completion"])
    if not (isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]):
        return [*_prompt(row), {"role": "assistant", "content": text_of(value, "completion")}]
    turns = any_messages(value, "completion")
    return turns if turns[0]["role"] != "assistant" else [*_prompt(row), *turns]


# Lists of turns, which may end with the question or with an answer: OpenAI; sharegpt; DISC-Med-SFT,
# ShareGPT-Chinese-English-90k, moss of YeungNLP.
TURN_LISTS: Formats = [((name,), _turns(name)) for name in ("messages", "conversations", "conversation")]
# Most specific first.
PROMPTS: Formats = [
    *TURN_LISTS,
    (("prompt",), _prompt),
    (("instruction",), _question("instruction", "input")),
    (("question",), _question("question")),
    (("query",), _question("query")),
]
FORMATS: Formats = [
    *TURN_LISTS,
    (("chat",), _moss),  # moss-003-sft
    (("instruction", "output"), _pair("instruction", "input", "output")),  # alpaca, BELLE, medical, ruozhiba
    (("instruct", "output"), _pair("instruct", "output")),  # some rows of CMtMedQA
    (("instruction", "response"), _pair("instruction", "context", "input", "response")),  # Dolly
    (("input", "target"), _pair("instruction", "input", "target")),  # merged BELLE, firefly
    (("input", "output"), _pair("input", "output")),
    (("query", "response"), _pair("query", "response")),  # ChatMed
    (("prompt", "answer"), _answered(_prompt, "answer")),  # our own CSV
    (("prompt", "completion"), _completed),  # TRL
    (("prompt", "response"), _answered(_prompt, "response")),
    (("data",), _huatuo),  # HuatuoGPT-sft-data-v1; the name may mean anything: last
]
