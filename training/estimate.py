"""What a run will need, said before it starts: parameters, memory, computation, time, energy, money.

    computation  6 N + 12 L C T FLOPs per token, forward and backward (PaLM, appendix B,
                 https://arxiv.org/abs/2204.02311); recomputing activations adds a forward pass, one third more; the
                 output matrix counts for those tokens alone of which logits are made (fine-tuning)
    state        per parameter 4 bytes fp32 weight, 4 gradient, 8 AdamW moments (ZeRO, section 3.1,
                 https://arxiv.org/abs/1910.02054), or 4 for the momentum of a matrix under Muon
    activations  what backward needs of each layer, counted as https://arxiv.org/abs/2205.05198 does, but for this
                 block: SwiGLU, grouped queries, no attention matrix; fp32 residual stream, the rest in `dtype`
    time         computation / (peak * MFU); energy: board power * time; money: price * GPUs * hours

Shapes as in model.py: L layers, C width, T tokens, V vocabulary, F feed-forward width, Q and K widths of all query
and of all key/value heads.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from loss import chunk_tokens
from model import ModelArgs, Transformer
from sources.report import table
from training.config import TrainConfig
from training.hardware import GPUS, Gpu, device_memory, parse_hardware
from training.loader import Batches
from training.runtime import Runtime

HARDWARE = ("3090", "3090 x4", "4090", "4090 x4", "5090", "A100", "A100 x8", "H20 x8", "H100", "H100 x8")
USABLE = 0.92  # of a GPU's memory: the rest is the driver's, the allocator's gaps and NCCL's
# Of a training process on a CPU besides its tensors: Python, torch, buffers of matrix products.
PROCESS = 0.35e9
PROBES = 8  # steps of the data that are looked at
PROBE_FLOPS = 1e12  # of a pass when the speed is measured: a few seconds on a slow CPU
# Bytes per logit of a chunk: logits, their log-softmax, and what the chunk before left.
HEAD_CHUNK_BYTES = {torch.float32: 12, torch.bfloat16: 14, torch.float16: 14}


@dataclass
class Plan:
    """The work of a run. A micro-batch is (rows, length) tokens of one process."""

    args: ModelArgs
    dtype: torch.dtype
    rows: int
    length: int
    accumulates: bool  # whether a step has several micro-batches
    tokens_per_step: float  # of all processes
    steps: int
    device: str = "cpu"  # its type
    muon: bool = False  # whether the hidden matrices have Muon's one moment instead of AdamW's two
    shards: int = 1  # over how many processes weights, gradients and optimizer state are split
    labelled: float = 1.0  # share of the tokens of which logits are made
    frozen: tuple[
        str, ...
    ] = ()  # parts that have neither gradients nor optimizer state (adapters beside them are few)

    @property
    def tokens(self) -> float:
        return self.tokens_per_step * self.steps

    @property
    def flops_per_token(self) -> float:
        """Computation per token, forward and backward."""
        head = self.args.vocab_size * self.args.dim
        skipped = 6 * head * (1 - self.labelled)
        parts = count_parameters(self.args)
        skipped += 2 * sum(parts[name] for name in self.frozen if name in ("注意力", "前馈"))
        skipped += 2 * head * self.labelled * ("词嵌入" in self.frozen)
        return flops_per_token(self.args, self.length) - skipped


@dataclass
class Memory:
    """Bytes of one process in a training step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float  # logits of a chunk, and the gradient of the output matrix
    peak: float


def count_parameters(args: ModelArgs) -> dict[str, int]:
    """Parameters by part; a tied output matrix is the embedding."""
    C, Q, K = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    return {
        "词嵌入": args.vocab_size * C,
        "注意力": args.n_layers * 2 * C * (Q + K),
        "前馈": args.n_layers * 3 * C * args.hidden_dim,
        "归一化": (2 * args.n_layers + 1) * C,
        "输出层": 0 if args.tie_embeddings else args.vocab_size * C,
    }


def flops_per_token(args: ModelArgs, length: int) -> int:
    """Training FLOPs per token; the same rule as `Transformer.flops_per_token`, without building the model."""
    parts = count_parameters(args)
    lookup = 0 if args.tie_embeddings else parts["词嵌入"]
    return 6 * (sum(parts.values()) - lookup) + 12 * args.n_layers * args.n_heads * args.head_dim * length


def layer_bytes(args: ModelArgs, dtype: torch.dtype) -> int:
    """Bytes per token that one layer keeps for its backward pass."""
    C, Q, K, F = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim, args.hidden_dim
    s = dtype.itemsize
    norms = 2 * (4 * C + 4 * C + 4)  # each: its input, the normalised input, 1/rms; fp32
    inputs = 2 * 4 * C if s == 4 else (3 + 2) * s * C  # of wq wk wv and w1 w3; autocast makes a copy for each
    attention = s * (Q + 2 * K + Q) + 4 * args.n_heads  # queries, keys, values, result; log-sum-exp
    return norms + inputs + attention + s * 4 * F  # w1 x, silu, w3 x, their product


