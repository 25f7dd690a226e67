"""Which duplicates and look-alikes stand where in a corpus."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from bench.background import Background
from bench.hard_negatives import (
    EMOJI,
    SCRIPTS,
    SIGNS,
    filled_template,
    in_script,
    only_from,
    templates,
    tiny_text,
)
from bench.near_copies import RATES, Change, cut_off, one_block, other_signs, same, scattered, traditional

LARGEST = 1000  # members of the largest groups, whatever the size of the corpus


class Kind(NamedTuple):
    """A way of planting groups: copies of one text, or different texts that are alike."""

    name: str
    share: float  # of all planted documents
    sizes: tuple[int, int]  # members of a group
    make: Change  # makes a member from the first one; of different texts, from nothing
    rate: float = 0.0  # of characters changed
    copies: bool = True


@dataclass
class Group:
    """Documents that were planted together; of copies, `rows[0]` is the original."""

    kind: str
    rate: float
    copies: bool
    rows: list[int]


@lru_cache(maxsize=1)
def kinds() -> dict[str, Kind]:
    """Everything that is planted, by name; the shares add up to 1."""
    few, pair, many = (2, 5), (2, 2), (LARGEST, LARGEST)
    every = [
        Kind("原样抄录", 0.05, few, same),
        *(Kind(f"零散改动 {rate:.0%}", 0.025, few, scattered, rate) for rate in RATES),
        *(Kind(f"整块改动 {rate:.0%}", 0.02, pair, one_block, rate) for rate in RATES),
        *(Kind(f"截短 {rate:.0%}", 0.015, pair, cut_off, rate) for rate in (0.1, 0.2, 0.3, 0.5)),
        Kind("标点与全半角", 0.04, few, other_signs),
        Kind("繁体", 0.04, pair, traditional),
        Kind("大簇", 0.075, many, scattered, 0.02),
        *(_different(f"模板：{n}", 0.2 / len(templates()), filled_template, n) for n in templates()),
        *(_different(f"文字：{n}", 0.01, in_script, n) for n in SCRIPTS),
        _different("只有表情", 0.01, only_from, EMOJI),
        _different("只有标点", 0.01, only_from, SIGNS),
        Kind("极短", 0.03, many, tiny_text, copies=False),
    ]
    return {kind.name: kind for kind in every}


def _different(name: str, share: float, write: Callable, of: object) -> Kind:
    """Texts that `write(of, random)` makes without an original."""

    def make(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
        return write(of, random)

    return Kind(name, share, (LARGEST, LARGEST), make, copies=False)


def plan_groups(documents: int, planted: float, random: np.random.Generator) -> list[Group]:
    """Groups of every kind at random rows; what does not fill a group stays unrelated."""
    free = random.permutation(documents)[: int(documents * planted)].tolist()
    total, groups = len(free), []
    for kind in kinds().values():
        room = round(total * kind.share)
        for size in group_sizes(kind, room, random):
            groups.append(Group(kind.name, kind.rate, kind.copies, free[-size:]))
            del free[-size:]
    return groups


def group_sizes(kind: Kind, room: int, random: np.random.Generator) -> list[int]:
    """Sizes of the groups that share `room` documents; different texts are one group."""
    least, most = kind.sizes
    if most == LARGEST:
        sizes = [min(room, LARGEST)] * (max(room // LARGEST, 1) if kind.copies else 1)
    else:
        sizes = random.integers(least, most + 1, room // least).tolist()
        sizes = [size for size, end in zip(sizes, np.cumsum(sizes), strict=True) if end <= room]
    return [size for size in sizes if size >= 2]
