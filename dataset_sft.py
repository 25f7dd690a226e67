"""Fine-tuning batches: samples packed into full rows, in which they do not see each other, or one in each row.

A row of one sample is mostly padding: instructions are far shorter than the longest of them. Packed, the longest
first, each into the row with the least room that holds it (best-fit decreasing), they leave next to none; the model
masks attention at their borders and counts positions from each one's beginning, so that every sample is learnt
as if it were alone (https://arxiv.org/abs/2107.02027).
"""

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from dataset_fit import best_fit
from dataset_sft_tokens import Sample, Samples
from model import IGNORE
from training.loader import MicroBatch

POOL = 16  # batches whose samples are sorted by length together, so that a batch holds similar lengths
ROW_MULTIPLE = 64  # tokens: what kernels like a row to be a multiple of
# The number of labelled places is filled up to a multiple of a 32nd of all: compiled code meets few shapes.
LABEL_SHAPES = 32


def row_length(samples: Samples, max_seq_len: int) -> int:
    """Tokens of a row that these samples are packed into: what the longest needs, as attention grows with it."""
    longest = int(samples.lengths.max(initial=2)) - 1  # the last id is only a target
    return min(max_seq_len, -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE)


def pack(lengths: np.ndarray, order: np.ndarray, room: int) -> list[np.ndarray]:
    """Which samples share each row, by best-fit decreasing; equal lengths are taken in the order given.

    lengths: (n,) tokens of each sample, at most `room`, those of a row. How many rows there are depends on the
    lengths alone, not on the order.
    """
    if not len(lengths):
        return []
    longest_first = order[np.argsort(-lengths[order], kind="stable")]
    rows = best_fit(lengths, longest_first, room)[longest_first]  # of each sample
    by_row = np.argsort(rows, kind="stable")
    return np.split(longest_first[by_row], np.cumsum(np.bincount(rows))[:-1])


def collate(rows: Sequence[Sequence[Sample]], length: int | None = None) -> MicroBatch:
    """Rows of samples one behind the other, (b, T), padded to a length or to the longest; `IGNORE` off the answers.

    Samples of a row are documents 0, 1, …; padding is document -1. Without a length, a row is one sample.
    """
    T = length or max(len(sample.ids) for row in rows for sample in row) - 1
    tokens, targets = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), IGNORE, np.int64)
    documents = np.full((len(rows), T), -1, np.int32)
    for r, row in enumerate(rows):
        end = 0
        for number, (ids, bears_loss) in enumerate(row):
            start, end = end, end + len(ids) - 1
            tokens[r, start:end] = ids[:-1]
            targets[r, start:end] = np.where(bears_loss[1:], ids[1:], IGNORE)
            documents[r, start:end] = number
    return MicroBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        None if length is None else torch.from_numpy(documents),  # padding behind one sample disturbs nothing
        labelled_places(targets),
    )


def labelled_places(targets: np.ndarray) -> torch.Tensor | None:
    """Where a target bears loss, (n,); the last of them are places without, to fill up. None: (nearly) everywhere."""
    bears_loss = targets.ravel() != IGNORE
    places, others = np.flatnonzero(bears_loss), np.flatnonzero(~bears_loss)
    unit = max(1, targets.size // LABEL_SHAPES)
    extra = -len(places) % unit if len(places) else unit
    return torch.from_numpy(np.concatenate((places, others[:extra]))) if extra < len(others) else None


class SftBatches:
    """Batches of samples in a new random order each epoch; disjoint across processes.

    A step depends on the samples, the seed, the batch and the row alone: any number of processes sees the same global
    batches, and a resumed run needs nothing but the number of its step.
    """

    def __init__(
        self,
        samples: Samples,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        row: int | None = None,
    ):
        """batch: samples of a step, over all processes; of packed ones, on average, so that every step has equally
        many tokens. micro_batch: rows of one forward of a process. row: tokens of a row into which samples are
        packed; None: a row is one sample, with others of similar length.
        """
        self.samples, self.micro_batch, self.rank, self.world = samples, micro_batch, rank, world
        self.seed, self.row = seed, row
        self.lengths = samples.lengths - 1  # tokens; the last id is only a target
        self.per_step = batch  # rows
        rows = len(samples)
        if row is not None:
            rows = len(pack(self.lengths, np.arange(len(samples)), row))
            self.per_step = round_for_processes(batch * rows / len(samples))
        self.steps_per_epoch = -(-rows // self.per_step)
        self.signature = {
            "batch": batch,
            "samples": len(samples),
            "seed": seed,
            "content": hashlib.sha256(samples.digests.tobytes()).hexdigest(),
            "row": row,
        }
        self.epoch, self.steps = -1, []

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        rows = self.rows(step)
        mine = rows[self.rank :: self.world]
        if not mine:  # a last batch with fewer rows than processes: take part, but learn nothing
            return [self.collate(rows[:1]).idle()]
        parts = -(-len(mine) // self.micro_batch)
        cuts = [len(mine) * i // parts for i in range(parts + 1)]
        return [self.collate(mine[a:b]) for a, b in pairwise(cuts)]

    def collate(self, rows: Sequence[np.ndarray]) -> MicroBatch:
        return collate([[self.samples[i] for i in row] for row in rows], self.row)

    def describe(self, step: int) -> str:
        """Which usable samples, counted from 0, are in this process's rows of a step."""
        mine = self.rows(step)[self.rank :: self.world]
        return f"样本 {'、'.join(str(i) for row in mine for i in row)}"

    def rows(self, step: int) -> list[np.ndarray]:
        """The rows of a step, of all processes: the samples in each."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            self.epoch, self.steps = epoch, self.by_length(rng) if self.row is None else self.packed(rng)
        return self.steps[position]

    def packed(self, rng: np.random.Generator) -> list[list[np.ndarray]]:
        """The steps of an epoch: pack all samples, shuffle the rows, cut."""
        rows = pack(self.lengths, rng.permutation(len(self.samples)), self.row)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return [rows[i : i + self.per_step] for i in range(0, len(rows), self.per_step)]

    def by_length(self, rng: np.random.Generator) -> list[list[np.ndarray]]:
        """The steps of an epoch: shuffle, sort by length within pools, cut, shuffle the steps."""
        order, steps, size = rng.permutation(len(self.samples)), [], POOL * self.per_step
        for start in range(0, len(order), size):
            pool = order[start : start + size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            steps += [list(pool[i : i + self.per_step, None]) for i in range(0, len(pool), self.per_step)]
        return [steps[i] for i in rng.permutation(len(steps))]


def round_for_processes(rows: float) -> int:
    """About so many rows; of many only as many as 2, 4 and 8 processes share evenly (three binary digits)."""
    unit = 2 ** max(0, int(rows).bit_length() - 3)
    return max(1, round(rows / unit) * unit)
