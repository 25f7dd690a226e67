"""Documents on disk between the steps of cleaning: their texts in one file, what is known of them in columns.

A shard is a folder of flat arrays, so that a step maps only the columns it needs, and can fetch single texts.
Its documents are ordered by a random number below SLOTS: part k of the output is the k-th range of slots of all
shards, and reading that is half of a shuffle that never has the corpus in memory.
"""

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np

from data_clean.signatures import Signatures
from data_clean.texts import Texts, arranged

TEXT = "text.bin"
SLOTS = 4096  # the most parts that the output can have


class Documents(NamedTuple):
    """Some documents on their way through the steps."""

    texts: Texts
    sources: np.ndarray  # (n,) objects: names of data sets
    order: np.ndarray  # (n,) uint64, ascending through the whole corpus

    def where(self, keep: np.ndarray) -> "Documents":
        """Those that are marked, (n,) bool."""
        if keep.all():
            return self
        kept = np.flatnonzero(keep)
        return Documents(self.texts.take(kept), self.sources[kept], self.order[kept])


class Shard:
    """A folder written by `write_shard`; every column is memory-mapped when it is asked for."""

    def __init__(self, folder: Path, sources: Sequence[str], is_reference: bool = False) -> None:
        """sources: names behind the codes of the column "source". is_reference: never written, only compared with."""
        self.folder, self.sources, self.is_reference = folder, list(sources), is_reference
        self.count = len(self.column("order"))

    @property
    def bytes(self) -> int:
        return (self.folder / TEXT).stat().st_size

    def column(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def texts(self, where: slice = slice(None)) -> Texts:
        """The texts at these positions; they are mapped, only their starts are read."""
        first, end, _ = where.indices(self.count)
        starts = np.array(self.column("starts")[first : end + 1])
        data = np.asarray(np.memmap(self.folder / TEXT, np.uint8, "r"))
        return Texts(data, starts).slice(0, end - first)

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of each document, (count,)."""
        return np.diff(self.column("starts"))

    def source_names(self, where: slice = slice(None)) -> np.ndarray:
        """The data set of the documents at these positions, (n,) objects."""
        return np.array(self.sources, object)[self.column("source")[where]]

    def slot_of(self) -> np.ndarray:
        """Slot of each document, (count,)."""
        return np.repeat(np.arange(SLOTS), np.diff(self.column("slots")))

    def part(self, number: int, parts: int) -> slice:
        """The documents that go to this of so many parts of the output."""
        ends = self.column("slots")
        return slice(*(int(ends[SLOTS * k // parts]) for k in (number, number + 1)))


def write_shard(
    folder: Path,
    batches: Sequence[Documents],
    signatures: Sequence[Sequence[np.ndarray]],
    slot_of: np.ndarray,
) -> list[str]:
    """Write documents as a shard.

    signatures: of each batch the columns of `Signatures`, or nothing. slot_of: (n,) slot of each document. Returns the
    names of the data sets, behind the codes in the column "source".
    """
    folder.mkdir()
    order, parts = np.argsort(slot_of, kind="stable"), [batch.texts for batch in batches]
    texts = arranged(parts, order)
    texts.data.tofile(folder / TEXT)
    sources = np.concatenate([batch.sources for batch in batches])
    names = sorted(set(sources))
    code_of = {name: code for code, name in enumerate(names)}
    codes = np.array([code_of[name] for name in sources], np.uint32)
    columns = {
        "order": np.concatenate([batch.order for batch in batches]),
        "source": codes,
        "length": np.concatenate([part.characters for part in parts]).astype(np.uint32),
    }
    # Without a method's signatures, its columns are empty.
    for name, columns_of in zip(Signatures._fields, zip(*signatures, strict=True), strict=False):
        if len(column := np.concatenate(columns_of)):
            columns[name] = column
    for name, column in columns.items():
        # Band keys are read band by band, everything else document by document.
        np.save(folder / f"{name}.npy", column[order].T.copy() if name == "bands" else column[order])
    np.save(folder / "starts.npy", texts.starts)
    np.save(folder / "slots.npy", np.searchsorted(slot_of[order], np.arange(SLOTS + 1)))
    return names


class Corpus:
    """Shards as one sequence of numbered documents."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        # The number of each shard's first document, and of the last one's end.
        self.firsts = np.cumsum([0, *(shard.count for shard in shards)])
        # Opening a file costs more than reading a text from it.
        self._column = cache(lambda shard, name: self.shards[shard].column(name))
        self._open_text = lru_cache(maxsize=64)(lambda shard: (self.shards[shard].folder / TEXT).open("rb"))
        self._lock = Lock()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def by_shard(self, flags: np.ndarray) -> Iterator[tuple[Shard, np.ndarray]]:
        """Every shard with its part of an array that has a value for each document."""
        for shard, first in zip(self.shards, self.firsts, strict=False):
            yield shard, flags[first : first + shard.count]

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Rows of a column for documents in any order, (m, ...)."""
        order = np.argsort(numbers, kind="stable")
        parts = [self._column(shard, name)[local] for shard, local in self._by_shard(numbers[order])]
        ordered = np.concatenate([self._column(0, name)[:0], *parts])
        result = np.empty_like(ordered)
        result[order] = ordered
        return result

    def texts(self, numbers: np.ndarray) -> Texts:
        """Texts of documents given in ascending order.

        They are read, not mapped: a process whose address space is limited can have a corpus of any size.
        """
        parts = []
        for shard, local in self._by_shard(numbers):
            starts = self._column(shard, "starts")
            with self._lock:  # one position in each file
                file = self._open_text(shard)
                for start, end in zip(starts[local].tolist(), starts[local + 1].tolist(), strict=True):
                    file.seek(start)
                    parts.append(file.read(end - start))
        sizes = np.array([0, *map(len, parts)], np.int64)
        return Texts(np.frombuffer(b"".join(parts), np.uint8), sizes.cumsum())

    def source_names(self, numbers: np.ndarray) -> np.ndarray:
        """Names of the data sets of documents in ascending order, (m,) objects."""
        parts = [
            np.array(self.shards[shard].sources, object)[self._column(shard, "source")[local]]
            for shard, local in self._by_shard(numbers)
        ]
        return np.concatenate([np.empty(0, object), *parts])

    def is_reference(self, numbers: np.ndarray) -> np.ndarray:
        """Whether documents only serve to be compared with, (m,) bool."""
        flags = np.array([shard.is_reference for shard in self.shards], bool)
        return flags[np.searchsorted(self.firsts, numbers, side="right") - 1]

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Ascending document numbers as (shard, positions in it)."""
        cuts = np.searchsorted(numbers, self.firsts)
        for shard in np.flatnonzero(np.diff(cuts)).tolist():
            yield shard, numbers[cuts[shard] : cuts[shard + 1]] - self.firsts[shard]
