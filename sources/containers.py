"""Rows of any file: gzip, parquet, JSON array, JSON lines, single JSON values, plain text, CSV.

`read_rows` streams: memory holds one row (or one parquet batch), whatever the size of the file.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any, BinaryIO

from sources.aside import SetAside
from sources.detect import DECODER, detect

Row = dict[str, Any] | str
CHUNK = 1 << 20
# A value that is cut by the end of the buffer fails within this many characters of it (`-Infinity`,
# `\u12`, `1e+`): a failure further back is a real error.
CUT = 16
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
BAD_JSON, TOO_DEEP, BAD_TEXT = "不是有效的 JSON", "JSON 嵌套过深", "含非 UTF-8 字节或残缺的 Unicode 字符"
NOT_OBJECT, REST = "不是 JSON 对象", "从这里起 JSON 数组损坏或不完整，其后读不到"
csv.field_size_limit(2**31 - 1)  # answers may be long


def read_rows(path: Path, aside: SetAside, as_csv: bool = False) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of every usable row; everything else goes to `aside`.

    Rows are dicts, or strings for plain text, which is one document per line. With `as_csv`, what is
    neither parquet nor JSON is read as CSV with a header.
    """
    found_before, is_empty = len(aside), True
    try:
        for item in _rows(path, aside, as_csv):
            is_empty = False
            yield item
    except DAMAGED:
        aside.add(path, None, "gzip 文件损坏或不完整，其后读不到", remedy="重新下载该文件")
    except OSError as error:
        aside.add(path, None, f"无法读取：{error.strerror or error}")
    if is_empty and len(aside) == found_before:  # `[]`, an empty table, a CSV of a header alone
        aside.add(path, None, "文件里没有数据行")


def _rows(path: Path, aside: SetAside, as_csv: bool) -> Iterator[tuple[int, Row]]:
    with _open(path) as handle:
        found = detect(handle, as_csv)
        if found.container == "parquet":
            yield from _parquet(handle, path, aside)
        elif found.container == "array":
            yield from _json_stream(handle, path, aside, in_array=True)
        elif found.container == "values":
            yield from _json_stream(handle, path, aside, in_array=False)
        elif found.container == "lines":
            yield from _json_lines(handle, path, aside)
        elif found.container == "text":
            yield from _text(handle, path, aside)
        elif found.container == "csv":
            yield from _csv(handle, path, aside)
        else:
            aside.add(path, None, found.reason, remedy=found.remedy)


