"""The truth that near-duplicate removal is measured against: exact Jaccard similarities, by simple means.

Texts are compared by the sets of character 3-grams of `comparison_key`, the definition of what counts in a
text; nothing else here is shared with the engines.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numba import njit


class Pairs(NamedTuple):
    """Pairs of documents and how similar they are."""

    one: np.ndarray  # (pairs,) int64, the smaller row
    other: np.ndarray  # (pairs,) int64
    jaccard: np.ndarray  # (pairs,) float64


def shingles(key: str, size: int = 3) -> set[str]:
    """The character n-grams of a key; a key shorter than that is its only one, an empty one has none."""
    return {key[start : start + size] for start in range(max(len(key) - size + 1, min(len(key), 1)))}


def jaccard(one: set[str], other: set[str]) -> float:
    """Size of the intersection over that of the union; 0 if both are empty."""
    return len(one & other) / max(len(one | other), 1)


def all_pairs(keys: Iterable[str], least: float) -> Pairs:
    """All pairs of documents with at least this similarity, which is above 0.

    Memory and time grow with the square of the corpus: for some ten thousand documents.
    """
    sets = [shingles(key) for key in keys]
    number: dict[str, int] = {}
    flat = [number.setdefault(shingle, len(number)) for members in sets for shingle in members]
    members = np.array(flat, np.int64)
    starts = np.cumsum([0, *map(len, sets)])
    documents = np.repeat(np.arange(len(sets)), np.diff(starts))
    order = np.argsort(members, kind="stable")
    posting_starts = np.searchsorted(members[order], np.arange(len(number) + 1))
    one, other, similarity = _count_common(members, starts, documents[order], posting_starts, least)
    return Pairs(np.array(one[1:], np.int64), np.array(other[1:], np.int64), np.array(similarity[1:]))


@njit(cache=True, nogil=True)
def _count_common(members, starts, postings, posting_starts, least):
    """For each document the n-grams shared with every later one, through the inverted index."""
    documents = len(starts) - 1
    one, other, similarity = [0], [0], [0.0]  # a first entry tells numba the types
    common = np.zeros(documents, np.int64)
    for document in range(documents):
        common[document:] = 0
        for member in members[starts[document] : starts[document + 1]]:
            position = posting_starts[member + 1] - 1
            while postings[position] > document:
                common[postings[position]] += 1
                position -= 1
        size = starts[document + 1] - starts[document]
        for later in range(document + 1, documents):
            union = size + starts[later + 1] - starts[later] - common[later]
            value = common[later] / max(union, 1)
            if value >= least:
                one.append(document)
                other.append(later)
                similarity.append(value)
    return one, other, similarity