def memory(plan: Plan, recompute: bool = False) -> Memory:
    """What a training step of one process holds at its peak: at the end of the forward, or of the backward pass."""
    args, tokens = plan.args, plan.rows * plan.length
    parts = count_parameters(args)
    parameters = sum(parts.values())
    matrices = parts["注意力"] + parts["前馈"]
    state = 4 * parameters / plan.shards
    trained = parameters - sum(parts[name] for name in plan.frozen)
    gradients = 4 * trained / plan.shards
    optimizer = (8 * trained - (4 * matrices if plan.muon else 0)) / plan.shards
    layer = tokens * layer_bytes(args, plan.dtype)
    inputs = tokens * 4 * args.dim  # what recomputation keeps of a layer
    activations = args.n_layers * inputs + layer if recompute else args.n_layers * layer
    if plan.dtype != torch.float32:
        activations += 2 * parameters  # the copies of the weights that autocast keeps
    output = 4 * args.vocab_size * args.dim
    around = 4 * inputs  # the last norm, its result and the gradient of that
    logits = min(tokens, chunk_tokens(plan.device, args.vocab_size)) * args.vocab_size
    chunk = logits * HEAD_CHUNK_BYTES[plan.dtype]
    head = around + output + max(output, chunk)
    forward = activations + head + (gradients if plan.accumulates else 0)
    backward = gradients + 2 * output
    return Memory(state, gradients, optimizer, activations, head, state + optimizer + max(forward, backward))


def largest_micro_batch(plan: Plan, available: float, recompute: bool = False) -> int:
    """The most rows whose step fits into `available` bytes; 0 if not even one does."""
    fits = 0
    for bit in reversed(range(14)):
        tried = fits + 2**bit
        if memory(replace(plan, rows=tried, accumulates=True), recompute).peak <= available:
            fits = tried
    return fits


def make_plan(cfg: TrainConfig, runtime: Runtime, args: ModelArgs, batches: Batches) -> Plan:
    """The work of a run, from a look at some steps of its data."""
    steps = cfg.total_steps(batches.steps_per_epoch)
    span = max(1, min(steps, int(batches.steps_per_epoch)))
    seen = [batches.step(int(step)) for step in np.linspace(0, span - 1, min(PROBES, span))]
    lengths = {mb.tokens.shape[1] for step in seen for mb in step}
    tokens = [sum(int((mb.tokens != 0).sum()) for mb in step) for step in seen]
    logits = [sum((mb.tokens if mb.labelled is None else mb.labelled).numel() for mb in s) for s in seen]
    return Plan(
        args=args,
        dtype=runtime.dtype,
        rows=max(len(mb.tokens) for step in seen for mb in step),
        length=max(lengths) if len(lengths) == 1 else args.max_seq_len,  # where it varies, the worst case
        accumulates=max(map(len, seen)) > 1,
        tokens_per_step=runtime.world * float(np.mean(tokens)),
        steps=steps,
        device=runtime.device.type,
        frozen=frozen_parts(cfg),
        muon=cfg.optimizer == "muon",
        shards=runtime.world if cfg.shard else 1,
        labelled=min(1.0, sum(logits) / max(1, sum(tokens))),
    )


def frozen_parts(cfg: TrainConfig) -> tuple[str, ...]:
    """The parts of the model that a run leaves as they are because it trains adapters (training/lora.py)."""
    if not getattr(cfg, "adapts", False):
        return ()
    return ("注意力", "前馈", "归一化") + (() if cfg.lora_embed else ("词嵌入", "输出层"))


def announce(cfg: TrainConfig, runtime: Runtime, args: ModelArgs, batches: Batches) -> float:
    """Print what the run needs; with --estimate also its speed here, and what it would take on other hardware.

    Returns FLOPs per token; 0 in all but the main process, which alone reports.
    """
    if not runtime.is_main:
        return 0.0
    plan = make_plan(cfg, runtime, args, batches)
    for line in describe(plan, device_memory(runtime.device)):
        print(line, flush=True)
    if peak := runtime.peak_flops():
        speed = runtime.world * peak * cfg.mfu / plan.flops_per_token
        print(f"  这里：{takes(plan, speed)}（按 MFU {cfg.mfu:.0%} 算）", flush=True)
    elif cfg.estimate and memory(replace(plan, rows=1)).peak < (device_memory(runtime.device) or math.inf):
        speed = runtime.world * measure(plan, runtime)
        print(f"  这里：{takes(plan, speed)}（试跑几次前向与反向测得）", flush=True)
    else:
        print("  这里：设备的峰值未知，用时以日志里的“剩余”为准。", flush=True)
    if cfg.estimate:
        print(compare(plan, cfg.hardware, cfg.mfu, cfg.price), flush=True)
    return plan.flops_per_token


