"""Every document of a corpus, one after the other."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sources.aside import SetAside
from sources.files import OUR_OUTPUTS
from sources.pieces import read_batches, split_into_pieces


class Document(NamedTuple):
    """One text of the corpus and the data set it came from."""

    text: str
    source: str


def read_documents(
    path: Path, aside: SetAside, text_column: str | None = None, skip: tuple[Path, ...] = OUR_OUTPUTS
) -> Iterator[Document]:
    """Every document of a file or folder; rows without usable text go to `aside`."""
    for piece in split_into_pieces(path, skip, piece_bytes=sys.maxsize):  # whole files: rows have numbers
        for batch in read_batches(piece, aside, text_column):
            yield from map(Document, batch.texts.to_pylist(), batch.sources.to_pylist())
