"""Parquet by row groups: damage costs the rest of a group, not of the file."""

import io
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sources.aside import FileAside
from sources.detect import HEAD
from sources.json_rows import BAD_TEXT
from sources.streams import is_plain

BUFFER = 1 << 20  # bytes of a column that are read at a time
ROWS = 256  # rows turned into Python objects at a time
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError)


def open_parquet(handle: io.BufferedReader, report: FileAside) -> pq.ParquetFile | None:
    """None, with an entry in the report, if it cannot be read.

    Parquet is read from its end: a compressed file is unpacked into a temporary one first.
    """
    source = handle if is_plain(handle) else _temporary_copy(handle)
    try:
        # buffer_size: pages are read as they are needed, not whole row groups.
        return pq.ParquetFile(source, buffer_size=BUFFER, pre_buffer=False)
    except DAMAGED as error:
        source.close()
        _report(report, 1, error)
    return None


def _temporary_copy(handle: io.BufferedReader) -> IO[bytes]:
    """A file with all that can be read, deleted when it is closed; raises as reading does."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (who asks for it closes it)
    try:
        shutil.copyfileobj(handle, copy, HEAD)
    except BaseException:
        copy.close()
        raise
    return copy


def _report(report: FileAside, number: int, error: Exception, rows: int = 1) -> None:
    report.add(
        number, "parquet 损坏，从这里起（至多到这一组行的末尾）读不到", str(error), "重新下载该文件", rows
    )


def record_batches(
    file: pq.ParquetFile,
    report: FileAside,
    start: int = 0,
    end: int | None = None,
    columns: Sequence[str] | None = None,
    batch_rows: int = ROWS,
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(number of its first row, batch) of the row groups [start, end)."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    for group in range(len(sizes))[start:end]:
        number = sum(sizes[:group]) + 1
        behind = number + sizes[group]
        try:
            for batch in file.iter_batches(
                batch_rows, row_groups=[group], columns=columns, use_threads=False
            ):
                yield number, batch
                number += batch.num_rows
        except DAMAGED as error:
            _report(report, number, error, behind - number)


def parquet_rows(
    file: pq.ParquetFile,
    report: FileAside,
    start: int = 0,
    end: int | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbered rows of the row groups [start, end)."""
    for number, batch in record_batches(file, report, start, end, columns):
        try:
            yield from enumerate(batch.to_pylist(), number)
        except (ValueError, OverflowError, pa.ArrowException):
            yield from _one_by_one(batch, number, report)


def _one_by_one(batch: pa.RecordBatch, first: int, report: FileAside) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch of which some cannot be turned into Python objects."""
    for index in range(batch.num_rows):
        try:
            yield first + index, batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            report.add(first + index, BAD_TEXT)
        except (ValueError, OverflowError, pa.ArrowException) as error:
            report.add(first + index, "parquet 里有无法转换的值", str(error))
