"""Texts in batches of bounded size, from rows or straight from the columns of parquet files."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sources.aside import FileAside
from sources.containers import Part, Row, complete, part_rows
from sources.detect import is_utf8
from sources.json_rows import BAD_TEXT, fast_json
from sources.parquet import DAMAGED, open_parquet, parquet_rows, record_batches
from sources.text_formats import FIELDS, Unusable, remedy, row_text, text_field

BATCH_BYTES = 8 << 20
BATCH_ROWS = 10_000
FEW_SOURCES = 1000  # names of data sets that any file may have
COLUMN_ROWS = 1024  # rows of a parquet file that are looked at together


class Batch(NamedTuple):
    """n texts: at most BATCH_ROWS, and BATCH_BYTES of UTF-8 or one longer text."""

    texts: pa.LargeStringArray  # (n,); stripped; none is null or empty
    sources: pa.StringArray  # (n,); the data set of each text


def part_batches(part: Part, source: str, text_column: str | None) -> Iterator[Batch]:
    """The texts of an opened part; rows without a usable text are set aside."""
    if part.container == "parquet":
        return complete(_parquet(part, source, text_column), part)
    rows = complete(part_rows(part, fast_json), part)
    return _from_rows(rows, source, part.report, text_column)


def _from_rows(
    rows: Iterable[tuple[int, Row]], source: str, report: FileAside, text_column: str | None
) -> Iterator[Batch]:
    texts: list[bytes] = []
    size = 0
    for position, row in rows:
        try:
            text = row.strip() if isinstance(row, str) else row_text(row, text_column)
        except Unusable as reason:
            report.add(position, str(reason), row, remedy(str(reason)))
            continue
        data = text.encode()
        if texts and (size + len(data) > BATCH_BYTES or len(texts) == BATCH_ROWS):
            yield _batch(texts, source)
            texts, size = [], 0
        texts.append(data)
        size += len(data)
    if texts:
        yield _batch(texts, source)


def _batch(texts: list[bytes], source: str) -> Batch:
    ends = np.fromiter(map(len, texts), np.int64, len(texts)).cumsum()
    # Not pa.array or pa.scalar: they import pandas, which takes every worker half a second.
    starts = pa.py_buffer(np.append(0, ends))
    array = pa.LargeStringArray.from_buffers(len(texts), starts, pa.py_buffer(b"".join(texts)))
    return Batch(array, _repeated(source, len(texts)))


def _repeated(source: str, count: int) -> pa.StringArray:
    name = source.encode()
    starts = np.arange(count + 1, dtype=np.int32) * len(name)
    return pa.StringArray.from_buffers(count, pa.py_buffer(starts), pa.py_buffer(name * count))


def _parquet(part: Part, source: str, text_column: str | None) -> Iterator[Batch]:
    file = open_parquet(part.handle, part.report)
    if file is None:
        return
    names = file.schema_arrow.names
    try:
        field = text_field(names, text_column)
        if field and not _is_text(file.schema_arrow.field(field).type):
            raise Unusable(f"字段 {field} 不是文字")
    except Unusable as reason:
        _refuse_all(file, part, str(reason))
        return
    if field:
        yield from joined(_columns(file, part, field, source))
    else:
        columns = [name for name in names if name in FIELDS]
        rows = parquet_rows(file, part.report, part.start, part.end, columns)
        yield from _from_rows(rows, source, part.report, text_column)


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _refuse_all(file: pq.ParquetFile, part: Part, reason: str) -> None:
    """Set aside all rows of a part for one reason."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    count = sum(sizes[part.start : part.end])
    if count:
        first = sum(sizes[: part.start]) + 1
        part.report.add(first, reason, remedy=remedy(reason), rows=count)


def _rows_at_a_time(file: pq.ParquetFile, field: str) -> int:
    """How many rows hold about a batch of text, by the row group with the longest ones."""
    index = [column.path for column in file.metadata.schema].index(field)
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    mean = max((g.column(index).total_uncompressed_size / max(1, g.num_rows) for g in groups), default=1)
    # Texts that are stored once for many rows take more than it says: never very many.
    return int(np.clip(BATCH_BYTES / max(1, mean), 1, COLUMN_ROWS))


