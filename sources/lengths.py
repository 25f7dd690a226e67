"""How long instructions are, in characters and in tokens: percentiles, and a picture of their distribution."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import UNLIMITED, encode_chats
from sources.turns import Messages
from stage import atomic_path

PERCENTILES = (1, 10, 50, 90, 99, 100)
HEADER = ["长度", "最短", *(f"{p}%" for p in PERCENTILES[:-1]), "最长", "平均"]
AT_ONCE = 1000  # dialogues whose texts are encoded together
BINS = 60


def whole_dialogue(record: dict[str, Any]) -> Messages:
    """All messages of a record, its system text first; of a preference with the better answer."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    chosen = [{"role": "assistant", "content": record["chosen"]}] if "chosen" in record else []
    return [*system, *record["messages"], *chosen]


def token_counts(dialogues: Sequence[Messages], tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of each dialogue in the chat format, and how many of them bear loss, (n, 2) int64.

    Dialogues that a chat template refuses count as 0.
    """
    counts = np.zeros((len(dialogues), 2), np.int64)
    for start in range(0, len(dialogues), AT_ONCE):
        for row, encoded in enumerate(encode_chats(dialogues[start : start + AT_ONCE], tokenizer, UNLIMITED)):
            if isinstance(encoded, tuple):
                counts[start + row] = len(encoded[0]), sum(encoded[1])
    return counts


def summary(lengths: Iterable[int]) -> dict[str, float]:
    """Least, percentiles, longest and mean of lengths (n,), n > 0."""
    lengths = np.asarray(list(lengths) if not isinstance(lengths, np.ndarray) else lengths)
    # An observed length, not one between two.
    found = np.percentile(lengths, PERCENTILES, method="higher").tolist()
    return dict(zip(HEADER[1:], [int(lengths.min()), *map(int, found), float(lengths.mean())], strict=True))


def draw_lengths(panels: dict[str, dict[str, np.ndarray]], out: Path) -> None:
    """Draw a panel of histograms for every unit ("characters", "tokens"); lengths (n,) by name, on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 3.2 * len(panels)), dpi=110, layout="constrained", squeeze=False
    )
    for axis, (unit, series) in zip(axes[:, 0], panels.items(), strict=True):
        longest = max(int(lengths.max()) for lengths in series.values())
        edges = np.unique(np.geomspace(1, longest + 1, BINS).round())
        edges = edges if len(edges) > 1 else np.array([0.5, 1.5])
        for name, lengths in series.items():
            label = f"{name} (median {int(np.median(lengths)):,})"
            axis.hist(np.maximum(lengths, 1), edges, histtype="step", linewidth=1.5, label=label)
        axis.set_xscale("log")
        axis.set_xlabel(unit)
        axis.set_ylabel("samples")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with atomic_path(out) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
