"""Tokens a second, memory and share of the peak of training, against the usual ways: `python bench/training_speed.py`.

Every way trains the same shape on the same random tokens in a process of its own; the ways take turns for several
rounds, and the median counts. Ways:

    original    a loop of the original project's kind: eager, all logits in fp32, AdamW (on a GPU in fp16 autocast)
    hf          transformers' LlamaForCausalLM in its Trainer, fp32
    hf-bf16     the same in bf16 (on a GPU also compiled)
    ours        python pretrain.py as it is, read from its log

On one H100 or H200: python bench/training_speed.py --models 92M 218M 1B --micro_batch 16 --steps 30
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from bench.measure import run_measured
from sources.report import table, write_json
from stage import ROOT, StageConfig, UserError, require, run_stage

Way = Literal["original", "hf", "hf-bf16", "ours"]
WARM = 2  # steps that are not timed; more where something is compiled


@dataclass
class Config(StageConfig):
    """训练速度与内存：我们的 pretrain.py 对原项目式的循环与 transformers 的 Trainer。"""

    models: tuple[Literal["demo", "92M", "218M", "500M", "1B"], ...] = ("demo", "92M")  # 比较哪些规模
    ways: tuple[Way, ...] = ("original", "hf", "hf-bf16", "ours")  # 比较哪些做法；第一个是基准
    max_seq_len: int = 0  # 窗口长度；0 为该规模的默认值
    micro_batch: int = 8  # 每步的窗口数
    steps: int = 6  # 每轮计时的步数，取中位数
    rounds: int = 3  # 各做法轮流运行几轮
    vocab_size: int = 64793  # 词表条目数（演示规模自动用 5000）
    options: str = ""  # 另外传给 pretrain.py 的参数，如 "--compile"
    out: Path | None = None  # 把结果写成 JSON
    worker: str = ""  # （内部）在本进程里跑一种做法，以 JSON 给出

    def check(self) -> None:
        for name in ("micro_batch", "steps", "rounds", "vocab_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")


def main(cfg: Config) -> None:
    if cfg.worker:
        model, way = json.loads(cfg.worker)
        print(json.dumps(WAYS[way](cfg, model)))
        return
    results = []
    for model in cfg.models:
        found: dict[str, list[tuple[float, int]]] = {way: [] for way in cfg.ways}
        for _ in range(cfg.rounds):
            for way in cfg.ways:
                found[way].append(measure(cfg, model, way))
        results += show(cfg, model, found)
    if cfg.out:
        write_json(cfg.out, results)


def measure(cfg: Config, model: str, way: str) -> tuple[float, int]:
    """Tokens a second and peak bytes (of the GPU, else of the process) of one way, in a process of its own."""
    command = [sys.executable, Path(__file__).resolve(), "--worker", json.dumps([model, way])]
    for name in ("max_seq_len", "micro_batch", "steps", "vocab_size"):
        command += [f"--{name}", getattr(cfg, name)]
    command += [f"--options={cfg.options}"]
    printed, cost = run_measured(command)
    speed, gpu_memory = json.loads(printed.strip().splitlines()[-1])
    return speed, gpu_memory or cost.largest


def show(cfg: Config, model: str, found: dict[str, list[tuple[float, int]]]) -> list[dict]:
    """Print the figures of a shape; returns them."""
    from training.estimate import flops_per_token

    args, peaks = model_args(cfg, model), matrix_speed()
    flops = flops_per_token(args, args.max_seq_len)
    rows, results = [], []
    base_speed, base_memory = (statistics.median(v) for v in zip(*found[cfg.ways[0]], strict=True))
    for way, values in found.items():
        speed, memory = (statistics.median(v) for v in zip(*values, strict=True))
        share = {name: speed * flops / peak for name, peak in peaks.items()}
        rows.append(
            [
                way,
                f"{speed:,.0f}",
                f"{speed / base_speed:.2f}",
                f"{memory / 2**30:.2f}",
                f"{memory / base_memory:.2f}",
            ]
            + [f"{s:.1%}" for s in share.values()]
            + [f"{min(v[0] for v in values):,.0f}–{max(v[0] for v in values):,.0f}"]
        )
        results.append(dict(model=model, way=way, tokens_per_second=speed, memory=memory, share=share))
    heads = ["", "token/s", "ratio", "GiB", "ratio", *(f"of {name} peak" for name in peaks), "range"]
    print(f"\n{model}, {cfg.micro_batch} x {args.max_seq_len} tokens a step, vocabulary {args.vocab_size:,}")
    print(table(heads, rows), flush=True)
    return results


def model_args(cfg: Config, model: str):
    from model import PRESETS, ModelArgs

    shape = PRESETS[model] | ({"max_seq_len": cfg.max_seq_len} if cfg.max_seq_len else {})
    return ModelArgs(**shape, vocab_size=5000 if model == "demo" else cfg.vocab_size)


def matrix_speed() -> dict[str, float]:
    """FLOP/s of a large matrix product on this device, by type: the peak that training can come near to."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, found = (8192 if device == "cuda" else 2048), {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = timed(lambda a=a, b=b: a @ b, 8, device)
        found[name] = 2 * size**3 / min(times)
    return found


