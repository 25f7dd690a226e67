"""Exact Jaccard similarity of the n-gram sets of keys."""

import numpy as np
from numba import njit

from data_clean.keys import Keys


def similarities(keys: Keys, pairs: np.ndarray, ngram: int) -> np.ndarray:
    """|A ∩ B| / |A ∪ B| of the sets of n-grams of two keys, (m, 2) positions -> (m,) float64; 0 if both are empty.

    A key that is shorter than `ngram` is one n-gram.
    """
    return _similarities(*keys, pairs, ngram)


@njit(cache=True, nogil=True)
def _similarities(codes, starts, pairs, ngram):
    longest = (starts[1:] - starts[:-1]).max()
    size = 1
    while size < 4 * longest + 4:
        size *= 2
    table, marks = np.empty(size, np.uint64), np.empty(size, np.uint8)
    values = np.empty(len(pairs))
    for i in range(len(pairs)):
        a, b = pairs[i]
        width = 1
        while width < 2 * (starts[a + 1] - starts[a] + starts[b + 1] - starts[b]) + 4:
            width *= 2
        table[:width] = 0
        first, _ = _enter(codes, starts[a], starts[a + 1], ngram, table[:width], marks, 0)
        second, common = _enter(codes, starts[b], starts[b + 1], ngram, table[:width], marks, 1)
        values[i] = common / (first + second) if first + second else 0.0
    return values


@njit(cache=True, nogil=True)
def _enter(codes, first, end, ngram, table, marks, mark):
    """Enter the n-grams of a key into a hash table; returns how many are new, and how many another key entered.

    marks: by slot the key that was last there.
    """
    size = min(ngram, end - first)
    new, common = 0, 0
    if size <= 0:
        return new, common
    bits = np.uint64(len(table) - 1)
    for i in range(first, end - size + 1):
        gram = np.uint64(0)
        for j in range(size):  # up to three code points of 21 bits are told apart without fail
            mixed = gram if size <= 3 else (gram ^ (gram >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
            gram = (mixed << np.uint64(21)) ^ (mixed >> np.uint64(43)) ^ np.uint64(codes[i + j])
        slot = ((gram * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(32)) & bits
        while table[slot] and table[slot] != gram:
            slot = (slot + np.uint64(1)) & bits
        if not table[slot]:
            table[slot] = gram
            new += 1
        elif marks[slot] != mark:
            common += 1
        marks[slot] = mark
    return new, common
