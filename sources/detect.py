"""What a file contains, told from its first megabyte alone."""

import codecs
import json
import re
from dataclasses import dataclass
from typing import Literal

HEAD = 1 << 20  # a longer file is cut there
# strict=False: raw tabs and newlines inside strings are common in published files and harmless.
DECODER = json.JSONDecoder(strict=False)
# How JSON begins, also what is broken or written by Python's repr; {{模板}} and [[链接]] begin wiki text.
OBJECT = re.compile(r"\{\s*(?:[\"'}]|$)")
ARRAY = re.compile(r"\[\s*(?:[{\"\]]|\[\s*[\[{\"\d\]-]|$)")
Container = Literal["parquet", "array", "lines", "values", "text", "csv", "empty", "unreadable"]

_UNPACK = "先解压，再放回原处"
# (position, bytes there, what it is, remedy)
FOREIGN = [
    (0, b"PK\x03\x04", "套在别的压缩包里的 zip 压缩包", "先解压：unzip 文件名"),
    (257, b"ustar", "tar 打包文件", "先解包：tar -xf 文件名"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z 压缩包", _UNPACK),
    (0, b"Rar!\x1a\x07", "rar 压缩包", _UNPACK),
    (0, b"\xfd7zXZ\x00", "xz 压缩文件", "先解压：xz -d 文件名"),
    (4, b"1AY&SY", "bzip2 压缩文件", "先解压：bzip2 -d 文件名"),
    (0, b"\x04\x22\x4d\x18", "lz4 压缩文件", "先解压：lz4 -d 文件名"),
    (0, b"ARROW1", "Arrow 文件", "用 pandas 或 datasets 另存为 parquet"),
    (0, b"\xff\xff\xff\xff", "Arrow 文件", "用 datasets 的 load_from_disk 打开，再 to_parquet 另存"),
    (0, b"<?xml", "XML 文件", "先转换成 JSON lines 或每行一篇的 txt"),
    (0, b"\xff\xfe", "UTF-16 编码", "转成 UTF-8：iconv -f UTF-16 -t UTF-8 原文件 > 新文件"),
    (0, b"\xfe\xff", "UTF-16 编码", "转成 UTF-8：iconv -f UTF-16 -t UTF-8 原文件 > 新文件"),
]


@dataclass(frozen=True)
class Detected:
    """A container, or why there is none and what to do about it."""

    container: Container
    reason: str = ""
    remedy: str = ""


def detect(head: bytes, as_csv: bool = False) -> Detected:
    """Tell the container of a file from its first HEAD bytes, already decompressed."""
    if head[:4] == b"PAR1":
        return Detected("parquet")
    is_cut = len(head) >= HEAD
    head = head.removeprefix(codecs.BOM_UTF8)
    for position, magic, reason, remedy in FOREIGN:
        if head[position : position + len(magic)] == magic:
            return Detected("unreadable", reason, remedy)
    if not head.strip(b" \t\r\n\x00"):
        return Detected("empty", "空文件", "重新下载该文件")
    text = head.decode("utf-8", "surrogateescape")
    return _foreign_encoding(head, is_cut) or Detected(_text_container(text, is_cut, as_csv))


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


def _text_container(head: str, is_cut: bool, as_csv: bool) -> Container:
    """JSON array, JSON lines, concatenated JSON values, plain text or, where it is expected, CSV."""
    complete = head.rpartition("\n")[0] or head if is_cut else head
    lines = [line.strip() for line in complete.split("\n") if line.strip()][:50]
    first = lines[0] if lines else ""
    if as_csv and not first.startswith(("{", "[")):
        return "csv"  # its cells may hold anything, lines of JSON too
    if first.startswith("[") and not (len(lines) > 1 and parses(first)):
        return "array" if ARRAY.match(head.lstrip()) or parses(first) else "text"
    values = [decode(line) for line in lines]
    begin_alike = sum(line.startswith("{") for line in lines)
    has_objects = any(isinstance(value, dict) for value in values) and begin_alike * 2 >= len(lines)
    if has_objects or INVALID not in values:
        return "lines"
    if OBJECT.match(first):
        if _several_values(first):
            return "values"
        # Broken or megabyte-long lines all begin alike; a pretty-printed object does not.
        return "lines" if begin_alike == len(lines) else "values"
    return "text"


def _several_values(line: str) -> bool:
    """Whether a line holds JSON objects that simply follow each other."""
    try:
        _, end = DECODER.raw_decode(line)
    except (ValueError, RecursionError):
        return False
    return line[end:].lstrip().startswith("{")


def _foreign_encoding(head: bytes, is_cut: bool) -> Detected | None:
    """One clear reason for a file that is not UTF-8 throughout; a few bad rows are not such a file."""
    if is_utf8(head, is_cut):
        return None
    lines = head.split(b"\n")[: -1 if is_cut and head.count(b"\n") else None]
    broken = sum(not is_utf8(line) for line in lines)
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


def is_utf8(data: bytes, is_cut: bool = False) -> bool:
    """Whether bytes are UTF-8; the last character may be incomplete if they are cut."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data, final=not is_cut)
    except UnicodeDecodeError:
        return False
    return True
