"""What the training loop is fed with: micro-batches."""

from typing import NamedTuple

import torch
from torch import Tensor


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass."""

    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, IGNORE where no loss is borne
    documents: Tensor | None = (
        None  # (b, T) int32: tokens see only those of the same number; None: all before
    )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device; a copy from pinned memory does not wait."""
        return MicroBatch(*(t if t is None else t.to(device, non_blocking=True) for t in self))
