"""Tokenised documents on disk, shuffled by an external sort: memory does not grow with the corpus.

Every document draws a random number, and the corpus is put in the order of these numbers. Worker processes
write runs: some ten million tokens of whole documents, sorted. Afterwards all runs are read side by side, one
range of numbers after the other, each just large enough to be sorted in memory. The numbers depend on the seed
and on the place of a document in the corpus, not on who read it when.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

RUN_BYTES = 64 << 20  # ids that a worker holds before it writes a run
RANGE_BYTES = 64 << 20  # ids read at a time when the runs are put together; as much again for sorting them
SAMPLE_TOKENS = 1 << 16  # one number is looked at for so many tokens to find ranges of equal size

ENTRY = np.dtype(
    [
        ("order", "<u8"),  # where the document goes; no two are equal
        ("hash", "<u8"),  # of its text
        ("tokens", "<u4"),  # with its <eos>
        ("characters", "<u4"),
        ("bytes", "<u4"),
        ("source", "<u4"),  # position in a list of names
        ("copy", "<i2"),  # 0, 1, … of a document that is trained on repeatedly, or NOT_TRAINED
    ]
)
NOT_TRAINED = -1  # its source is sampled without it; it may still validate
MOST_COPIES = 63  # copies, tasks and documents of a task share the 64 bits of `order`
TASK_BITS, DOCUMENT_BITS = 22, 36


class Run(NamedTuple):
    """Two files: the entries of documents sorted by `order`, and their ids one behind the other."""

    entries: Path
    ids: Path
    names: np.ndarray  # (sources of its task,) position of each in the list of all sources


class RunWriter:
    """Collects the documents of a task and writes them in runs."""

    def __init__(self, folder: Path, task: int, seed: int | None) -> None:
        """task: its number. seed: of the shuffle; None to keep the order of the corpus."""
        self.folder, self.task, self.seed = folder, task, seed
        self.entries: list[np.ndarray] = []
        self.ids, self.dtype = bytearray(), np.dtype(np.uint16)
        self.runs = 0

    def add(self, entries: np.ndarray, numbers: np.ndarray, copies: np.ndarray, ids: np.ndarray) -> None:
        """Take documents, (n,) ENTRY without `order` and `copy`, and their ids, one behind the other.

        numbers: (n,) place of each in the task. copies: (n,) how often each is trained on.
        """
        times = np.maximum(copies, 1)
        which = np.repeat(np.arange(len(entries)), times)
        copy = np.arange(len(which)) - np.repeat(starts_of(times)[:-1], times)
        copied = entries[which]
        copied["copy"] = np.where(copies[which] > 0, copy, NOT_TRAINED)
        copied["order"] = order_numbers(self.task, numbers[which], copy, self.seed)
        if len(which) > len(entries):
            ids = gather(ids, starts_of(entries["tokens"]), which)
        self.entries.append(copied)
        self.ids += np.ascontiguousarray(ids).data
        self.dtype = ids.dtype
        if len(self.ids) >= RUN_BYTES:
            self._write()

    def close(self) -> int:
        """Write what is left; returns the number of runs."""
        if self.entries:
            self._write()
        return self.runs

    def _write(self) -> None:
        entries, ids = np.concatenate(self.entries), np.frombuffer(self.ids, self.dtype)
        order = np.argsort(entries["order"])
        parts = entries[order], gather(ids, starts_of(entries["tokens"]), order)
        for path, part in zip(run_paths(self.folder, self.runs), parts, strict=True):
            with open(path, "wb") as handle:
                handle.write(part.data)
        self.entries, self.ids = [], bytearray()
        self.runs += 1


def run_paths(folder: Path, number: int) -> tuple[Path, Path]:
    """The files of a task's run: entries and ids."""
    return folder / f"{number:04d}.entries", folder / f"{number:04d}.ids"


def order_numbers(task: int, numbers: np.ndarray, copies: np.ndarray, seed: int | None) -> np.ndarray:
    """Where documents go, (n,) uint64, all different: at random, or with seed None copy by copy in corpus order."""
    place = copies.astype(np.uint64) << np.uint64(TASK_BITS + DOCUMENT_BITS)
    place += np.uint64(task << DOCUMENT_BITS) + numbers.astype(np.uint64)
    if seed is None:
        return place
    # Both steps are bijections of 64 bits, so different places get different numbers.
    start = np.random.default_rng(seed).integers(0, 2**64, dtype=np.uint64)
    return mix(place * np.uint64(0x9E3779B97F4A7C15) + start)


