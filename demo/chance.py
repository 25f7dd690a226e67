"""Random choices that give the same result on every Python version and platform."""

from __future__ import annotations

import random
from typing import TypeVar

T = TypeVar("T")


class Chance:
    """A thin layer over `random.Random.random`, whose sequence is guaranteed to be stable."""

    def __init__(self, seed: int, stream: int = 0) -> None:
        self._random = random.Random(seed * 1_000_003 + stream).random

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound)."""
        return int(self._random() * bound)

    def between(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return low + self.below(high - low + 1)

    def hit(self, probability: float) -> bool:
        """Return True with the given probability."""
        return self._random() < probability

    def pick(self, items: list[T] | tuple[T, ...]) -> T:
        """Return one element."""
        return items[self.below(len(items))]

    def shuffled(self, items: list[T] | tuple[T, ...]) -> list[T]:
        """Return a shuffled copy."""
        copy = list(items)
        for last in range(len(copy) - 1, 0, -1):
            other = self.below(last + 1)
            copy[last], copy[other] = copy[other], copy[last]
        return copy

    def some(self, items: list[T] | tuple[T, ...], count: int) -> list[T]:
        """Return up to `count` distinct positions of `items` in random order."""
        if count * 4 > len(items):
            return self.shuffled(items)[:count]
        chosen: list[int] = []
        while len(chosen) < count:
            index = self.below(len(items))
            if index not in chosen:
                chosen.append(index)
        return [items[index] for index in chosen]


class Deck:
    """Deals the items in shuffled rounds, so that all of them turn up equally often."""

    def __init__(self, items: list, chance: Chance) -> None:
        self.items, self.chance, self.left = list(items), chance, []

    def deal(self):
        """Return the next item."""
        if not self.left:
            self.left = self.chance.shuffled(self.items)
        return self.left.pop()
