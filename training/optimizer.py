"""AdamW and the learning-rate schedules."""

import math

import torch
from torch import nn

from training.config import TrainConfig


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, norm weights do not (https://arxiv.org/abs/1711.05101)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def learning_rate(step: int, total: int, cfg: TrainConfig) -> float:
    """Learning rate of a step (0-based) of `total`: linear warm-up, then cosine or WSD decay to min_lr.

    WSD: constant, then linear over the last `decay_fraction` of the steps (https://arxiv.org/abs/2404.06395).
    A warm-up longer than a tenth of a short run is cut to that.
    """
    warmup = min(cfg.warmup, total // 10)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    if cfg.schedule == "cosine":
        progress = (step - warmup) / max(1, total - 1 - warmup)
        return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = max(1, round(cfg.decay_fraction * total))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * min(1.0, (total - step) / decay)