def encodable(value: Any) -> bool:
    """Whether all text inside a row is real Unicode, i.e. has no lone surrogates."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _open(path: Path) -> BinaryIO:
    with open(path, "rb") as handle:
        is_gzip = handle.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzip else open(path, "rb")


def _parquet(handle: BinaryIO, path: Path, aside: SetAside) -> Iterator[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Parquet is read from its end: a compressed one has to be unpacked first.
    source = io.BytesIO(handle.read()) if isinstance(handle, gzip.GzipFile) else handle
    number = 0
    try:
        for batch in pq.ParquetFile(source).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, ValueError, OverflowError) as error:
        aside.add(path, number + 1, "parquet 损坏，从这里起读不到", str(error), "重新下载该文件")


def _lines(handle: BinaryIO) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank; bytes that are not UTF-8 become surrogates, found later."""
    for number, line in enumerate(handle, 1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8", "surrogateescape").rstrip("\r\n")
        if text.strip():
            yield number, text


def _text(handle: BinaryIO, path: Path, aside: SetAside) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(handle):
        if encodable(line):
            yield number, line
        else:
            aside.add(path, number, BAD_TEXT, line)


def _json_lines(handle: BinaryIO, path: Path, aside: SetAside) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(handle):
        try:
            value = DECODER.decode(line)
        except RecursionError:
            aside.add(path, number, TOO_DEEP, line)
        except ValueError:
            aside.add(path, number, BAD_JSON if encodable(line) else BAD_TEXT, line)
        else:
            yield from _checked(path, number, value, line, aside)


def _checked(path: Path, number: int, value: Any, raw: str, aside: SetAside) -> Iterator[tuple[int, Row]]:
    """The row if it is an object of real Unicode text."""
    # Surrogates come from bad bytes or from \uXXXX escapes: other rows need no deep check.
    if not encodable(raw) or ("\\u" in raw and not encodable(value)):
        aside.add(path, number, BAD_TEXT, raw[:200])
    elif not isinstance(value, dict):
        aside.add(path, number, NOT_OBJECT, raw[:200])
    else:
        yield number, value


def _json_stream(handle: BinaryIO, path: Path, aside: SetAside, in_array: bool) -> Iterator[tuple[int, Row]]:
    """The elements of a JSON array, or JSON values that simply follow each other."""
    buffer = _Buffer(handle)
    number = 0
    try:
        if in_array:
            buffer.take("[")
        while not buffer.at_end("]" if in_array else ""):
            number += 1
            if in_array and number > 1:
                buffer.take(",")
            value, raw = buffer.value()
            yield from _checked(path, number, value, raw, aside)
        if in_array:
            buffer.take("]")
            if not buffer.at_end(""):
                aside.add(path, None, "JSON 数组结束后还有内容，未读", buffer.excerpt())
    except RecursionError:
        aside.add(path, number, f"{TOO_DEEP}，从这里起读不到", buffer.excerpt())
    except ValueError:
        aside.add(path, number, REST if in_array else BAD_JSON, buffer.excerpt(), "重新下载，或修好该处")


class _Buffer:
    """A window over a long JSON text that grows only as far as the current value needs."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.position, self.ended = "", 0, False
        self.grow()
        self.position = len(self.text) - len(self.text.removeprefix("\ufeff"))

    def grow(self) -> None:
        """Drop what was consumed and at least double the rest, so that a long value costs linear time."""
        rest = self.text[self.position :]
        pieces, wanted = [rest], max(CHUNK, len(rest))
        while wanted > 0 and not self.ended:
            piece = self.handle.read1(CHUNK)
            self.ended = not piece
            pieces.append(self.decoder.decode(piece, final=self.ended))
            wanted -= len(pieces[-1])
        self.text, self.position = "".join(pieces), 0

    def skip_space(self) -> None:
        while True:
            self.position = WHITESPACE.match(self.text, self.position).end()
            if self.position < len(self.text) or self.ended:
                return
            self.grow()

    def at_end(self, closing: str) -> bool:
        """Whether the closing bracket, or without one the end of the file, comes next."""
        self.skip_space()
        if closing:
            return self.text[self.position : self.position + 1] == closing
        return self.position == len(self.text)

    def take(self, char: str) -> None:
        self.skip_space()
        if self.text[self.position : self.position + 1] != char:
            raise ValueError(f"expected {char}")
        self.position += 1

    def value(self) -> tuple[Any, str]:
        """The next JSON value and its own text."""
        self.skip_space()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.position)
                if self.ended or end < len(self.text) - CUT:
                    raw = self.text[self.position : end]
                    self.position = end
                    return value, raw
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - CUT
                if self.ended or not is_cut:
                    raise
            self.grow()

    def excerpt(self) -> str:
        return self.text[self.position : self.position + 200]


def _csv(handle: BinaryIO, path: Path, aside: SetAside) -> Iterator[tuple[int, Row]]:
    lines = io.TextIOWrapper(handle, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Python 3.10 refuses NUL characters in CSV files.
    rows = csv.DictReader((line.replace("\0", "") for line in lines), restkey=None)
    try:
        for number, row in enumerate(rows, 1):
            if None in row:
                aside.add(path, number, "单元格比表头多", row, "含逗号或换行的单元格要用双引号括起")
            elif not encodable(row):
                aside.add(path, number, BAD_TEXT, row)
            else:
                yield number, row
    except csv.Error as error:
        aside.add(path, rows.line_num, "CSV 格式错误，从这里起读不到", str(error))