def _columns(file: pq.ParquetFile, part: Part, field: str, source: str) -> Iterator[Batch]:
    """The texts of one column, no Python object for each."""
    has_sources = field == "text" and _names_sources(file)
    columns, rows = [field, "source"] if has_sources else [field], _rows_at_a_time(file, field)
    for number, table in record_batches(file, part.report, part.start, part.end, columns, rows):
        texts, keep = _stripped(table.column(field), field, number, part.report)
        sources = _sources(table.column("source") if has_sources else None, source, len(texts))
        if not keep.all():
            texts, sources = texts.filter(pa.array(keep)), sources.filter(pa.array(keep))
        yield from _bounded(Batch(texts, sources))


def _names_sources(file: pq.ParquetFile) -> bool:
    """Whether the rows name the data set they came from, as those of our own clean files do.

    Others have a link or a title in `source`, another one in nearly every row: a data set for each would fill the
    report and the memory.
    """
    if set(file.schema_arrow.names) != {"text", "source"} or not file.num_row_groups:
        return False
    try:
        first = next(file.iter_batches(BATCH_ROWS, row_groups=[0], columns=["source"], use_threads=False), [])
    except DAMAGED:  # whoever reads the rows says so
        return True
    return not first or len(first["source"].unique()) <= max(FEW_SOURCES, first.num_rows // 2)


def _stripped(
    column: pa.Array, field: str, first: int, report: FileAside
) -> tuple[pa.LargeStringArray, np.ndarray]:
    """(n,) stripped texts, and (n,) which of them are usable; `first` is the number of the first row."""
    texts = column.cast(pa.large_string())
    is_valid = _is_valid_utf8(texts)
    if not is_valid.all():
        report.add(first + int(np.argmin(is_valid)), BAD_TEXT, rows=int((~is_valid).sum()))
        texts = pc.if_else(pa.array(is_valid), texts, "")
    texts = pc.utf8_trim_whitespace(texts)  # what Python's str.strip takes off
    is_full = _sizes(texts) > 0  # nulls take no bytes in what Arrow has computed
    is_empty = is_valid & ~is_full
    if is_empty.any():
        report.add(first + int(np.argmax(is_empty)), f"字段 {field} 为空", rows=int(is_empty.sum()))
    return texts, is_full


def _sizes(texts: pa.LargeStringArray) -> np.ndarray:
    """(n,) int64 bytes of each text; without Arrow's to_numpy, which imports pandas."""
    starts = np.frombuffer(texts.buffers()[1], np.int64)
    return np.diff(starts[texts.offset : texts.offset + len(texts) + 1])


def _is_valid_utf8(texts: pa.LargeStringArray) -> np.ndarray:
    """(n,) bool; Arrow takes from a parquet file what it finds there. True for nulls."""
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raw = texts.cast(pa.large_binary()).to_pylist()
        return np.array([value is None or is_utf8(value) for value in raw], bool)
    return np.ones(len(texts), bool)


def _sources(column: pa.Array | None, source: str, count: int) -> pa.StringArray:
    """(count,) the column's names, with `source` for those that are missing."""
    if column is None or not _is_text(column.type):
        return _repeated(source, count)
    names = column.cast(pa.large_string())
    names = pc.if_else(pa.array(_is_valid_utf8(names)), names, None)
    return pc.fill_null(names, source).cast(pa.string())


def _bounded(batch: Batch) -> Iterator[Batch]:
    """The batch in slices of at most BATCH_BYTES, or one text."""
    ends = _sizes(batch.texts).cumsum()  # (n,)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + BATCH_BYTES, side="right")))
        yield Batch(*(column.slice(start, end - start) for column in batch))
        start = end


def joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Small batches put together as long as the limits allow it."""
    group: list[Batch] = []
    size = rows = 0
    for batch in batches:
        more = batch.texts.nbytes
        if group and (size + more > BATCH_BYTES or rows + len(batch.texts) > BATCH_ROWS):
            yield _concatenated(group)
            group, size, rows = [], 0, 0
        group.append(batch)
        size, rows = size + more, rows + len(batch.texts)
    if group:
        yield _concatenated(group)


def _concatenated(group: list[Batch]) -> Batch:
    return Batch(*(pa.concat_arrays(columns) for columns in zip(*group, strict=True)))
