"""The turns of a dialogue, by whatever names a format calls them -> system text, alternating messages.

What a real set contains is mended where nothing is lost by it, and said in `changes`; everything else is refused
with a reason.
"""

import json
import math
from collections.abc import Iterable
from typing import Any

from sources.json_rows import BAD_TEXT, encodable

Messages = list[dict[str, str]]
Row = dict[str, Any]

ROLES = {  # what formats call the two sides and the system text
    **dict.fromkeys(("user", "human", "Human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard", "MOSS"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("function_call", "function", "observation", "tool", "ipython"), "tool"),
}
TEXT_PARTS = {"text", "input_text", "output_text"}  # kinds of an OpenAI message's parts that are text
ATTACHMENTS = ("images", "image", "videos", "audios")
JOINED, CUT = "合并同一方的连续发言", "去掉末尾没有回答的提问"
TOOLS, MEDIA, NO_PAIRS = "含工具调用，暂不支持", "含图片、音频或视频，暂不支持", "对话不是一问一答"


class Unusable(Exception):
    """Why a row is not an instruction, nor a preference; what differs from row to row stands in （）."""


def text_of(value: Any, field: str) -> str:
    """A field's text, stripped; of a list of OpenAI's parts, their texts a line each."""
    if isinstance(value, str):
        if not encodable(value):  # half a surrogate pair, by an escape in a cell that holds JSON
            raise Unusable(BAD_TEXT)
        return value.strip()
    if is_missing(value):
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if not all(part["type"] in TEXT_PARTS for part in value if isinstance(part["type"], str)):
            raise Unusable(MEDIA)
        return "\n".join(filter(None, (text_of(part.get("text"), field) for part in value)))
    raise Unusable(f"字段 {field} 不是文字")


def is_missing(value: Any) -> bool:
    """Whether a field has no value: null, or the NaN that pandas makes of an empty cell."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def decoded(value: Any) -> Any:
    """The value of a field that is no text; CSV files hold it as JSON. None where that is damaged."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def are_turns(value: Any) -> bool:
    """Whether a list holds turns, and not the parts of one text."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "type" not in value[0]


def turns_in_cell(value: Any) -> Any:
    """The turns that a cell of a CSV file holds as JSON; other values as they are."""
    turns = decoded(value) if isinstance(value, str) and value.lstrip().startswith("[{") else None
    return turns if are_turns(turns) and {"role", "from"} & set(turns[0]) else value


def list_of(row: Row, field: str) -> list[Any]:
    """A field that must be a list."""
    value = decoded(row[field])
    if not isinstance(value, list):
        raise Unusable(f"字段 {field} 不是列表")
    return value


def pairs_of(pairs: Iterable[tuple[str, str]]) -> Messages:
    """Question and answer pairs as messages."""
    sides = ("user", "assistant")
    return [{"role": s, "content": text} for pair in pairs for s, text in zip(sides, pair, strict=True)]


def messages_of(turns: list[Any], field: str, role: str, text: str) -> Messages:
    """Objects with a role and a text under these names as messages, roles under our names."""
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or role not in turn:
            raise Unusable(f"{field} 里的轮次缺少 {role} 或 {text}")
        name = turn[role] if isinstance(turn[role], str) else repr(type(turn[role]))
        known = ROLES.get(name) or ROLES.get(name.lower())
        if known == "tool" or turn.get("tool_calls") or turn.get("function_call"):
            raise Unusable(TOOLS)
        if known is None:
            raise Unusable(f"未知的角色（{name[:20]}）")
        if text not in turn:
            raise Unusable(f"{field} 里的轮次缺少 {role} 或 {text}")
        messages.append({"role": known, "content": text_of(turn[text], text)})
    return messages


def any_messages(turns: list[Any], field: str) -> Messages:
    """Turns that say themselves which names they use: {from, value}, {role, content} or {human, assistant}."""
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    if "from" in first or "value" in first:
        return messages_of(turns, field, "from", "value")
    if "human" not in first and "assistant" not in first:
        return messages_of(turns, field, "role", "content")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict) or not {"human", "assistant"} <= set(turn):
            raise Unusable(f"{field} 里的轮次缺少 human 或 assistant")
        messages += pairs_of([(text_of(turn["human"], "human"), text_of(turn["assistant"], "assistant"))])
    return messages


def history_of(row: Row) -> Messages:
    """The field `history`, [[question, answer], …], also as JSON in a cell."""
    if not _holds_something(row.get("history")):
        return []
    history = decoded(row["history"])
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return any_messages(history, "history")
    # A string of two characters is no pair.
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        raise Unusable("history 不是 [[问, 答], …]")
    return pairs_of((text_of(user, "history"), text_of(reply, "history")) for user, reply in history)


def check_attachments(row: Row) -> None:
    """Raise Unusable for what comes with a dialogue and is no text."""
    if _holds_something(row.get("tools")):
        raise Unusable(TOOLS)
    if any(_holds_something(row.get(field)) for field in ATTACHMENTS):
        raise Unusable(MEDIA)


def _holds_something(value: Any) -> bool:
    """Whether a field that is no text has a value; an empty one may be spelt as JSON."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return bool(value) and not is_missing(value)


def dialogue(system: str, messages: Messages, answered: bool = True) -> dict[str, Any]:
    """{"messages", and where there are such "system", "changes"}; raises Unusable.

    System texts at the beginning are joined. Neighbouring turns of one side are joined by a newline: they are
    one message sent in pieces. answered: the messages end with an answer (a last question without one is cut
    off) instead of with a question. A dialogue that an answer opens is refused: our chat format has no place
    for it, and without it the rest may refer to what is no longer there.
    """
    changes: list[str] = []
    messages, texts = list(messages), [system] if system else []
    while messages and messages[0]["role"] == "system":
        text = messages.pop(0)["content"]
        texts += [text] if text and text not in texts else []
    merged: Messages = []
    for message in messages:
        if message["role"] == "system":
            raise Unusable("system 不在对话开头")
        if not message["content"]:
            raise Unusable("问题或回答为空")
        if merged and merged[-1]["role"] == message["role"]:
            both = f"{merged[-1]['content']}\n{message['content']}"
            merged[-1] = {"role": message["role"], "content": both}
            changes += [] if JOINED in changes else [JOINED]
        else:
            merged.append(message)
    if not merged:
        raise Unusable("对话为空")
    if merged[0]["role"] == "assistant":
        raise Unusable(f"{NO_PAIRS}：以回答开头")
    if answered and merged[-1]["role"] == "user":
        merged.pop()
        changes.append(CUT)
        if not merged:
            raise Unusable("只有提问，没有回答")
    if not answered and merged[-1]["role"] == "assistant":
        raise Unusable("偏好数据的对话没有以提问结尾")
    found: dict[str, Any] = {"messages": merged}
    if texts:
        found["system"] = "\n".join(texts)
    if changes:
        found["changes"] = changes
    return found
