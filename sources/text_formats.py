"""Pretraining text of every public format: which fields of a row make its text, and how."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

Convert = Callable[[dict[str, Any]], str]
NAME_LENGTH = 30  # characters of a field name that are shown


class Unusable(Exception):
    """Why a row has no text."""


def row_text(row: dict[str, Any], text_column: str | None = None) -> str:
    """The text of one row by the first format whose fields it has; raises Unusable."""
    return _string(row, text_column) if text_column else _format(tuple(row))[1](row)


def text_field(fields: Iterable[str], text_column: str | None = None) -> str | None:
    """The one field that is the text as it stands; None where several make it. Raises Unusable."""
    fields = tuple(fields)
    if text_column:
        if text_column not in fields:
            raise Unusable(f"没有字段 {text_column}")
        return text_column
    telling, _ = _format(fields)
    return telling[0] if len(telling) == 1 else None


@lru_cache(maxsize=1024)
def _format(fields: tuple[str, ...]) -> tuple[tuple[str, ...], Convert]:
    """The first format whose telling fields are among these."""
    for telling, convert in FORMATS:
        if all(field in fields for field in telling):
            return telling, convert
    names = "、".join(field[:NAME_LENGTH] for field in fields[:6])
    raise Unusable(f"{NO_FIELD}（现有字段：{names or '无'}）")


def _string(row: dict[str, Any], field: str) -> str:
    """A field that must be a string with something in it."""
    value = row.get(field)
    if value is None:
        raise Unusable(f"字段 {field} 为空" if field in row else f"没有字段 {field}")
    if not isinstance(value, str):
        raise Unusable(f"字段 {field} 不是文字")
    if not value.strip():
        raise Unusable(f"字段 {field} 为空")
    return value.strip()


def _optional(row: dict[str, Any], field: str) -> str:
    value = row.get(field)
    return value.strip() if isinstance(value, str) else ""


def _field(name: str) -> Convert:
    return lambda row: _string(row, name)


def _titled(body_field: str) -> Convert:
    """A title above its text, unless the text begins with it anyway."""

    def convert(row: dict[str, Any]) -> str:
        title, body = _optional(row, "title"), _string(row, body_field)
        return body if body.startswith(title) else f"{title}\n{body}"

    return convert


def _encyclopedia(row: dict[str, Any]) -> str:
    """Baike: `title：summary`, then a line for every section; summary and sections may be missing."""
    title, summary = _string(row, "title"), _optional(row, "summary")
    sections = row.get("sections")
    lines = []
    for section in sections if isinstance(sections, list) else []:
        if isinstance(section, dict):
            parts = [_optional(section, "title"), _optional(section, "content")]
            lines += ["：".join(filter(None, parts))] if parts[1] else []
    if not (summary or lines):
        raise Unusable("百科条目只有标题")
    return "\n".join([f"{title}：{summary}", *lines])


# The fields that tell a format, most specific first, and how its text is put together; one field alone is the
# text itself.
FORMATS: list[tuple[tuple[str, ...], Convert]] = [
    (("completion",), _field("completion")),  # wikipedia-cn-filtered
    (("title", "sections"), _encyclopedia),  # 563w_baidubaike
    (("title", "summary"), _encyclopedia),
    (("title", "content"), _titled("content")),  # WuDaoCorpus
    (("title", "text"), _titled("text")),
    (("title", "tags"), _encyclopedia),  # a Baike row with neither: set aside as a bare title
    (("text",), _field("text")),  # C4_zh, medical, our clean parquet
    (("response",), _field("response")),
    (("content",), _field("content")),  # WuDao and others without titles
]
# All fields that any of the formats looks at.
FIELDS = {field for telling, _ in FORMATS for field in telling}
NO_FIELD = "没有已知的正文字段"
REMEDIES = {  # by what a reason says before its brackets
    NO_FIELD: "用 --text_column 指明正文所在的字段；指令数据请放到 sft_data/raw 并用 sft_data_process.py"
}


def remedy(reason: str) -> str:
    """What to do about a row that is unusable for this reason; may be empty."""
    return REMEDIES.get(reason.partition("（")[0], "")
