"""Estimates before the start against models that are built, passes that are measured, and published figures."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script

from model import PRESETS, ModelArgs, Transformer
from training import estimate, hardware
from training.estimate import Plan

SHAPES = [
    ModelArgs(dim=64, n_layers=3, n_heads=4, vocab_size=500, max_seq_len=128),
    ModelArgs(
        dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=300, max_seq_len=64, tie_embeddings=False
    ),
]


@pytest.mark.parametrize("args", SHAPES)
def test_parameters_and_computation_are_those_of_the_model(args) -> None:
    model = Transformer(args)
    assert sum(estimate.count_parameters(args).values()) == model.num_params()
    assert estimate.flops_per_token(args, args.max_seq_len) == model.flops_per_token()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("args", SHAPES)
def test_activations_are_what_autograd_keeps(args, dtype) -> None:
    def kept(layers: int) -> int:
        model = Transformer(dataclasses.replace(args, n_layers=layers)).train()
        fixed = {t.untyped_storage().data_ptr() for t in [*model.parameters(), model.rope]}
        tensors = []
        tokens = torch.randint(args.vocab_size, (2, args.max_seq_len))
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            loss = model(tokens, tokens)
        assert loss.isfinite()
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        return sum(s.nbytes() for address, s in storages.items() if address not in fixed)

    layer = (kept(3) - kept(1)) / 2
    parts = estimate.count_parameters(args)
    if dtype != torch.float32:  # the weights that autocast copied
        layer -= dtype.itemsize * (parts["注意力"] + parts["前馈"]) / args.n_layers
    assert estimate.layer_bytes(args, dtype) == pytest.approx(layer / (2 * args.max_seq_len), rel=0.05)


MEASURE = """
import re, sys, torch
from pathlib import Path
from model import ModelArgs, Transformer
dim, layers, heads, vocabulary, rows, length = map(int, sys.argv[1:])
model = Transformer(ModelArgs(dim=dim, n_layers=layers, n_heads=heads, vocab_size=vocabulary, max_seq_len=length))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
tokens = torch.randint(vocabulary, (rows, length))
for micro_batches in (1, 2):  # the optimizer has its state after the first step; the second accumulates
    for _ in range(micro_batches):
        model(tokens, tokens, reduction="sum").backward()
    optimizer.step()
    optimizer.zero_grad()
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("shape", [(256, 4, 4, 8000, 16, 256), (512, 8, 8, 20000, 1, 512)])
def test_memory_is_what_a_process_needs(shape) -> None:
    # A fixed threshold keeps malloc from holding on to what was freed, so that the peak is that of the tensors.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", MEASURE, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    dim, layers, heads, vocabulary, rows, length = shape
    args = ModelArgs(dim=dim, n_layers=layers, n_heads=heads, vocab_size=vocabulary, max_seq_len=length)
    plan = Plan(args, torch.float32, rows, length, accumulates=True, tokens_per_step=1, steps=1)
    measured = int(done.stdout) * 1024
    assert estimate.memory(plan).peak + estimate.PROCESS == pytest.approx(measured, rel=0.2)


def test_what_is_advised_fits_and_one_more_does_not() -> None:
    args = ModelArgs(**PRESETS["92M"])
    plan = Plan(
        args, torch.bfloat16, 512, 512, accumulates=False, tokens_per_step=2**18, steps=10, device="cuda"
    )
    available = 24 * 2**30
    (warning,) = [line for line in estimate.describe(plan, available) if "放不下" in line]
    rows = int(re.search(r"--micro_batch (\d+)", warning)[1])
    needs = [
        estimate.memory(dataclasses.replace(plan, rows=r, accumulates=True)).peak for r in (rows, rows + 1)
    ]
    assert needs[0] <= available * estimate.USABLE < needs[1]
    assert estimate.largest_micro_batch(plan, 1e9, recompute=False) == 0
    assert estimate.largest_micro_batch(plan, available, recompute=True) > 2 * rows
    assert not [line for line in estimate.describe(plan, 10**12) if "放不下" in line]


def test_a_row_of_the_table_is_arithmetic_from_the_data_sheet() -> None:
    # 92M on four 3090s at 35 %: 0.376 GFLOP a token, 4 x 71 TFLOP/s -> 264,000 tokens/s; 10^10 tokens, 10.5 hours.
    args = ModelArgs(**PRESETS["92M"])
    plan = Plan(
        args, torch.bfloat16, 32, 512, accumulates=False, tokens_per_step=1e6, steps=10_000, device="cuda"
    )
    name, speed, time, energy, cost, rows, recomputed = estimate.hardware_row(
        plan, *hardware.parse_hardware("3090 x4"), mfu=0.35, price=1.5
    )
    assert (name, time) == ("3090 ×4", "10.5 小时")
    assert speed == pytest.approx(264_000, rel=0.01)
    assert float(energy) == pytest.approx(4 * 0.35 * 10.5, rel=0.01)
    assert float(cost) == pytest.approx(4 * 10.5 * 1.5, rel=0.01)
    assert 32 < rows < recomputed


def test_estimate_prints_and_exits_and_training_begins_with_it(tokens, tmp_path) -> None:
    shape = ["--dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_seq_len", 64, "--batch_tokens", 512]
    shape += [
        "--data",
        tokens,
        "--valid",
        tokens.parent / "valid.bin",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--max_steps",
        3,
    ]
    shape += ["--out", tmp_path / "run", "--micro_batch", 4]
    asked = ["--estimate", "--hardware", "4090 x4", "H100", "--price", 2]
    done = script("pretrain.py", *shape, *asked)
    assert not (tmp_path / "run").exists()
    for part in ("3 步 × 512 token", "micro_batch 4 × 64", "4090 ×4", "H100 ×1", "费用 = 2 ×", "试跑"):
        assert part in done.stdout
    assert "3090" not in done.stdout
    started = script("pretrain.py", *shape, "--sample_every", 0)
    figures = [line for line in done.stdout.splitlines() if line.startswith(("  参数", "  内存", "  计算"))]
    assert len(figures) == 3
    assert all(line in started.stdout for line in figures)
    failed = script("pretrain.py", *shape, "--estimate", "--hardware", "4091", ok=False)
    assert "4091" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
