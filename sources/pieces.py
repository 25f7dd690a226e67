"""Pieces of a corpus for worker processes, and the texts of a piece in batches of bounded size."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from sources.aside import SetAside
from sources.files import OUR_OUTPUTS, list_files, source_name
from sources.pretrain_text import Document, file_documents

PIECE_BYTES = 64 << 20
BATCH_BYTES = 8 << 20
BATCH_ROWS = 10_000


class Piece(NamedTuple):
    """Part of a file that one worker reads."""

    file: Path
    source: str  # the data set it belongs to
    start: int  # first byte (JSON lines, text), row group (parquet) or member (zip); 0 for whole files
    end: int | None  # behind the last one; None for the end of the file
    size: int  # bytes on disk it stands for


class Batch(NamedTuple):
    """Some texts of a piece, about BATCH_BYTES at most, or one document."""

    texts: pa.LargeStringArray  # stripped; none is null or empty
    sources: pa.StringArray  # the data set of each text


def split_into_pieces(
    path: Path, skip: tuple[Path, ...] = OUR_OUTPUTS, piece_bytes: int = PIECE_BYTES
) -> list[Piece]:
    """The pieces of all data files of a file or folder, in order; together they hold every row once."""
    return [
        Piece(file, source_name(file, path), 0, None, file.stat().st_size) for file in list_files(path, skip)
    ]


def read_batches(piece: Piece, aside: SetAside, text_column: str | None = None) -> Iterator[Batch]:
    """The texts of a piece, in order; rows without a usable text go to `aside`."""
    group: list[Document] = []
    size = 0
    for document in file_documents(piece.file, piece.source, aside, text_column):
        group.append(document)
        size += len(document.text) * (1 if document.text.isascii() else 3)
        if size >= BATCH_BYTES or len(group) >= BATCH_ROWS:
            yield _batch(group)
            group, size = [], 0
    if group:
        yield _batch(group)


def _batch(documents: list[Document]) -> Batch:
    texts, sources = zip(*documents, strict=True)
    return Batch(pa.array(texts, pa.large_string()), pa.array(sources, pa.string()))
