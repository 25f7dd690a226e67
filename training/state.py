"""The state of a run as flat, named tensors: whole, or under FSDP the rows that this process holds.

Weights keep their names; what an optimizer remembers of a parameter is `<parameter>.<key>`, e.g.
`layers.0.attention.wq.weight.exp_avg`. Numbers that are no tensors go to JSON. Nothing is pickled.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from model import Transformer

Numbers = dict[str, dict[str, float]]  # parameter -> key -> value


@dataclass
class Piece:
    """What this process holds of a tensor: rows `start` to `start + len(rows)` of the whole."""

    rows: Tensor  # (n, ...), or () of a scalar
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0


@dataclass
class Adapters:
    """What a model's adapters are, besides their weights; training/lora.py attaches it to the model."""

    config: dict[str, Any]  # adapter_config.json
    base: dict[str, str]  # base.json


def adapters_of(model: Transformer) -> Adapters | None:
    """The adapters of a model that trains these alone; None if it trains its own weights."""
    return getattr(model, "adapters", None)


def piece_of(tensor: Tensor) -> Piece:
    """The piece that this process holds of a tensor; FSDP shards like torch.chunk, along the first dimension."""
    if not isinstance(tensor, DTensor):
        return Piece(tensor.detach(), tuple(tensor.shape))
    if tensor.placements != (Shard(0),):
        raise ValueError(f"only tensors sharded by rows are saved, not {tensor.placements}")
    per_process = -(-len(tensor) // tensor.device_mesh.size())
    start = min(len(tensor), tensor.device_mesh.get_local_rank() * per_process)
    return Piece(tensor.to_local().detach(), tuple(tensor.shape), start)


def weights_of(model: Transformer) -> dict[str, Tensor]:
    """The weights by name, a tied matrix once; of a model that trains adapters, these and what is trained with them."""
    if adapters_of(model):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    weights = dict(model.state_dict())
    if model.args.tie_embeddings:
        del weights["output.weight"]
    return weights


def optimizer_state_of(
    model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], Numbers]:
    """What the optimizer remembers: tensors by `<parameter>.<key>`, and the values that are no tensors."""
    tensors, numbers = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    return tensors, numbers


def restore_weights(model: Transformer, read: Callable[[str, int, int | None], Tensor]) -> None:
    """Fill the weights. read: the rows from start to stop (None: all of it) of a named tensor."""
    with torch.no_grad():
        for name, weight in weights_of(model).items():
            copy_rows(weight, name, read)


def restore_optimizer(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    names: Iterator[str],
    numbers: Numbers,
    read: Callable[[str, int, int | None], Tensor],
) -> None:
    """Fill the optimizer's memory, whatever it held; the hyperparameters are those of the present settings."""
    parameters = dict(model.named_parameters())
    fused = {
        p: bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    optimizer.state.clear()
    for name in names:
        owner, key = name.rsplit(".", 1)
        parameter = parameters[owner]
        value = read(name, 0, 0 if isinstance(parameter, DTensor) else None)  # 0 rows: its shape and dtype
        if isinstance(parameter, DTensor) and value.dim():
            state = torch.zeros_like(parameter, dtype=value.dtype)
            copy_rows(state, name, read)
        else:  # a scalar (the step) belongs on the CPU unless the optimizer's kernel reads it on the device
            on_device = value.dim() or fused[parameter]
            state = value.to(parameter.device if on_device else "cpu", copy=True)
        optimizer.state[parameter][key] = state
    for owner, values in numbers.items():
        optimizer.state[parameters[owner]].update(values)


def copy_rows(target: Tensor, name: str, read: Callable[[str, int, int | None], Tensor]) -> None:
    """Copy into a tensor, or into this process's piece of it, the same rows of the saved one."""
    if not isinstance(target, DTensor):
        target.copy_(read(name, 0, None))
        return
    piece = piece_of(target)
    if len(piece.rows):
        piece.rows.copy_(read(name, piece.start, piece.start + len(piece.rows)))
