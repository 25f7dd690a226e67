"""Pieces of a corpus for worker processes, and the texts of a piece in batches of bounded size."""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import pyarrow.parquet as pq

from sources.aside import SetAside
from sources.batches import Batch, joined, part_batches
from sources.containers import is_csv, open_parts
from sources.detect import HEAD, detect
from sources.files import OUR_OUTPUTS, list_files, source_name
from sources.parquet import DAMAGED as PARQUET_DAMAGED
from sources.streams import DAMAGED, is_plain, is_zip, open_file, open_zip, zip_members

__all__ = ["PIECE_BYTES", "Batch", "Piece", "grouped", "read_batches", "read_together", "split_into_pieces"]
PIECE_BYTES = 64 << 20


class Piece(NamedTuple):
    """Part of a file that one worker reads."""

    file: Path
    source: str  # the data set it belongs to
    start: int  # first byte (JSON lines, text), row group (parquet) or member (zip); 0 for whole files
    end: int | None  # behind the last one; None for the end of the file
    size: int  # bytes on disk it stands for


def split_into_pieces(
    path: Path, skip: Iterable[Path] = OUR_OUTPUTS, piece_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """The pieces of all data files of a file or folder, in order; together they hold every row once.

    What cannot be split (compressed files, JSON arrays, CSV) is one piece, whatever its size, and so is what cannot
    be read: it is reported by who reads it. Raises UserError if there are no files.
    """
    return [piece for file in list_files(path, skip) for piece in _split(file, path, piece_bytes)]


def read_batches(piece: Piece, aside: SetAside, text_column: str | None = None) -> Iterator[Batch]:
    """The texts of a piece, in order; rows without a usable text go to `aside`."""
    for part in open_parts(piece.file, aside, piece.start, piece.end, is_csv(piece.file)):
        yield from part_batches(part, piece.source, text_column)


class Sized(Protocol):
    """Anything with a number of bytes."""

    @property
    def size(self) -> int: ...


S = TypeVar("S", bound=Sized)


def grouped(pieces: Iterable[S], limit: int) -> list[list[S]]:
    """Neighbours put together up to `limit` bytes: of many small files each would cost as much as a large one."""
    groups: list[list[S]] = []
    size = 0
    for piece in pieces:
        if not groups or size + piece.size > limit:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.size
    return groups


def read_together(
    pieces: Sequence[Piece], aside: SetAside, text_column: str | None = None
) -> Iterator[Batch]:
    """The texts of several pieces, in order, as `read_batches`; a batch may hold those of many pieces."""
    return joined(batch for piece in pieces for batch in read_batches(piece, aside, text_column))


def _split(file: Path, root: Path, piece_bytes: int) -> list[Piece]:
    whole = Piece(file, source_name(file, root), 0, None, file.stat().st_size)
    try:
        if is_zip(file):
            return _split_zip(file, root, piece_bytes) or [whole]
        if whole.size > piece_bytes:
            with open_file(file) as handle:
                return _split_plain(handle, whole, piece_bytes) or [whole]
    except (*DAMAGED, *PARQUET_DAMAGED):
        pass  # whoever reads it says what is wrong
    return [whole]


def _split_plain(handle: io.BufferedReader, whole: Piece, piece_bytes: int) -> list[Piece]:
    """Byte ranges or row groups; nothing where a file has to be read from its beginning."""
    container = detect(handle.peek(HEAD)[:HEAD], is_csv(whole.file)).container if is_plain(handle) else ""
    if container == "parquet":
        sizes = _group_sizes(pq.ParquetFile(handle).metadata)
        return [whole._replace(start=a, end=b, size=size) for a, b, size in _runs(sizes, piece_bytes)]
    if container in ("lines", "text"):
        count = -(-whole.size // piece_bytes)
        bounds = [whole.size * index // count for index in range(count + 1)]
        pieces = [whole._replace(start=a, end=b, size=b - a) for a, b in pairwise(bounds)]
        return [*pieces[:-1], pieces[-1]._replace(end=None)]
    return []


def _group_sizes(metadata: pq.FileMetaData) -> list[int]:
    """Bytes on disk of every row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    return [sum(g.column(index).total_compressed_size for index in range(g.num_columns)) for g in groups]


def _split_zip(file: Path, root: Path, piece_bytes: int) -> list[Piece]:
    """Members next to each other that belong to one data set, up to `piece_bytes` together."""
    with open_zip(file) as archive:
        members = zip_members(archive)
    pieces: list[Piece] = []
    first = 0
    for source, group in groupby(members, lambda member: source_name(member.path, root)):
        sizes = [member.info.compress_size for member in group]
        runs = _runs(sizes, piece_bytes)
        pieces += [Piece(file, source, first + a, first + b, size) for a, b, size in runs]
        first += len(sizes)
    return pieces


def _runs(sizes: list[int], limit: int) -> list[tuple[int, int, int]]:
    """(start, end, sum of sizes) of runs of items that reach the limit with their last item."""
    runs, start, total = [], 0, 0
    for index, size in enumerate(sizes, 1):
        total += size
        if total >= limit or index == len(sizes):
            runs.append((start, index, total))
            start, total = index, 0
    return runs
