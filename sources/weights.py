"""How often each source of a mixture is taken: `name=number`, the same for a corpus and for instructions."""

from collections.abc import Iterable, Sequence

import numpy as np

from sources.token_runs import MOST_COPIES, mix
from stage import UserError


def parse_weights(entries: Sequence[str]) -> dict[str, float]:
    """Weight by source, from `name=number`."""
    weights = {}
    for entry in entries:
        name, _, number = entry.rpartition("=")
        try:
            weights[name] = float(number)
        except ValueError:
            weights[name] = float("nan")
        if not (name and 0 < weights[name] <= MOST_COPIES):
            raise UserError(
                f"--weights 的每一项写成 来源=遍数，遍数大于 0 且不超过 {MOST_COPIES}，现在是 {entry}；"
                "不想要的来源请移出语料文件夹。"
            )
    return weights


def check_names(weights: dict[str, float], names: Iterable[str]) -> None:
    """Raise UserError for a weight of a source that is not there."""
    if unknown := set(weights) - set(names):
        raise UserError(f"--weights 里的来源 {'、'.join(unknown)} 不存在；有的来源：{'、'.join(names)}。")


def draw_copies(hashes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often documents are trained on, (n,): the whole part of the weight, and once more with its fraction.

    The hash of the text draws, so that the choice is the same whatever else is in the corpus.
    """
    drawn = mix(hashes) / 2.0**64  # mixed: the hash itself decides about validation
    return np.floor(weights).astype(np.int64) + (drawn < weights % 1)