def mix(x: np.ndarray) -> np.ndarray:
    """Spread 64 bits over each other (SplitMix64's finaliser, https://doi.org/10.1145/2714064.2660195)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def starts_of(sizes: np.ndarray) -> np.ndarray:
    """Where things of these sizes begin when one lies behind the other, (n + 1,) int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def gather(ids: np.ndarray, starts: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The documents at these positions, in this order; document i is ids[starts[i] : starts[i + 1]]."""
    buffers = [None, pa.py_buffer(starts * ids.itemsize), pa.py_buffer(np.ascontiguousarray(ids))]
    documents = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(starts) - 1, buffers)
    data = documents.take(pa.array(order, pa.int64())).buffers()[2]
    return np.frombuffer(data or b"", ids.dtype, count=int(np.diff(starts)[order].sum()))


def read_entries(run: Run, first: int = 0, end: int = -1) -> np.ndarray:
    """Entries `first` to `end` (all without them), (n,) ENTRY with `source` in the list of all sources."""
    count = end - first if end >= 0 else -1
    entries = np.fromfile(run.entries, ENTRY, count, offset=first * ENTRY.itemsize)
    entries["source"] = run.names[entries["source"]]
    return entries


def documents_below(
    runs: Sequence[Run], limit: int, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The documents of each run whose hash is below `limit`, without copies: entries, and their ids."""
    for run in runs:
        entries = read_entries(run)
        starts = starts_of(entries["tokens"])
        chosen = np.flatnonzero((entries["hash"] < limit) & (entries["copy"] <= 0))
        with open(run.ids, "rb") as handle:
            parts = [np.empty(0, dtype)]
            for i in chosen.tolist():
                handle.seek(starts[i] * dtype.itemsize)
                parts.append(np.fromfile(handle, dtype, entries["tokens"][i]))
        yield entries[chosen], np.concatenate(parts)


def in_order(
    runs: Sequence[Run], least_hash: int, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All training documents (hash at least `least_hash`) in their final order: entries, and their ids."""
    cuts = range_cuts(runs, dtype)
    for begin, end in pairwise(cuts):
        used = [(run, a, b) for run, a, b in zip(runs, begin, end, strict=True) if a[0] < b[0]]
        if not used:
            continue
        entries = np.concatenate([read_entries(run, a[0], b[0]) for run, a, b in used])
        ids = np.empty(entries["tokens"].sum(dtype=np.int64), dtype)
        filled = 0
        for run, (_, first), (_, stop) in used:
            with open(run.ids, "rb") as handle:
                handle.seek(first * dtype.itemsize)
                handle.readinto(ids[filled : filled + stop - first].data)
            filled += stop - first
        order = np.argsort(entries["order"])
        order = order[(entries["hash"][order] >= least_hash) & (entries["copy"][order] >= 0)]
        yield entries[order], gather(ids, starts_of(entries["tokens"]), order)


def range_cuts(runs: Sequence[Run], dtype: np.dtype) -> np.ndarray:
    """Where ranges of about RANGE_BYTES begin and end in every run, (ranges + 1, runs, 2): entry and token."""
    samples, total = [np.empty(0, np.uint64)], 0
    for run in runs:
        entries = read_entries(run)
        ends = np.cumsum(entries["tokens"], dtype=np.int64)
        samples.append(entries["order"][np.searchsorted(ends, np.arange(0, ends[-1], SAMPLE_TOKENS))])
        total += int(ends[-1])
    ranges = total * dtype.itemsize // RANGE_BYTES + 1
    sample = np.sort(np.concatenate(samples))
    borders = sample[np.arange(1, ranges) * len(sample) // ranges]
    cuts = np.empty((ranges + 1, len(runs), 2), np.int64)
    for i, run in enumerate(runs):
        entries = read_entries(run)
        firsts = np.concatenate([[0], np.searchsorted(entries["order"], borders), [len(entries)]])
        cuts[:, i, 0], cuts[:, i, 1] = firsts, starts_of(entries["tokens"])[firsts]
    return cuts