def describe(plan: Plan, available: int | None) -> list[str]:
    """Parameters, memory and computation of a run, a line each."""
    parts = count_parameters(plan.args)
    each = "、".join(f"{name} {count / 1e6:.1f}M" for name, count in parts.items() if count)
    whole, less = memory(plan), memory(plan, recompute=True)
    flops = plan.flops_per_token
    process = PROCESS if plan.device == "cpu" else 0.0
    lines = [
        f"  参数 {sum(parts.values()) / 1e6:.2f}M：{each}",
        f"  内存 每个进程最多约 {gigabytes(whole.peak + process)}"
        + (f"（这里有 {gigabytes(available)}）" if available else "")
        + f"：权重 {gigabytes(whole.weights)}，梯度 {gigabytes(whole.gradients)}，优化器 {gigabytes(whole.optimizer)}，"
        f"输出层 {gigabytes(whole.head)}，micro_batch {plan.rows} × {plan.length} 的激活 "
        f"{gigabytes(whole.activations)}（若重算，{gigabytes(less.activations)}）"
        + (f"，程序本身 {gigabytes(process)}" if process else ""),
        f"  计算 每 token {flops / 1e9:.3g} GFLOP；{plan.steps:,} 步 × {plan.tokens_per_step:,.0f} token = "
        f"{plan.tokens / 1e6:,.1f}M token，共 {flops * plan.tokens:.3g} FLOP",
    ]
    usable = available * (USABLE if plan.device == "cuda" else 1.0) if available else None
    if usable and whole.peak + process > usable:
        rows = largest_micro_batch(plan, usable - process)
        remedy = (
            f"请用 --micro_batch {rows}（结果不变）"
            if rows
            else "一条样本也放不下：请换更小的模型或更大的显存"
        )
        lines.append(f"  注意：估计放不下；{remedy}。")
    return lines


def compare(plan: Plan, hardware: Sequence[str], mfu: float, price: float) -> str:
    """A table of what the same tokens take on other GPUs, in half precision."""
    if tuple(hardware) == ("all",):
        chosen = [(gpu, 1) for gpu in GPUS]
    else:
        chosen = [parse_hardware(text) for text in hardware or HARDWARE]
    plan = replace(plan, dtype=torch.bfloat16, device="cuda")
    rows = [hardware_row(plan, gpu, count, mfu, price) for gpu, count in chosen]
    header = ("硬件", "token/s", "用时", "电 kWh", "费用", "micro_batch 上限", "重算时")
    cost = f"费用 = {price:g} × 卡数 × 小时" if price else "费用：用 --price 给出每张卡每小时的价格"
    return (
        f"在别的硬件上（半精度，MFU 假设为 {mfu:.0%}，可用 --mfu 改；没有实测）：\n{table(header, rows)}\n"
        f"  电：只算显卡的额定功率；{cost}。"
    )


def hardware_row(plan: Plan, gpu: Gpu, count: int, mfu: float, price: float) -> tuple[object, ...]:
    """A row of the table: speed, time, energy and money on so many of these GPUs, and how many rows fit."""
    speed = count * 1e12 * gpu.half * mfu / plan.flops_per_token
    hours = plan.tokens / speed / 3600
    usable = gpu.memory * 2**30 * USABLE
    fits = (largest_micro_batch(plan, usable, recompute) for recompute in (False, True))
    return (
        f"{gpu.name} ×{count}",
        round(speed),
        span(hours),
        f"{count * gpu.watts / 1000 * hours:,.1f}",
        f"{count * hours * price:,.2f}" if price else "-",
        *(rows or "放不下" for rows in fits),
    )


def measure(plan: Plan, runtime: Runtime, seconds: float = 3.0) -> float:
    """Tokens per second of forward and backward passes on this device, in one process, from a few tries."""
    model = Transformer(plan.args).to(runtime.device).train()
    length = min(plan.length, max(64, int(PROBE_FLOPS / flops_per_token(plan.args, plan.length))))
    rows = max(1, min(plan.rows, 1024 // length))
    tokens = torch.randint(plan.args.vocab_size, (rows, length), device=runtime.device)
    labelled = torch.arange(max(1, int(plan.labelled * tokens.numel())), device=runtime.device)
    times: list[float] = []
    while len(times) < 2 or (sum(times) < seconds and len(times) < 20):
        begin = time.perf_counter()
        with runtime.autocast():
            loss = model(tokens, tokens, reduction="sum", labelled=labelled)
        loss.backward()
        model.zero_grad()
        loss.item()  # wait for the device
        times.append(time.perf_counter() - begin)
    return tokens.numel() / float(np.median(times[1:]))  # the first try warms up


def takes(plan: Plan, tokens_per_second: float) -> str:
    """How long the run takes at a speed."""
    return f"约 {tokens_per_second:,.0f} token/s，用时约 {span(plan.tokens / tokens_per_second / 3600)}"


def span(hours: float) -> str:
    """Hours in the unit that suits them."""
    if hours >= 48:
        return f"{hours / 24:,.1f} 天"
    return f"{hours:.1f} 小时" if hours >= 1 else f"{hours * 60:.1f} 分"


def gigabytes(size: float) -> str:
    """Bytes as GB (10^9) with two or more digits."""
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.1f} GB"
