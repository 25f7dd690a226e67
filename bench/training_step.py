"""What the choices behind a training step are worth on this CPU: `python bench/training_step.py`.

Every variant runs in a process of its own, in turn, for several rounds; printed are the median milliseconds
of a step and the ratio to the first row (higher is faster). Rows:

    plain loss       full fp32 logits and F.cross_entropy, the original's kind
    chunked loss     model.py as it is
    bf16             the same under bf16 autocast
    … + neighbour    another process keeps one core busy
    spinning threads OpenMP's default waiting, which stage.py cuts short
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from stage import ROOT, StageConfig, run_stage

VARIANTS: dict[str, dict] = {
    "plain loss": dict(plain=True),
    "chunked loss": {},
    "chunked loss, bf16": dict(bf16=True),
    "chunked loss, spinning threads": dict(spin=True),
    "chunked loss + neighbour": dict(neighbour=True),
    "chunked loss, spinning threads + neighbour": dict(spin=True, neighbour=True),
}


@dataclass
class Config(StageConfig):
    """Time a training step of the demo's shape in several variants."""

    rounds: int = 3  # how often every variant runs
    steps: int = 5  # steps timed in a round; their median counts
    vocab_size: int = 5000  # entries of the vocabulary
    batch: int = 16  # windows of 256 tokens
    worker: str = ""  # (internal) run one variant, given as JSON, and print its milliseconds


def main(cfg: Config) -> None:
    if cfg.worker:
        print(time_steps(cfg, **json.loads(cfg.worker)))
        return
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(cfg.rounds):
        for name, variant in VARIANTS.items():
            times[name].append(run_variant(cfg, dict(variant)))
    first = statistics.median(next(iter(times.values())))
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"{name:<45} {median:8.0f} ms   x{first / median:.2f}   ({min(values):.0f} to {max(values):.0f})"
        )


def run_variant(cfg: Config, variant: dict) -> float:
    """Milliseconds of a step of one variant, in a process of its own."""
    environment = dict(os.environ)
    if variant.pop("spin", False):
        environment["GOMP_SPINCOUNT"] = "300000"  # libgomp's default
    neighbour = multiprocessing.Process(target=spin_forever, daemon=True)
    if variant.pop("neighbour", False):
        neighbour.start()
    command = [sys.executable, str(ROOT / "bench" / "training_step.py"), "--worker", json.dumps(variant)]
    for name in ("steps", "vocab_size", "batch"):
        command += [f"--{name}", str(getattr(cfg, name))]
    try:
        return float(
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        )
    finally:
        if neighbour.is_alive():
            neighbour.kill()


def spin_forever() -> None:
    while True:
        pass


def time_steps(cfg: Config, plain: bool = False, bf16: bool = False) -> float:
    """Median milliseconds of forward, backward and optimizer."""
    import torch
    import torch.nn.functional as F

    from model import PRESETS, ModelArgs, Transformer

    torch.manual_seed(0)
    model = Transformer(ModelArgs(**PRESETS["demo"], vocab_size=cfg.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, cfg.vocab_size, (cfg.batch, 256))
    times = []
    for _ in range(cfg.steps + 2):  # two to warm up
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if plain:
                loss = F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())
            else:
                loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


if __name__ == "__main__":
    run_stage(Config, main)
