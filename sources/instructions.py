"""Instructions and dialogues of every public format -> one shape: messages, and optionally a system text.

A format is one line of `FORMATS`: the fields that tell it, and a converter.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sources.aside import SetAside
from sources.containers import read_rows
from sources.files import OUR_OUTPUTS, list_files, source_name

Messages = list[dict[str, str]]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TOOL_ROLES = {"function_call", "function", "observation", "tool"}


class Unusable(Exception):
    """Why a row is not an instruction."""


def read_instructions(path: Path, aside: SetAside) -> Iterator[dict[str, Any]]:
    """Every instruction of a file or folder as {"messages", "source"} and, where it has one, "system"."""
    for file in list_files(path, OUR_OUTPUTS):
        source = source_name(file, path)
        for number, row in read_rows(file, aside, as_csv=True):
            try:
                yield {**to_messages(row), "source": source}
            except Unusable as reason:
                aside.add(file, number, str(reason), row)


def to_messages(row: dict[str, Any]) -> dict[str, Any]:
    """{"messages": alternating user and assistant turns, "system": optional}; raises Unusable."""
    if not isinstance(row, dict):
        raise Unusable("不是 JSON 对象")
    for fields, convert in FORMATS:
        if all(field in row for field in fields):
            messages = convert(row)
            break
    else:
        raise Unusable(f"没有已知的指令字段（现有字段：{'、'.join(list(row)[:6]) or '无'}）")
    system = _text(row.get("system") or "", "system")
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    _check(messages)
    return {"messages": messages, "system": system} if system else {"messages": messages}


def _check(messages: Messages) -> None:
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise Unusable("对话不是一问一答、以回答结尾")
    if not messages:
        raise Unusable("对话为空")
    if not all(message["content"] for message in messages):
        raise Unusable("问题或回答为空")


def _text(value: Any, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"字段 {field} 不是文字")
    return value.strip()


def _turns(pairs: list[tuple[str, str]]) -> Messages:
    """Question and answer pairs as messages."""
    return [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def _alpaca(row: dict[str, Any]) -> Messages:
    """instruction (+ newline + input) -> output, after an optional history of pairs."""
    question = [_text(row["instruction"], "instruction"), _text(row.get("input"), "input")]
    answer = _text(row["output"], "output")
    return [*_history(row), *_turns([("\n".join(filter(None, question)), answer)])]


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], Messages]:
    """Two fields, also with the `history` of our own CSV."""
    return lambda row: [
        *_history(row),
        *_turns([(_text(row[question], question), _text(row[answer], answer))]),
    ]


def _history(row: dict[str, Any]) -> Messages:
    history = row.get("history") or []
    try:
        history = json.loads(history) if isinstance(history, str) else history
        return _turns([(_text(user, "history"), _text(reply, "history")) for user, reply in history])
    except (ValueError, TypeError, RecursionError) as error:
        raise Unusable("history 不是 [[问, 答], …]") from error


def _messages(field: str, role_field: str, text_field: str) -> Callable[[dict[str, Any]], Messages]:
    """A list of {role, text} objects under any of the usual names."""

    def convert(row: dict[str, Any]) -> Messages:
        messages = []
        for turn in _list(row, field):
            if not isinstance(turn, dict) or not {role_field, text_field} <= set(turn):
                raise Unusable(f"{field} 里的轮次缺少 {role_field} 或 {text_field}")
            role = str(turn[role_field])
            if role in TOOL_ROLES:
                raise Unusable("含工具调用，暂不支持")
            if role not in ROLES:
                raise Unusable(f"未知的角色 {role[:20]}")
            messages.append({"role": ROLES[role], "content": _text(turn[text_field], text_field)})
        return messages

    return convert


def _conversation(row: dict[str, Any]) -> Messages:
    """DISC-Med has {role, content}, ShareGPT-90k and moss {human, assistant} under the same name."""
    turns = _list(row, "conversation")
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _messages("conversation", "role", "content")(row)
    try:
        return _turns([(_text(t["human"], "human"), _text(t["assistant"], "assistant")) for t in turns])
    except (KeyError, TypeError) as error:
        raise Unusable("conversation 里的轮次缺少 human 或 assistant") from error


def _huatuo(row: dict[str, Any]) -> Messages:
    """HuatuoGPT: ["问：…", "答：…", …]."""
    texts = [re.sub("^(问|答)[：:]", "", _text(turn, "data")).strip() for turn in _list(row, "data")]
    if len(texts) % 2:
        raise Unusable("对话不是一问一答、以回答结尾")
    return _turns(list(zip(texts[::2], texts[1::2], strict=True)))


def _list(row: dict[str, Any], field: str) -> list[Any]:
    if not isinstance(row[field], list):
        raise Unusable(f"字段 {field} 不是列表")
    return row[field]


# Most specific first.
FORMATS: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], Messages]]] = [
    (("messages",), _messages("messages", "role", "content")),  # OpenAI
    (("conversations",), _messages("conversations", "from", "value")),  # sharegpt
    (("conversation",), _conversation),  # DISC-Med-SFT, ShareGPT-Chinese-English-90k
    (("data",), _huatuo),  # HuatuoGPT-sft-data-v1
    (("instruction", "output"), _alpaca),  # alpaca, BELLE, medical, ruozhiba, with history
    (("instruct", "output"), _pair("instruct", "output")),  # some rows of CMtMedQA
    (("input", "target"), _pair("input", "target")),  # merged BELLE, firefly
    (("query", "response"), _pair("query", "response")),  # ChatMed
    (("prompt", "answer"), _pair("prompt", "answer")),  # our own CSV
]
