"""Pretraining text of every public format -> `Document(text, source)`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sources.aside import SetAside
from sources.containers import read_rows
from sources.files import OUR_OUTPUTS, list_files, source_name


class Document(NamedTuple):
    """One text of the corpus and the data set it came from."""

    text: str
    source: str


class Unusable(Exception):
    """Why a row has no text."""


def read_documents(
    path: Path, aside: SetAside, text_column: str | None = None, skip: tuple[Path, ...] = OUR_OUTPUTS
) -> Iterator[Document]:
    """Every document of a file or folder; rows without usable text go to `aside`."""
    for file in list_files(path, skip):
        yield from file_documents(file, source_name(file, path), aside, text_column)


def file_documents(
    file: Path, source: str, aside: SetAside, text_column: str | None = None
) -> Iterator[Document]:
    """Every document of one file; rows without usable text go to `aside`."""
    for number, row in read_rows(file, aside):
        if isinstance(row, str):
            if row.strip():
                yield Document(row.strip(), source)
            continue
        try:
            text = row_text(row, text_column)
        except Unusable as reason:
            aside.add(file, number, str(reason), row, REMEDIES.get(str(reason).partition("（")[0], ""))
        else:
            # Our own clean files keep the name of the data set each row came from.
            own = row["source"] if set(row) == {"text", "source"} and file.suffix == ".parquet" else source
            yield Document(text, own if isinstance(own, str) else source)


def row_text(row: dict[str, Any], text_column: str | None = None) -> str:
    """The text of one row by the first format whose fields it has; raises Unusable."""
    if text_column:
        return _string(row, text_column)
    for fields, convert in FORMATS:
        if all(field in row for field in fields):
            return convert(row)
    raise Unusable(f"{NO_FIELD}（现有字段：{'、'.join(list(row)[:6]) or '无'}）")


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


def _field(name: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _string(row, name)


def _titled(body_field: str) -> Callable[[dict[str, Any]], str]:
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


# The fields that tell a format, most specific first, and how its text is put together.
FORMATS: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], str]]] = [
    (("completion",), _field("completion")),  # wikipedia-cn-filtered
    (("title", "sections"), _encyclopedia),  # 563w_baidubaike
    (("title", "summary"), _encyclopedia),
    (("title", "content"), _titled("content")),  # WuDaoCorpus
    (("title", "text"), _titled("text")),
    (("title", "tags"), _encyclopedia),  # a Baike row with neither: set aside as a bare title
    (("text",), _field("text")),  # C4_zh, medical, our clean parquet
    (("response",), _field("response")),
]
NO_FIELD = "没有已知的正文字段"
REMEDIES = {
    NO_FIELD: "用 --text_column 指明正文所在的字段；指令数据请放到 sft_data/raw 并用 sft_data_process.py"
}
