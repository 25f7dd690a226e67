"""Embedding and output layer for a vocabulary that has grown."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from model import ModelArgs

NewRows = Literal["subtokens", "mean", "random"]


def add_rows(
    weights: Mapping[str, Tensor],
    args: ModelArgs,
    rows: int,
    subtokens: Sequence[Sequence[int]],
    how: NewRows,
    seed: int = 0,
) -> tuple[dict[str, Tensor], ModelArgs]:
    """The weights and the shape with a row for every new id from `rows` on; all other weights are the same tensors.

    rows: ids of the old vocabulary; what the tables have beyond them belongs to no token and makes room.
    subtokens: for every new id the old ids of its text. how: "subtokens", the mean of their rows, in the embedding
    and in the output layer alike; "mean", that of all old rows; "random", N(0, 0.02) like a model's first weights.
    """
    rng = torch.Generator().manual_seed(seed)
    grown = dict(weights)
    grown["tok_embeddings.weight"] = with_rows(weights["tok_embeddings.weight"][:rows], subtokens, how, rng)
    if args.tie_embeddings:
        grown.pop("output.weight", None)
    else:
        grown["output.weight"] = with_rows(weights["output.weight"][:rows], subtokens, how, rng)
    return grown, replace(args, vocab_size=rows + len(subtokens))


def with_rows(
    table: Tensor, subtokens: Sequence[Sequence[int]], how: NewRows, rng: torch.Generator
) -> Tensor:
    """A table (V, C) with the rows of new tokens behind it, (V + new, C), in its own dtype."""
    count, old = len(subtokens), table.float()
    if how == "subtokens":
        starts = [0, *accumulate(map(len, subtokens))][:-1]
        flat = torch.tensor([i for ids in subtokens for i in ids], dtype=torch.long)
        new = F.embedding_bag(flat, old, torch.tensor(starts, dtype=torch.long), mode="mean")  # (new, C)
    elif how == "mean":
        new = old.mean(0).expand(count, -1)
    else:
        new = torch.empty(count, table.shape[1]).normal_(std=0.02, generator=rng)
    return torch.cat((table, new.to(table.dtype)))
