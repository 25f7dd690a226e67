"""Lines that many documents share: page frames, notices, signatures. They are removed, the documents stay.

A line counts once per document. Counting works on hashes that lie on disk, a range of hash values at a time, so
that memory is bounded whatever the corpus.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from data_clean.shards import Shard
from data_clean.texts import Texts, frozen

LEAST_BYTES = (
    24  # of a line, eight Chinese characters: shorter ones, such as headings, recur for good reasons
)
HASHES = 1 << 25  # counted at a time


def line_hashes(texts: Texts) -> np.ndarray:
    """Hashes of the lines of every text, each once per text, (m,) uint64."""
    return _line_hashes(texts.data, texts.starts)


def frequent_lines(shards: Sequence[Shard], documents: int) -> np.ndarray:
    """Hashes of the lines that at least so many documents have, sorted, (k,) uint64."""
    columns = [shard.column("lines") for shard in shards]
    partitions = sum(map(len, columns)) // HASHES + 1
    found = [np.empty(0, np.uint64)]
    for partition in range(partitions):
        here = [column[column % np.uint64(partitions) == partition] for column in columns]
        values, counts = np.unique(np.concatenate(here), return_counts=True)
        found.append(values[counts >= documents])
    return np.sort(np.concatenate(found))


def without_lines(texts: Texts, lines: np.ndarray) -> tuple[Texts, np.ndarray]:
    """The texts without the lines of these hashes (sorted), and how many lines each lost, (n,) int64."""
    data, starts, lost = _without_lines(texts.data, texts.starts, lines)
    return frozen(data, starts), lost


@njit(cache=True, nogil=True)
def _line_end(data, start, end):
    """The position of the next line break, or the end."""
    while start < end and data[start] != 10:
        start += 1
    return start


@njit(cache=True, nogil=True)
def _hash_line(data, start, end):
    """FNV-1a with a finaliser, of the line without spaces and tabs around it; 0 for a short line."""
    while start < end and (data[start] == 32 or data[start] == 9):
        start += 1
    while start < end and (data[end - 1] == 32 or data[end - 1] == 9):
        end -= 1
    if end - start < LEAST_BYTES:
        return np.uint64(0)
    value = np.uint64(0xCBF29CE484222325)
    for i in range(start, end):
        value = (value ^ np.uint64(data[i])) * np.uint64(0x100000001B3)
    return value ^ (value >> np.uint64(32))


@njit(cache=True, nogil=True)
def _line_hashes(data, starts):
    hashes = np.empty(len(data) // LEAST_BYTES + 1, np.uint64)
    count = 0
    for text in range(len(starts) - 1):
        first, start = count, starts[text]
        while start < starts[text + 1]:
            end = _line_end(data, start, starts[text + 1])
            value = _hash_line(data, start, end)
            if value:
                hashes[count] = value
                count += 1
            start = end + 1
        unique = np.unique(hashes[first:count])
        hashes[first : first + len(unique)] = unique
        count = first + len(unique)
    return hashes[:count]


@njit(cache=True, nogil=True)
def _without_lines(data, starts, lines):
    out, new_starts = np.empty_like(data), np.zeros_like(starts)
    lost = np.zeros(len(starts) - 1, np.int64)
    size = 0
    for text in range(len(starts) - 1):
        start = starts[text]
        while start < starts[text + 1]:
            end = _line_end(data, start, starts[text + 1])
            value = _hash_line(data, start, end)
            place = np.searchsorted(lines, value) if value else len(lines)
            if place < len(lines) and lines[place] == value:
                lost[text] += 1
            else:
                stop = min(end + 1, starts[text + 1])
                out[size : size + stop - start] = data[start:stop]
                size += stop - start
            start = end + 1
        while lost[text] and size > new_starts[text] and out[size - 1] == 10:
            size -= 1  # the lines that followed are gone
        new_starts[text + 1] = size
    return out[:size], new_starts, lost