def timed(function: Callable[[], object], repeats: int, device: str) -> list[float]:
    """Seconds of each call, after warming up."""
    import torch

    times = []
    for _ in range(repeats + WARM):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[WARM:]


def gpu_memory() -> int:
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def original(cfg: Config, model: str) -> tuple[float, int]:
    """Eager, logits whole and in fp32, AdamW as torch makes it by default, one micro-batch a step."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = model_args(cfg, model)
    step = original_step(args, device)
    tokens = torch.randint(0, args.vocab_size, (cfg.micro_batch, args.max_seq_len + 1), device=device)
    seconds = statistics.median(timed(lambda: step(tokens[:, :-1], tokens[:, 1:]), cfg.steps, device))
    return cfg.micro_batch * args.max_seq_len / seconds, gpu_memory()


def original_step(args, device: str) -> Callable[..., None]:
    """A function that trains a new model of this shape on tokens and targets (b, T), in the original's way."""
    import torch
    import torch.nn.functional as F

    from model import Transformer

    network = Transformer(args).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    scaler = torch.amp.GradScaler(enabled=device == "cuda")

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.float16, enabled=device == "cuda"):
            loss = F.cross_entropy(network(tokens).float().flatten(0, 1), targets.flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def hugging_face(cfg: Config, model: str, bf16: bool) -> tuple[float, int]:
    """The Trainer with its defaults (fused AdamW), on the same shape."""
    import torch

    try:
        from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    except ImportError as error:
        raise UserError("缺少 transformers：pip install transformers accelerate") from error
    args = model_args(cfg, model)
    shape = LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=args.max_seq_len, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    ids = torch.randint(0, args.vocab_size, (64, args.max_seq_len)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=cfg.micro_batch, max_steps=cfg.steps + WARM + 3, bf16=bf16,
            learning_rate=3e-4, logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=not on_gpu, torch_compile=on_gpu and bf16, dataloader_pin_memory=on_gpu,
        )  # fmt: skip
        Trainer(LlamaForCausalLM(shape), settings, train_dataset=rows, callbacks=[Clock()]).train()
    seconds = statistics.median(b - a for a, b in zip(marks[WARM:], marks[WARM + 1 :], strict=False))
    return cfg.micro_batch * args.max_seq_len / seconds, gpu_memory()


def ours(cfg: Config, model: str) -> tuple[float, int]:
    """pretrain.py itself, on a file of random tokens; its own log says how fast it was."""
    import numpy as np

    from training.log import read_log

    args = model_args(cfg, model)
    per_step, steps = cfg.micro_batch * args.max_seq_len, cfg.steps + WARM + 3
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "tokens.bin", Path(folder) / "out"
        rng = np.random.default_rng(0)
        rng.integers(3, args.vocab_size, per_step * steps + 1, dtype=np.uint16).tofile(data)
        command = [sys.executable, ROOT / "pretrain.py", "--data", data, "--valid", data, "--out", out]
        command += ["--model", model, "--max_seq_len", args.max_seq_len, "--batch_tokens", per_step]
        command += [
            "--micro_batch",
            cfg.micro_batch,
            "--max_steps",
            steps,
            "--log_every",
            1,
            "--eval_every",
            0,
        ]
        command += ["--eval_tokens", 1, "--sample_every", 0, "--save_every", 10**6, *cfg.options.split()]
        command += ["--tokenizer", made_up_vocabulary(args.vocab_size, Path(folder) / "made_up.model")]
        run_measured(command)
        records = [r for r in read_log(out / "log.jsonl") if "tokens_per_second" in r][WARM + 2 :]
    gigabytes = max(r.get("gpu_gb", 0) for r in records)
    return statistics.median(r["tokens_per_second"] for r in records), int(gigabytes * 1e9)


def made_up_vocabulary(size: int, path: Path) -> Path:
    """A SentencePiece model of as many entries, which nothing is encoded with.

    Written by hand: a ModelProto is a sequence of `pieces` {piece = 1, score = 2, type = 3}
    (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
    """
    names = ["<unk>", "<s>", "</s>", *(f"piece{i}" for i in range(size - 3))]
    entries = []
    for i, name in enumerate(names):
        kind = (2, 3, 3)[i] if i < 3 else 1  # unknown, control, normal
        body = bytes([0x0A, len(name)]) + name.encode() + b"\x15\0\0\0\0" + bytes([0x18, kind])
        entries.append(bytes([0x0A, len(body)]) + body)
    path.write_bytes(b"".join(entries) + b"\x12\x02\x18\x02")  # trainer_spec { model_type: BPE }
    return path


WAYS: dict[str, Callable[[Config, str], tuple[float, int]]] = {
    "original": original,
    "hf": lambda cfg, model: hugging_face(cfg, model, bf16=False),
    "hf-bf16": lambda cfg, model: hugging_face(cfg, model, bf16=True),
    "ours": ours,
}


if __name__ == "__main__":
    run_stage(Config, main)
