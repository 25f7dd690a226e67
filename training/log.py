"""Log of a run: one console line and one JSON object per logged step, and the loss curve drawn from them."""

import json
import time
from pathlib import Path

from stage import atomic_path
from training.runtime import Runtime


class Log:
    """Writes `log.jsonl`, prints the same figures, draws `loss.png`; silent in all but the main process."""

    def __init__(self, out: Path, runtime: Runtime, step: int, tokens: int, total_steps: int, flops: int):
        """step, tokens: where the run starts. flops: per token, for the MFU."""
        self.path, self.runtime = out / "log.jsonl", runtime
        self.total_steps, self.flops = total_steps, flops
        self.rewind(step, tokens)

    def rewind(self, step: int, tokens: int) -> None:
        """Go on from a step; the records of later ones are dropped."""
        self.last_step, self.last_tokens, self.last_time = step, tokens, time.perf_counter()
        if self.runtime.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            keep_until(self.path, step)

    def step(self, step: int, tokens: int, loss: float, lr: float, grad_norm: float, **also: object) -> None:
        """One line: step, tokens, loss, learning rate, gradient norm, ms, tokens/s, MFU, time left.

        also: more for the JSON record.
        """
        now = time.perf_counter()
        seconds = (now - self.last_time) / max(1, step - self.last_step)
        speed = (tokens - self.last_tokens) / max(now - self.last_time, 1e-9)
        self.last_step, self.last_tokens, self.last_time = step, tokens, now
        peak = self.runtime.peak_flops()
        mfu = speed * self.flops / (peak * self.runtime.world) if peak else None
        self.write(
            step=step, tokens=tokens, loss=loss, lr=lr, grad_norm=grad_norm, ms=seconds * 1e3,
            tokens_per_second=speed, mfu=mfu, **also,
        )  # fmt: skip
        self.runtime.print(
            f"步 {step}/{self.total_steps} | token {tokens / 1e6:.2f}M | 损失 {loss:.4f} | lr {lr:.2e} | "
            f"梯度 {grad_norm:.2f} | {seconds * 1e3:.0f} ms | {speed:,.0f} token/s"
            + (f" | MFU {mfu:.1%}" if mfu else "")
            + f" | 剩余 {duration(seconds * (self.total_steps - step))}"
        )

    def evaluation(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Figures of a validation, if there are any."""
        if not metrics:
            return
        self.write(step=step, tokens=tokens, **metrics)
        self.runtime.print(f"步 {step} 验证 | " + " | ".join(f"{k} {v:.4f}" for k, v in metrics.items()))

    def pause(self) -> "Pause":
        """`with log.pause():` keeps the time of an evaluation or a checkpoint out of the speed figures."""
        return Pause(self)

    def write(self, **record: object) -> None:
        if self.runtime.is_main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


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
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def read_log(path: Path) -> list[dict]:
    """The records of a log; a line cut off by a crash is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


def draw(out: Path) -> Path:
    """Draw `loss.png` from `log.jsonl`: training and validation loss and learning rate against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_log(out / "log.jsonl")
    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for key, label, style in (("loss", "training loss", "-"), ("val_loss", "validation loss", "o-")):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)
    rates = [(r["tokens"], r["lr"]) for r in records if "lr" in r]
    if rates:
        right = axis.twinx()
        right.plot(*zip(*rates, strict=True), color="grey", linewidth=0.8, linestyle=":")
        right.set_ylabel("learning rate (dotted)")
        right.set_ylim(bottom=0)
    axis.set_xlabel("tokens")
    axis.set_ylabel("loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(out / "loss.png")
    plt.close(figure)
    return out / "loss.png"
