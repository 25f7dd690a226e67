"""Run by test_distributed.py under torchrun: one global batch through the runtime, its gradients to a file.

Arguments: the file to write, "ddp" or "shard", micro-batch, rows of the global batch, tied or not.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from model import IGNORE, ModelArgs, Transformer
from training import runtime as rt
from training.loader import MicroBatch


def problem(rows: int, is_tied: bool) -> tuple[Transformer, MicroBatch]:
    """A small model and a global batch whose targets are partly masked."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(4)
    args = ModelArgs(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, max_seq_len=24, tie_embeddings=is_tied
    )
    model = Transformer(args)
    tokens = torch.randint(0, 101, (rows, 24), generator=generator)
    targets = torch.randint(0, 101, (rows, 24), generator=generator)
    targets[torch.rand(rows, 24, generator=generator) < 0.3] = IGNORE
    return model, MicroBatch(tokens, targets)


def gradients(
    runtime: rt.Runtime, shard: bool, micro_batch: int, rows: int, is_tied: bool
) -> dict[str, torch.Tensor]:
    """The clipped gradients, whole, and their norm before."""
    model, batch = problem(rows, is_tied)
    runtime.place(model, shard)
    wrapped = runtime.wrap(model, compile_it=False)
    mine = MicroBatch(*(t[runtime.rank :: runtime.world] for t in batch[:2]))
    cuts = zip(mine.tokens.split(micro_batch), mine.targets.split(micro_batch), strict=True)
    micro_batches = runtime.even([MicroBatch(*cut) for cut in cuts])
    bearing = runtime.all_sum((mine.targets != IGNORE).sum())
    for i, mb in enumerate(micro_batches):
        with rt.no_sync(wrapped, last=i == len(micro_batches) - 1):
            loss = wrapped(mb.tokens, mb.targets, reduction="sum") / bearing
            (loss * runtime.world).backward()
    found = {"norm": rt.clip_gradients(model, 0.5)}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return {name: value.contiguous() for name, value in found.items()}


def main(out: Path, shard: bool, micro_batch: int, rows: int, is_tied: bool) -> None:
    with rt.start("cpu", "fp32") as runtime:
        found = gradients(runtime, shard, micro_batch, rows, is_tied)
        if runtime.is_main:
            save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "shard", int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "tied")
