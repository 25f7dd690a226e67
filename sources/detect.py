"""What a file contains, told from its first megabyte alone."""

import codecs
import json
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Literal

HEAD = 1 << 20
# strict=False: raw tabs and newlines inside strings are common in published files and harmless.
DECODER = json.JSONDecoder(strict=False)
Container = Literal["parquet", "array", "lines", "values", "text", "csv", "empty", "unreadable"]


@dataclass(frozen=True)
class Detected:
    """A container, or why there is none and what to do about it."""

    container: Container
    reason: str = ""
    remedy: str = ""


def detect(handle: BinaryIO, as_csv: bool = False) -> Detected:
    """Tell the container of a seekable, already decompressed file; leaves it at its beginning."""
    head = _read_head(handle)
    handle.seek(0)
    if head[:4] == b"PAR1":
        return Detected("parquet")
    if head[:4] == b"PK\x03\x04":
        return Detected("unreadable", "zip 压缩包", "先解压：unzip 文件名")
    if not head.removeprefix(codecs.BOM_UTF8).strip(b" \t\r\n\x00"):
        return Detected("empty", "空文件", "重新下载该文件")
    return _foreign_encoding(head) or Detected(
        _text_container(head.decode("utf-8-sig", "surrogateescape"), as_csv)
    )


def parses(text: str) -> bool:
    """Whether `text` is one JSON value."""
    return decode(text) is not INVALID


INVALID = object()


def decode(text: str) -> object:
    """The JSON value of `text`, or INVALID."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        return INVALID


def _read_head(handle: BinaryIO) -> bytes:
    """The first megabyte, or what a damaged gzip still gives of it."""
    head = b""
    try:
        while len(head) < HEAD and (piece := handle.read1(HEAD)):
            head += piece
    except (EOFError, OSError, zlib.error):
        if not head:
            raise
    return head


def _text_container(head: str, as_csv: bool) -> Container:
    """JSON array, JSON lines, concatenated JSON values, plain text or, where it is expected, CSV."""
    complete = head if len(head) < HEAD // 4 else head.rpartition("\n")[0] or head
    lines = [line.strip() for line in complete.splitlines() if line.strip()][:50]
    first = lines[0] if lines else ""
    if as_csv and not first.startswith(("{", "[")):
        return "csv"  # its cells may hold anything, lines of JSON too
    if first.startswith("[") and not (len(lines) > 1 and parses(first)):
        after = head.lstrip()[1:].lstrip()[:1]
        return "array" if after in '{["]' or parses(first) else "text"
    values = [decode(line) for line in lines]
    begin_alike = sum(line.startswith("{") for line in lines)
    has_objects = any(isinstance(value, dict) for value in values) and begin_alike * 2 >= len(lines)
    if has_objects or INVALID not in values:
        return "lines"
    if first.startswith("{"):
        # Broken or megabyte-long lines all begin alike; a pretty-printed object does not.
        return "lines" if begin_alike == len(lines) else "values"
    return "text"


def _foreign_encoding(head: bytes) -> Detected | None:
    """One clear reason for a file that is not UTF-8 throughout; a few bad rows are not such a file."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Detected("unreadable", "UTF-16 编码", "转成 UTF-8：iconv -f UTF-16 -t UTF-8 原文件 > 新文件")
    lines = head.split(b"\n")[: -1 if len(head) >= HEAD and head.count(b"\n") else None]
    broken = sum(not _is_utf8(line) for line in lines)
    text = head.decode("utf-8", "replace")
    replaced = text.count("\ufffd")
    foreign = sum(not char.isascii() for char in text) - replaced
    if broken * 2 <= len([line for line in lines if line.strip()]) or replaced <= foreign:
        return None
    if sum(map(head.count, range(9))) > len(head) / 100:  # control characters that no text has
        return Detected("unreadable", "二进制文件", "确认它是 JSON、parquet 或文本")
    try:
        head[: head.rfind(b"\n") + 1 or None].decode("gb18030")
    except UnicodeDecodeError:
        return Detected("unreadable", "不是 UTF-8 编码", "查明其编码后用 iconv 转成 UTF-8")
    return Detected("unreadable", "不是 UTF-8（像是 GBK）", "转码：iconv -f GBK -t UTF-8 原文件 > 新文件")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
