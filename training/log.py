"""Log of a run: a console line and a JSON object in `log.jsonl` per logged step, passed on to trackers."""

import json
import math
import os
import time
from pathlib import Path

from sources.report import printable
from stage import atomic_path
from training.config import TrainConfig
from training.hardware import peak_memory
from training.runtime import Runtime
from training.trackers import Trackers


class Log:
    """Writes `log.jsonl`, prints the same figures, passes them on; silent in all but the main process."""

    def __init__(
        self, cfg: TrainConfig, runtime: Runtime, step: int, tokens: int, total_steps: int, flops: float
    ):
        """step, tokens: where the run starts. flops: per token, for the MFU."""
        self.path, self.runtime = cfg.out / "log.jsonl", runtime
        self.total_steps, self.flops = total_steps, flops
        self.peak = runtime.peak_flops()
        self.trackers = Trackers(cfg, step) if runtime.is_main else None
        self.unwritten = b""  # lines that are not in the file yet, because the disk is full
        self.rewind(step, tokens)  # last, because it starts the clock

    def rewind(self, step: int, tokens: int) -> None:
        """Go on from a step; the records of later ones are dropped."""
        self.last_step, self.last_tokens, self.last_time = step, tokens, time.perf_counter()
        self.reference: tuple[int, float] | None = None  # step and time of the first line, for the time left
        if self.runtime.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(self.path, step)

    def step(self, step: int, tokens: int, loss: float, lr: float, grad_norm: float, **also: object) -> None:
        """One line: step, tokens, loss, learning rate, gradient norm, ms, tokens/s, MFU, memory, time left.

        The speed is that of the steps since the last line; the time left counts evaluations and checkpoints too.
        also: more for the JSON record.
        """
        now = time.perf_counter()
        seconds = (now - self.last_time) / max(1, step - self.last_step)
        speed = (tokens - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_tokens, self.last_time = step, tokens, now
        mfu = speed * self.flops / (self.peak * self.runtime.world) if self.peak else None
        memory = peak_memory(self.runtime.device)
        self.write(
            step=step, tokens=tokens, loss=loss, lr=lr, grad_norm=grad_norm, ms=seconds * 1e3,
            tokens_per_second=speed, mfu=mfu, **memory, **also,
        )  # fmt: skip
        self.runtime.print(
            f"步 {step}/{self.total_steps} | token {tokens / 1e6:.2f}M | 损失 {loss:.4f} | lr {lr:.2e} | "
            f"梯度 {grad_norm:.2f} | {seconds * 1e3:.0f} ms | {speed:,.0f} token/s"
            + self.mfu_text(mfu)
            + (f" | 显存 {memory['gpu_gb']:.1f} GB" if "gpu_gb" in memory else "")
            + (f" | 内存 {memory['rss_gb']:.1f} GB" if "rss_gb" in memory else "")
            + f" | 剩余 {duration(self.seconds_left(step, now, seconds))}"
        )

    def mfu_text(self, mfu: float | None) -> str:
        """The MFU; "unknown" on a GPU whose peak is not known, and nothing on a CPU."""
        if mfu is not None:
            return f" | MFU {mfu:.1%}"
        return " | MFU 未知" if self.runtime.device.type == "cuda" else ""

    def seconds_left(self, step: int, now: float, seconds_per_step: float) -> float:
        """Wall time of the remaining steps at the mean pace since the first line, which holds the slow start."""
        if self.reference is None:
            self.reference = (step, now)
        first_step, first_time = self.reference
        pace = (now - first_time) / (step - first_step) if step > first_step else seconds_per_step
        return pace * (self.total_steps - step)

    def evaluation(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Figures of a validation, if there are any."""
        if not metrics:
            return
        self.write(step=step, tokens=tokens, **metrics)
        self.runtime.print(f"步 {step} 验证 | " + " | ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def samples(self, step: int, tokens: int, lines: list[str]) -> None:
        """Continuations that the model wrote, a line each, if there are any."""
        if not lines:
            return
        self.write(step=step, tokens=tokens, samples=[printable(line) for line in lines])
        for line in lines:
            self.runtime.print(f"步 {step} 续写 | {printable(line)}")

    def pause(self) -> "Pause":
        """`with log.pause():` keeps the time of an evaluation or a checkpoint out of the speed figures."""
        return Pause(self)

    def write(self, **record: object) -> None:
        """Append a record; a figure that is not finite is null, which any reader of JSON understands."""
        if self.trackers is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.unwritten += json.dumps(finite, ensure_ascii=False).encode() + b"\n"
        self.append()
        self.trackers.record(finite)

    def append(self) -> None:
        """Write what is not in the file yet. A full disk does not end a run: the lines wait until there is room."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(self.unwritten)
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # no half of a line
            if self.unwritten.count(b"\n") == 1:  # the first that waits
                reason = f"{self.path}：{error.strerror or error}"
                self.runtime.print(f"警告：无法写入日志 {reason}（训练继续，之后补写）")
            return
        self.unwritten = b""


class Pause:
    def __init__(self, log: Log):
        self.log = log

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.log.last_time += time.perf_counter() - self.start


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`: a resumed run writes them again, and the old ones would double them."""
    records = [r for r in read_log(path) if r["step"] <= step] if step else []
    with atomic_path(path) as temporary:
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
        temporary.write_text("".join(lines), encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """The records of a log; a line cut off by a crash, even inside a character, is passed over."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not UTF-8
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
