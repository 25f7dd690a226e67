"""In which order the windows of several files are drawn: shares that may change on the way, and permutations.

Everything is a pure function of the number of the draw, in exact integers: nothing has to be saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np


@dataclass
class Phase:
    """From `begin` on (a step, or a draw), files are drawn in proportion to these whole numbers."""

    begin: int
    weights: Sequence[int]


class Mixture:
    """Draws from files of windows; each is walked through a permutation, and another when it is used up."""

    def __init__(self, sizes: Sequence[int], phases: Sequence[Phase], seed: int):
        """sizes: windows of each file. phases: by the first draw; the first begins at 0."""
        self.sizes, self.phases, self.seed = list(sizes), list(phases), seed
        self.firsts = np.cumsum([0, *sizes])  # index of the first window of each file

    def counts(self, draws: int) -> list[int]:
        """How many of the first `draws` are of each file: within each phase, as exactly as whole numbers allow."""
        totals = [0] * len(self.sizes)
        ends = [phase.begin for phase in self.phases[1:]] + [draws]
        for phase, end in zip(self.phases, ends, strict=True):
            seats = apportion(max(0, min(draws, end) - phase.begin), phase.weights)
            totals = [a + b for a, b in zip(totals, seats, strict=True)]
        return totals

    def draw(self, first: int, last: int) -> np.ndarray:
        """Indices of the windows of draws first … last - 1, file by file, (last - first,)."""
        parts = []
        for file, (a, b) in enumerate(zip(self.counts(first), self.counts(last), strict=True)):
            n, places = self.sizes[file], np.arange(a, b)
            for epoch in np.unique(places // n) if b > a else ():
                order = permute(places[places // n == epoch] % n, n, (self.seed, file, int(epoch)))
                parts.append(self.firsts[file] + order)
        return np.concatenate(parts)


def apportion(seats: int, weights: Sequence[int]) -> list[int]:
    """Divide seats in proportion to whole weights, by Webster's method (https://en.wikipedia.org/wiki/Webster_method).

    Seat k of a file (from 0) is due at (2k + 1) / weight, and the seats go in that order, ties to the earlier
    file. More seats therefore take none away from anyone, which rounding the shares would not guarantee, and
    every count stays near seats * weight / sum(weights) however many there are.
    """
    total = sum(weights)
    counts = [(2 * w * seats + total) // (2 * total) for w in weights]  # all seats due by 2 * seats / total
    while sum(counts) < seats:
        due = [(Fraction(2 * c + 1, w), f) for f, (c, w) in enumerate(zip(counts, weights, strict=True)) if w]
        counts[min(due)[1]] += 1
    while sum(counts) > seats:
        due = [(Fraction(2 * c - 1, w), f) for f, (c, w) in enumerate(zip(counts, weights, strict=True)) if c]
        counts[max(due)[1]] -= 1
    return counts


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in exactly the proportions of their decimal notation."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * scale) for fraction in fractions]


def permute(positions: np.ndarray, n: int, key: int | Sequence[int]) -> np.ndarray:
    """Where these positions of 0 … n-1 go in a random permutation that is never stored.

    A four-round Feistel network on the next even number of bits is a bijection; what lands at n or beyond is
    sent through again until it lands inside ("cycle walking", https://doi.org/10.1007/3-540-45760-7_9).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng(key).integers(1, 2**63, size=4, dtype=np.uint64)

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around: a multiplicative hash
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(17) & mask)
        return (left << np.uint64(half)) | right

    out = shuffle(positions.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = shuffle(out[outside])
    return out.astype(np.int64)
