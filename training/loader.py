"""What the training loop is fed with: micro-batches, and a thread that reads those of the next step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loss import IGNORE


class MicroBatch(NamedTuple):
    """Rows of one forward and backward pass."""

    tokens: Tensor  # (b, T) int64
    targets: Tensor  # (b, T) int64, IGNORE where no loss is borne
    documents: Tensor | None = None  # (b, T) int32: tokens see those of the same number; None: all before
    # (n,) int64: the places among the b * T targets of those that bear loss, and some more. Counted on the host,
    # because a GPU that is asked how many there are makes the host wait. None: all places.
    labelled: Tensor | None = None

    def idle(self) -> "MicroBatch":
        """One of the same shape that bears no loss, for a process that only takes part."""
        return self._replace(
            tokens=torch.zeros_like(self.tokens), targets=torch.full_like(self.targets, IGNORE)
        )

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a device; a copy from pinned memory does not wait."""
        return MicroBatch(*(t if t is None else t.to(device, non_blocking=True) for t in self))

    def pin(self) -> "MicroBatch":
        """The same in page-locked memory, from which the GPU copies by itself."""
        return MicroBatch(*(t if t is None else t.pin_memory() for t in self))


class Batches(Protocol):
    """The data of a run: a pure function of the step, so that a resumed run sees what it would have seen."""

    steps_per_epoch: float
    signature: dict  # what the order of the data depends on; must not change at a resume

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step; at least one."""

    def describe(self, step: int) -> str:
        """Where this process's rows of a step come from."""


class ReadAhead:
    """The same batches, those of the next step read by a thread while this one runs.

    The thread calls nothing but `batches`, and one call after the other; it ends with the process, at the
    latest when the read under way is done. An error of a read is raised when its step is asked for.
    """

    def __init__(self, batches: Batches, device: torch.device):
        self.batches, self.pin = batches, device.type == "cuda"
        self.steps_per_epoch, self.signature = batches.steps_per_epoch, batches.signature
        self.thread = ThreadPoolExecutor(1, "read-ahead")
        self.ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step; starts to read those of the next."""
        number, reading = self.ahead or (None, None)
        if number != step:  # the first step, or one after a step back
            reading = self.thread.submit(self.read, step)
        self.ahead = (step + 1, self.thread.submit(self.read, step + 1))
        return reading.result()

    def read(self, step: int) -> list[MicroBatch]:
        micro_batches = self.batches.step(step)
        return [mb.pin() for mb in micro_batches] if self.pin else micro_batches

    def describe(self, step: int) -> str:
        """Where this process's rows of a step come from."""
        return self.thread.submit(self.batches.describe, step).result()
