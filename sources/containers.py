"""Rows of any file: JSON array, JSON lines, single JSON values, parquet, plain text, CSV; each also compressed.

All of them stream: memory holds a few megabytes, whatever the size of the file.
"""

import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sources.aside import FileAside, SetAside
from sources.detect import HEAD, Container, detect
from sources.json_rows import BAD_TEXT, Decode, encodable, exact_json, excerpt, json_lines, json_values, lines
from sources.parquet import open_parquet, parquet_rows
from sources.streams import DAMAGED, LONGEST, is_zip, open_file, open_member, open_zip, zip_members

Row = dict[str, Any] | str
T = TypeVar("T")
csv.field_size_limit(LONGEST)  # answers may be long
UNCLOSED = "CSV 的双引号没有成对，从这里起读不到"
CSV_END = "\ud800"  # a row of its own behind the last one; no text that was read holds half a character


class Part(NamedTuple):
    """A file, or a member of a zip archive, that has something in it; opened."""

    handle: io.BufferedReader  # unpacked
    container: Container
    report: FileAside
    start: int = 0  # the first byte (JSON lines, text) or row group (parquet) that is wanted
    end: int | None = None  # behind the last one

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.end is None


def is_csv(path: Path) -> bool:
    """Whether a file is CSV by its name: its content may be anything."""
    return ".csv" in [suffix.lower() for suffix in path.suffixes]


def read_rows(
    path: Path, aside: SetAside, as_csv: bool = False, decode: Decode = exact_json
) -> Iterator[tuple[int, Row]]:
    """Yield (row number from 1, row) of every usable row; everything else goes to `aside`.

    Rows are dicts, or strings for plain text, which is one document per line. With `as_csv`, what is
    neither parquet nor JSON is read as CSV with a header. Members of a zip archive are numbered on.
    """
    last = 0
    for part in open_parts(path, aside, as_csv=as_csv):
        before = last
        for number, row in complete(part_rows(part, decode), part):
            last = before + number
            yield last, row


def open_parts(
    path: Path, aside: SetAside, start: int = 0, end: int | None = None, as_csv: bool = False
) -> Iterator[Part]:
    """A file, or the members [start, end) of a zip archive one by one; what is no data goes to `aside`.

    start, end of other files: see Part.
    """
    report = FileAside(aside, path)
    try:
        if not is_zip(path):
            yield from _opened(report, lambda: open_file(path), as_csv, start, end)
            return
        with open_zip(path) as archive:
            members = zip_members(archive)
            if not members:
                report.add(None, "zip 里没有数据文件")
            for member in members[start:end]:
                inside = FileAside(aside, member.path)
                if member.obstacle:
                    inside.add(None, member.obstacle, remedy="先解压：unzip 文件名，或用 7-Zip")
                else:
                    yield from _opened(inside, lambda m=member: open_member(archive, m), as_csv)
    except (OSError, *DAMAGED) as error:
        report_damage(error, report)


def _opened(
    report: FileAside,
    open_it: Callable[[], io.BufferedReader],
    as_csv: bool,
    start: int = 0,
    end: int | None = None,
) -> Iterator[Part]:
    """The part if it can be opened and holds rows."""
    try:
        handle = open_it()
        found = detect(handle.peek(HEAD)[:HEAD], as_csv)
    except (OSError, *DAMAGED) as error:
        report_damage(error, report)
        return
    with handle:
        if found.reason:
            report.add(None, found.reason, remedy=found.remedy)
            return
        report.by_offset = start > 0 and found.container != "parquet"
        yield Part(handle, found.container, report, start, end)


def complete(items: Iterable[T], part: Part) -> Iterator[T]:
    """Pass everything on; damage, or that there was nothing at all, is set aside."""
    before, item = len(part.report.aside), None
    try:
        for item in items:
            yield item
    except (OSError, *DAMAGED) as error:
        # Behind the last good row; parquet is read from its end, and knows the rows of its damage itself.
        place = None if part.container == "parquet" else item[0] + 1 if item else part.start + 1
        report_damage(error, part.report, place)
    # `[]`, an empty table, a CSV of a header alone
    if item is None and part.is_whole and len(part.report.aside) == before:
        part.report.add(None, "文件里没有数据行")


def report_damage(error: Exception, report: FileAside, place: int | None = None) -> None:
    """Set aside what cannot be read: from the row (or byte) `place` on, or without it the whole file."""
    if isinstance(error, zipfile.BadZipFile):
        report.add(place, "zip 文件损坏或不完整，其后读不到", str(error), "重新下载该文件")
    elif isinstance(error, DAMAGED):
        report.add(place, "压缩文件损坏或不完整，其后读不到", str(error), "重新下载该文件")
    else:
        report.add(place, f"无法读取：{error.strerror or error}")


def part_rows(part: Part, decode: Decode) -> Iterator[tuple[int, Row]]:
    """Numbered rows; behind byte 0 numbers are not known, and the byte where a row begins stands for its number.

    Raises OSError and DAMAGED behind the last row that could be read.
    """
    if part.container == "lines":
        return json_lines(part.handle, part.report, decode, part.start, part.end)
    if part.container == "text":
        return _text(part)
    if part.container == "parquet":
        return _parquet(part)
    if part.container == "csv":
        return _csv(part)
    return json_values(part.handle, part.report, decode, in_array=part.container == "array")


def _text(part: Part) -> Iterator[tuple[int, Row]]:
    """Lines that are not blank."""
    for number, line in lines(part.handle, part.report, part.start, part.end):
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            part.report.add(number, BAD_TEXT, excerpt(line))
            continue
        if text and not text.isspace():
            yield number, text


def _parquet(part: Part) -> Iterator[tuple[int, Row]]:
    file = open_parquet(part.handle, part.report)
    if file:
        yield from parquet_rows(file, part.report, part.start, part.end)


def _csv(part: Part) -> Iterator[tuple[int, Row]]:
    with io.TextIOWrapper(part.handle, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        # Python 3.10 refuses NUL characters in CSV files.
        read = iter(lambda: text.readline(LONGEST).replace("\0", ""), "")
        rows = csv.DictReader(chain(read, [CSV_END]), restkey=None)
        try:
            for number, row in enumerate(rows, 1):
                is_text = encodable(row)
                if not is_text and CSV_END in json.dumps(row, ensure_ascii=False):
                    if CSV_END not in row.values():  # it has become the end of a cell
                        part.report.add(number, UNCLOSED, row, "补上缺的双引号，或重新导出该文件")
                    return
                if None in row:
                    part.report.add(number, "单元格比表头多", row, "含逗号或换行的单元格要用双引号括起")
                elif not is_text:
                    part.report.add(number, BAD_TEXT, row)
                else:
                    yield number, row
        except csv.Error as error:
            part.report.add(rows.line_num, "CSV 格式错误，从这里起读不到", str(error))
