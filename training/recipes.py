"""Recipes: the settings that decide how well a model learns from a number of tokens (docs/recipe.md).

`--recipe NAME` fills in every such setting that was left open (None in training/config.py).
"""

import math
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from training.config import TrainConfig

REFERENCE_BATCH = 4096  # tokens of a step at which the rates of the recipe "muon" were found
TIMESCALE = 0.25  # weights forget what is older than this part of the run

RECIPES: dict[str, dict[str, Any]] = {
    "muon": dict(
        optimizer="muon",
        lr=0.02,
        table_lr=0.006,
        min_lr=0.0,
        warmup=50,
        schedule="wsd",
        decay_fraction=0.5,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        zero_init=True,
    ),
    # What the original project trained with, but for the warm-up, which is cut in short runs.
    "original": dict(
        optimizer="adamw",
        lr=3e-4,
        min_lr=1e-5,
        weight_decay=0.1,
        warmup=1000,
        schedule="cosine",
        decay_fraction=0.2,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        zero_init=False,
    ),
}

Config = TypeVar("Config", bound=TrainConfig)


def settle(cfg: Config, total: int, batch_tokens: int | None) -> Config:
    """The settings with what was left open filled in from the recipe, fit to this run.

    total: steps. batch_tokens: of a step over all processes; None: the recipe's rates are not scaled.
    """
    recipe = RECIPES[cfg.recipe]
    filled = {name: value for name, value in recipe.items() if getattr(cfg, name) is None}
    if "warmup" in filled:
        filled["warmup"] = min(filled["warmup"], total // 10)
    if cfg.recipe == "muon" and batch_tokens:
        # Noise falls as 1/sqrt(batch): for Adam-like optimizers the rate goes with its square root
        # (https://arxiv.org/abs/2205.10287).
        for name in {"lr", "table_lr"} & filled.keys():
            filled[name] *= math.sqrt(batch_tokens / REFERENCE_BATCH)
    settled = replace(cfg, **filled)
    if settled.table_lr is None:
        settled.table_lr = settled.lr
    if settled.weight_decay is None:
        # lr * weight_decay is the part of a weight that a step forgets, 1 / timescale
        # (https://arxiv.org/abs/2405.13698).
        settled.weight_decay = 1 / (TIMESCALE * total * settled.lr)
    settled.check()
    return settled


def initialise(model: nn.Module, cfg: TrainConfig) -> None:
    """With `zero_init`, matrices that write to the residual stream start at zero (https://arxiv.org/abs/2203.03466).

    Every layer then starts as the identity, whatever the depth.
    """
    zero = RECIPES[cfg.recipe]["zero_init"] if cfg.zero_init is None else cfg.zero_init
    for name, parameter in model.named_parameters() if zero else ():
        if name.endswith(("wo.weight", "w2.weight")):
            nn.init.zeros_(parameter)
