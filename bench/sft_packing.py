"""What packing is worth in fine-tuning: `python bench/sft_packing.py --data FILES --tokenizer MODEL`.

Instructions become sft_data.csv as in stage 3, and samples as in stage 4. Every way trains on them in a process of its
own; the ways take turns for several rounds, and the median counts. Printed are the share of positions that hold
nothing but padding (of a whole epoch), answer tokens learnt in a second, and the most memory. Ways:

    original  a step of the original project's kind: every sample padded to the longest context, eager, fp32, all
              logits, AdamW as torch makes it by default
    padded    our step (bf16 where the device has it, fused AdamW, logits where a label stands) on the same rows
    buckets   our step, samples of similar length together, padded to the longest of them (sft.py --no_pack)
    packed    our step on full rows (sft.py)
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from bench.measure import run_measured
from bench.training_speed import gpu_memory, original_step
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2
from sources.report import table, write_json
from stage import DEMO_DIR, ROOT, StageConfig, UserError, require, run_stage

Way = Literal["original", "padded", "buckets", "packed"]


@dataclass
class Config(StageConfig):
    """微调时补齐、按长度分组与装箱的速度和内存，与原项目式的训练步对照。"""

    data: tuple[Path, ...] = (DEMO_DIR / "sft",)  # 指令数据：文件或文件夹
    tokenizer: Path = CHATGLM2  # 词表
    models: tuple[Literal["demo", "92M", "218M"], ...] = ("92M", "demo")  # 比较哪些规模
    ways: tuple[Way, ...] = ("original", "padded", "buckets", "packed")  # 比较哪些做法；第一个是基准
    max_seq_len: int = 512  # 上下文长度：补齐到它
    batch: int = 64  # 每步的样本数（装箱时是平均数）
    micro_batch: int = 8  # 一次前向的行数
    original_batch: int = 4  # 原项目式的做法每步的样本数：它的全部 logits 都在内存里
    seconds: float = 12.0  # 预热一步之后，每种做法至少训练多久
    rounds: int = 3  # 各做法轮流运行几轮，取中位数
    out: Path | None = None  # 把结果写成 JSON
    worker: str = ""  # （内部）在本进程里跑一种做法，以 JSON 给出

    def check(self) -> None:
        for name in ("max_seq_len", "batch", "micro_batch", "original_batch", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")


def main(cfg: Config) -> None:
    if cfg.worker:
        print(json.dumps(learn(cfg, *json.loads(cfg.worker))))
        return
    if missing := [path for path in (*cfg.data, cfg.tokenizer) if not path.exists()]:
        raise UserError(f"找不到 {missing[0]}；请用 --data 与 --tokenizer 指定。")
    with tempfile.TemporaryDirectory() as folder:
        csv = Path(folder) / "sft.csv"
        prepare(cfg, csv)
        wasted, results = waste(cfg, csv), []
        for model in cfg.models:
            found: dict[str, list[tuple[float, int]]] = {way: [] for way in cfg.ways}
            for _ in range(cfg.rounds):
                for way in cfg.ways:
                    found[way].append(measure(cfg, csv, model, way))
            results += show(model, found, wasted)
    if cfg.out:
        write_json(cfg.out, results)


def prepare(cfg: Config, csv: Path) -> None:
    """Write the instructions as stage 3 does."""
    raw = csv.parent / "raw"
    raw.mkdir()
    for number, path in enumerate(cfg.data):
        (raw / f"{number}-{path.name}").symlink_to(path.resolve())
    run_measured([sys.executable, ROOT / "sft_data_process.py", "--data", raw, "--out", csv])


def read(cfg: Config, csv: Path):
    """The samples; tokenised once, by the first that asks."""
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
    from dataset_sft_tokens import load_samples
    from sources.aside import SetAside

    return load_samples(csv, ChatGLMTokenizer(cfg.tokenizer), cfg.max_seq_len, SetAside())


def steps(cfg: Config, samples, way: str) -> Iterator[list]:
    """The micro-batches of each step of an epoch."""
    import numpy as np

    from dataset_sft import SftBatches, collate, row_length

    if way in ("buckets", "packed"):
        row = row_length(samples, cfg.max_seq_len) if way == "packed" else None
        batches = SftBatches(samples, cfg.batch, cfg.micro_batch, 0, 1, seed=0, row=row)
        yield from (batches.step(step) for step in range(batches.steps_per_epoch))
        return
    batch = cfg.original_batch if way == "original" else cfg.batch
    micro_batch = batch if way == "original" else cfg.micro_batch
    order = np.random.default_rng(0).permutation(len(samples))
    for chosen in (order[i : i + batch] for i in range(0, len(order), batch)):
        parts = (chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch))
        rows = ([[samples[i]] for i in part] for part in parts)
        yield [collate(some, cfg.max_seq_len)._replace(documents=None) for some in rows]


def waste(cfg: Config, csv: Path) -> dict[str, float]:
    """The share of positions of an epoch that hold padding, of each way."""
    samples = read(cfg, csv)
    tokens = int((samples.lengths - 1).sum())
    print(
        f"{len(samples):,} samples of {tokens / len(samples):.0f} tokens, {int(samples.labels.sum()):,} answer tokens; "
        f"context {cfg.max_seq_len}"
    )
    return {
        way: 1 - tokens / sum(mb.tokens.numel() for mb in chain.from_iterable(steps(cfg, samples, way)))
        for way in cfg.ways
    }


def measure(cfg: Config, csv: Path, model: str, way: str) -> tuple[float, int]:
    """Answer tokens a second and peak bytes (of the GPU, else of the process), in a process of its own."""
    command = [sys.executable, Path(__file__).resolve(), "--worker", json.dumps([str(csv), model, way])]
    for name in ("tokenizer", "max_seq_len", "batch", "micro_batch", "original_batch", "seconds"):
        command += [f"--{name}", getattr(cfg, name)]
    printed, cost = run_measured(command)
    speed, memory = json.loads(printed.strip().splitlines()[-1])
    return speed, memory or cost.largest


def learn(cfg: Config, csv: str, model: str, way: str) -> tuple[float, int]:
    """Answer tokens a second of one way, and the peak of the GPU's memory."""
    import torch

    from model import IGNORE, PRESETS, ModelArgs

    samples = read(cfg, Path(csv))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = PRESETS[model] | dict(max_seq_len=cfg.max_seq_len, vocab_size=64793)
    make_step = plain if way == "original" else ours
    step = make_step(ModelArgs(**shape), device)
    endless = chain.from_iterable(steps(cfg, samples, way) for _ in count())
    answers, start = 0, None
    for micro_batches in chain(islice(endless, 1), endless):
        step(micro_batches)
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if start is None:  # the first step warms up
            start = now
            continue
        answers += sum(int((mb.targets != IGNORE).sum()) for mb in micro_batches)
        if now - start >= cfg.seconds:
            return answers / (now - start), gpu_memory()
    raise AssertionError("unreachable")


