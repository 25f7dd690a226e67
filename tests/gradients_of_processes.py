"""Run by test_distributed.py under torchrun: one global batch through the runtime, its gradients to a file.

Arguments: the file to write, "ddp" or "shard", micro-batch, rows of the global batch, tied or not; or "packed" for a
step of fine-tuning.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from dataset_sft import SftBatches
from dataset_sft_tokens import Samples
from model import IGNORE, ModelArgs, Transformer
from training import runtime as rt
from training.guards import tally
from training.loader import MicroBatch


def problem(rows: int, is_tied: bool, max_seq_len: int = 24) -> tuple[Transformer, MicroBatch]:
    """A small model and a global batch whose targets are partly masked."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    args = ModelArgs(
        dim=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        vocab_size=101,
        max_seq_len=max_seq_len,
        tie_embeddings=is_tied,
    )
    model = Transformer(args)
    tokens = torch.randint(0, 101, (rows, 24), generator=generator)
    targets = torch.randint(0, 101, (rows, 24), generator=generator)
    targets[torch.rand(rows, 24, generator=generator) < 0.3] = IGNORE
    return model, MicroBatch(tokens, targets)


def fine_tuning(count: int = 40) -> tuple[Transformer, Samples]:
    """A small model and made-up samples of 3 to 30 tokens."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(3, 31, count)
    bears_loss = np.concatenate([np.arange(n) >= rng.integers(1, n) for n in lengths])
    ids = rng.integers(3, 101, len(bears_loss)).astype(np.int32)
    ends = np.cumsum(lengths)
    labels = np.array([bears_loss[end - n : end].sum() for n, end in zip(lengths, ends, strict=True)])
    arrays = dict(ids=ids, bears_loss=bears_loss, lengths=lengths, labels=labels, digests=np.arange(count))
    return problem(1, True, max_seq_len=64)[0], Samples(arrays, cut=0)


def shared(
    runtime: rt.Runtime, micro_batch: int, rows: int, is_tied: bool
) -> tuple[Transformer, list[MicroBatch]]:
    """The model of `problem` and this process's micro-batches of its batch."""
    model, batch = problem(rows, is_tied)
    mine = (t[runtime.rank :: runtime.world].split(micro_batch) for t in batch[:2])
    return model, [MicroBatch(*cut) for cut in zip(*mine, strict=True)]


def packed(runtime: rt.Runtime, micro_batch: int) -> tuple[Transformer, list[MicroBatch]]:
    """The model of `fine_tuning` and this process's micro-batches of the first step: about 24 samples in 8 rows."""
    model, samples = fine_tuning()
    return model, SftBatches(samples, 24, micro_batch, runtime.rank, runtime.world, 0, row=64).step(0)


def gradients(
    runtime: rt.Runtime, shard: bool, model: Transformer, micro_batches: list[MicroBatch]
) -> dict[str, torch.Tensor]:
    """The clipped gradients, whole, and their norm before."""
    runtime.place(model, shard)
    wrapped = runtime.wrap(model, compile_it=False)
    micro_batches = runtime.even(micro_batches)
    bearing = runtime.all_sum(tally(micro_batches)[0])
    for i, mb in enumerate(micro_batches):
        with rt.no_sync(wrapped, last=i == len(micro_batches) - 1):
            extra = dict(documents=mb.documents, labelled=mb.labelled)
            loss = wrapped(mb.tokens, mb.targets, reduction="sum", **extra) / bearing
            (loss * runtime.world).backward()
    found = {"norm": rt.clip_gradients(model, 0.5)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return {name: value.contiguous() for name, value in found.items()}


def main(out: Path, shard: bool, micro_batch: int, rows: int, kind: str) -> None:
    with rt.start("cpu", "fp32") as runtime:
        if kind == "packed":
            model, micro_batches = packed(runtime, micro_batch)
        else:
            model, micro_batches = shared(runtime, micro_batch, rows, kind == "tied")
        found = gradients(runtime, shard, model, micro_batches)
        if runtime.is_main:
            save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "shard", int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
