"""Rows of JSON files: one object a line, the elements of an array, or objects that simply follow each other."""

import codecs
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from sources.aside import FileAside
from sources.detect import DECODER
from sources.json_values import JsonWindow
from sources.streams import LONGEST, line_blocks

Row = dict[str, Any]
Decode = Callable[[bytes], Row]  # raises BadRow
BAD_JSON, TOO_DEEP, BAD_TEXT = "不是有效的 JSON", "JSON 嵌套过深", "含非 UTF-8 字节或残缺的 Unicode 字符"
NOT_OBJECT, TOO_LONG = "不是 JSON 对象", f"一行超过 {LONGEST >> 20} MB"
REST, PART = "从这里起 JSON 损坏或不完整，其后读不到", "JSON 损坏，跳过了一段"
MEND = "重新下载，或修好该处"
EXCERPT = 200  # bytes


class BadRow(Exception):
    """Why the text of a row cannot be used."""


def exact_json(raw: bytes) -> Row:
    """The object that `raw` holds, as Python's own decoder reads it; raises BadRow."""
    text = raw.decode("utf-8", "surrogateescape")
    try:
        value = DECODER.decode(text)
    except RecursionError:
        raise BadRow(TOO_DEEP) from None
    except ValueError:
        raise BadRow(BAD_JSON if encodable(text) else BAD_TEXT) from None
    # Surrogates come from bad bytes or from \uXXXX escapes: other rows need no deep check.
    if not encodable(text) or ("\\u" in text and not encodable(value)):
        raise BadRow(BAD_TEXT)
    if not isinstance(value, dict):
        raise BadRow(NOT_OBJECT)
    return value


def fast_json(raw: bytes) -> Row:
    """As exact_json, three times as fast; integers beyond 64 bits may come as floats."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:  # raw control characters, NaN, half surrogates: the slow decoder decides
        return exact_json(raw)
    if type(value) is not dict:
        raise BadRow(NOT_OBJECT)
    return value


def encodable(value: Any) -> bool:
    """Whether all text inside a row is real Unicode, i.e. has no lone surrogates."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def excerpt(raw: bytes) -> str:
    return raw[:EXCERPT].decode("utf-8", "replace")


def lines(
    handle: io.BufferedReader, report: FileAside, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in the bytes [start, end), each with its number or, behind byte 0, its first byte."""
    number = 1
    for position, block in line_blocks(handle, start, end):
        if block is None:
            report.add(position if start else number, TOO_LONG)
            number += 1
            continue
        if not position:
            block = block.removeprefix(codecs.BOM_UTF8)
        found = block.split(b"\n")
        if block.endswith(b"\n"):
            found.pop()
        if not start:
            yield from enumerate(found, number)
            number += len(found)
            continue
        for line in found:
            yield position, line
            position += len(line) + 1


def json_lines(
    handle: io.BufferedReader,
    report: FileAside,
    decode: Decode,
    start: int = 0,
    end: int | None = None,
) -> Iterator[tuple[int, Row]]:
    """One object a line; blank lines do not count."""
    for position, line in lines(handle, report, start, end):
        try:
            yield position, decode(line)
        except BadRow as bad:
            if line.decode("utf-8", "replace").strip():
                report.add(position, str(bad), excerpt(line))


def json_values(
    handle: io.BufferedReader, report: FileAside, decode: Decode, in_array: bool
) -> Iterator[tuple[int, Row]]:
    """The elements of an array, or values that follow each other, numbered from 1.

    Behind damage, reading goes on at the next place that looks like the beginning of an object.
    """
    separator, closing = (b",", b"]") if in_array else (b"", b"")
    window, number = JsonWindow(handle), 0
    if in_array:
        window.take(b"[")
    while True:
        try:
            for start, end in window.spans(separator, closing):
                raw = window.data[start:end]
                try:
                    row = decode(raw)
                except BadRow as bad:
                    if window.is_guess:
                        window.guessed_wrong(start)
                        break
                    if window.marker and window.marker in raw:  # a missing quote has joined two objects
                        window.position = start
                        raise ValueError from bad
                    number += 1
                    report.add(number, str(bad), excerpt(raw))
                else:
                    number += 1
                    yield number, row
            else:
                break
        except (ValueError, RecursionError):
            number += 1
            found = excerpt(window.data[window.position : window.position + EXCERPT])
            if not window.resume():
                report.add(number, REST, found, MEND)
                return
            report.add(number, PART, found, MEND)
    if in_array:
        window.take(closing)
        if not window.at_end(b""):
            report.add(None, "JSON 数组结束后还有内容，未读", excerpt(window.data[window.position :]))