def plain(args, device: str) -> Callable[[list], None]:
    """The original's kind of step; it knows one micro-batch."""
    step = original_step(args, device)
    return lambda micro_batches: step(micro_batches[0].tokens.to(device), micro_batches[0].targets.to(device))


def ours(args, device: str) -> Callable[[list], None]:
    """What the loop does in a step (training/loop.py), without its log."""
    import torch

    from model import Transformer
    from sft import Config as SftConfig
    from training import guards, recipes, runtime
    from training.optimizer import make_optimizer

    dtype = runtime.choose_dtype(torch.device(device), "auto")
    this = runtime.Runtime(torch.device(device), dtype)
    network = Transformer(args).to(device)
    optimizer = make_optimizer(network, recipes.settle(SftConfig(), 100, None), dtype)

    def step(micro_batches: list) -> None:
        bearing = guards.tally(micro_batches)[0]
        for mb in (mb.to(this.device) for mb in micro_batches):
            with this.autocast():
                extra = dict(documents=mb.documents, labelled=mb.labelled)
                loss = network(mb.tokens, mb.targets, reduction="sum", **extra) / bearing
            loss.backward()
        runtime.clip_gradients(network, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def show(model: str, found: dict[str, list[tuple[float, int]]], wasted: dict[str, float]) -> list[dict]:
    """Print the figures of a shape; returns them."""
    results = []
    for way, values in found.items():
        speed, memory = (statistics.median(v) for v in zip(*values, strict=True))
        results.append(
            dict(model=model, way=way, wasted=wasted[way], answers_per_second=speed, memory=memory)
        )
    first, rows = results[0], []
    for result, values in zip(results, found.values(), strict=True):
        speeds = [speed for speed, _ in values]
        rows.append(
            [
                result["way"],
                f"{result['wasted']:.1%}",
                f"{result['answers_per_second']:,.1f}",
                f"{result['answers_per_second'] / first['answers_per_second']:.1f}",
                f"{result['memory'] / 2**30:.2f}",
                f"{min(speeds):,.1f}–{max(speeds):,.1f}",
            ]
        )
    print(f"\n{model}")
    print(table(["", "wasted", "answer token/s", "ratio", "GiB", "range"], rows), flush=True)
    return results


if __name__ == "__main__":
    run_stage(Config, main)
