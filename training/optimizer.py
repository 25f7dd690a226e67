"""Optimizers and the learning-rate schedules."""

import math

import torch
from torch import nn

from training.config import TrainConfig
from training.muon import Muon


def make_optimizer(
    model: nn.Module, cfg: TrainConfig, dtype: torch.dtype = torch.float32
) -> torch.optim.Optimizer:
    """Muon or AdamW as cfg says; each group's `initial_lr` is its peak rate.

    Norm weights never decay. dtype: of matrix products; Muon iterates in it unless it is fp16.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hidden = [p for name, p in named if p.dim() >= 2 and name.startswith("layers.")]
    tables = [p for name, p in named if p.dim() >= 2 and not name.startswith("layers.")]  # embedding, head
    vectors = [p for _, p in named if p.dim() < 2]
    is_muon = cfg.optimizer == "muon"
    groups = [
        dict(params=hidden, lr=cfg.lr, weight_decay=cfg.weight_decay),
        dict(params=tables, lr=cfg.table_lr, weight_decay=cfg.weight_decay * cfg.lr / cfg.table_lr),
        dict(params=vectors, lr=cfg.table_lr, weight_decay=0.0),
    ]
    for group, muon in zip(groups, (is_muon, False, False), strict=True):
        group["initial_lr"] = group["lr"]
        group["muon"] = muon
    groups = [group for group in groups if group["params"]]
    betas = (cfg.beta1, cfg.beta2)
    if is_muon:
        ns_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizer = Muon(groups, betas=betas, steps=cfg.muon_steps, dtype=ns_dtype)
    else:
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    keep_settings(optimizer)
    return optimizer


def keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let a loaded state dict bring the moments alone: rates and decay are the ones asked for now."""
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def restore(loaded: torch.optim.Optimizer) -> None:
        for group, own in zip(loaded.param_groups, settings, strict=True):
            group.update(own)

    optimizer.register_load_state_dict_post_hook(restore)


def factor(step: int, total: int, cfg: TrainConfig) -> float:
    """What the peak rates are multiplied with at a step (0-based) of `total`: warm-up, then cosine or WSD.

    WSD: constant, then linear over the last `decay_fraction` of the steps (https://arxiv.org/abs/2404.06395).
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    lowest = cfg.min_lr / cfg.lr
    if cfg.schedule == "cosine":
        progress = (step - cfg.warmup) / max(1, total - 1 - cfg.warmup)
        return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = max(1, round(cfg.decay_fraction * total))
    return lowest + (1 - lowest) * min(1.0, max(0, total - step) / decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to its peak times `factor`; returns the first group's (the matrices')."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return optimizer.param_groups[0]["lr"]
