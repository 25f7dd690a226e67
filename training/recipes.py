"""Recipes: the settings that decide how well a model learns from a number of tokens (docs/recipe.md).

`--recipe NAME` fills in every such setting that was left open (None in training/config.py).
"""

import math
from dataclasses import replace
from typing import Any, TypeVar

from training.config import TrainConfig

TIMESCALE = 1.0  # weights forget what is older than this part of the run

RECIPES: dict[str, dict[str, Any]] = {
    "muon": dict(
        optimizer="muon",
        lr=0.01,
        table_lr=0.02,
        min_lr=0.0,
        warmup=50,
        schedule="wsd",
        decay_fraction=0.5,
        beta1=0.9,
        beta2=0.99,
        clip=1.0,
    ),
    # What the original project trained with, but for the warm-up, which is cut in short runs.
    "original": dict(
        optimizer="adamw",
        batch_tokens=32 * 512,
        lr=3e-4,
        min_lr=1e-5,
        weight_decay=0.1,
        warmup=1000,
        schedule="cosine",
        decay_fraction=0.2,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
    ),
    # A trained model on new data: rates rise again, to a third of those it was trained with, and fall again, so that it
    # learns the new and forgets little of the old (https://arxiv.org/abs/2403.08763). AdamW, because that is what the
    # published models were trained with: Muon then gains nothing, or loses (https://arxiv.org/abs/2502.16982 compares
    # fine-tuning).
    "continued": dict(
        optimizer="adamw",
        lr=1e-4,
        min_lr=1e-5,
        weight_decay=0.1,
        warmup=100,
        schedule="cosine",
        decay_fraction=0.2,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
    ),
}

Config = TypeVar("Config", bound=TrainConfig)


def settle(cfg: Config, total: int, batch_tokens: int | None) -> Config:
    """The settings with what was left open filled in from the recipe, fit to this run.

    total: steps. batch_tokens: of a step over all processes; None: the recipe's rates are not scaled.
    """
    recipe = RECIPES[cfg.recipe]
    filled = {name: value for name, value in recipe.items() if getattr(cfg, name, 0) is None}
    if "warmup" in filled:
        filled["warmup"] = min(filled["warmup"], total // 10)
    if cfg.recipe == "muon" and batch_tokens:
        for name in {"lr", "table_lr"} & filled.keys():
            filled[name] *= rate_scale(batch_tokens, total)
    settled = replace(cfg, **filled)
    if settled.table_lr is None:
        settled.table_lr = settled.lr
    if settled.weight_decay is None:
        # lr * weight_decay is the part of a weight that a step forgets, 1 / timescale
        # (https://arxiv.org/abs/2405.13698).
        settled.weight_decay = 1 / (TIMESCALE * total * settled.lr)
    settled.check()
    return settled


def good_batch(data_tokens: float) -> float:
    """Tokens of a step beyond which larger batches stop saving steps: they grow about as the square root of the
    tokens trained on, and hardly with the model (https://arxiv.org/abs/2410.21676, https://arxiv.org/abs/2505.13738).
    """
    return math.sqrt(data_tokens)


def rate_scale(batch_tokens: int, total: int) -> float:
    """What the recipe's rates, found at `good_batch`, are multiplied with in a run of `total` steps.

    Noise falls as 1/sqrt(batch), and the rate may go with that (https://arxiv.org/abs/2205.10287); since a good
    batch is the square root of the run, at one batch the rate falls as run ** -0.25 (measured by others: -0.2 to
    -0.3, https://arxiv.org/abs/2409.19913). Far beyond a good batch the best rate no longer rises
    (https://arxiv.org/abs/2405.14578): sqrt(2) is as far as this goes.
    """
    return min(math.sqrt(2), math.sqrt(batch_tokens / good_batch(batch_tokens * total)))


def choose_batch(recipe: str, data_tokens: float, window: int) -> int:
    """Windows of a step for a run over `data_tokens`: the recipe's batch, or a good one, as a power of two."""
    windows = RECIPES[recipe].get("batch_tokens", good_batch(data_tokens)) / window
    return 2 ** max(0, round(math.log2(windows)))
