"""Experiment trackers that a run reports to besides its own log: TensorBoard, Weights & Biases, SwanLab.

Each is optional and imported only where it is asked for. A tracker is a convenience: whatever goes wrong inside
one is said once, and training goes on without it.
"""

import atexit
import importlib.util
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sources.report import settings, write_json
from stage import UserError

if TYPE_CHECKING:
    from training.config import TrainConfig

PROJECT = "baby-llama2-chinese"


class Tracker(Protocol):
    """One tracker. The constructor opens the run: `Tracker(cfg, run_id, step)`, step being where it goes on."""

    def figures(self, step: int, figures: dict[str, float]) -> None: ...

    def text(self, step: int, lines: list[str]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `out/tensorboard`; what an interrupted run wrote after `step` is hidden (purge_step)."""

    def __init__(self, cfg: "TrainConfig", run_id: str, step: int):
        from torch.utils.tensorboard import SummaryWriter  # https://pytorch.org/docs/stable/tensorboard.html

        self.writer = SummaryWriter(str(cfg.out / "tensorboard"), purge_step=step + 1, flush_secs=30)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, lines: list[str]) -> None:
        self.writer.add_text("samples", "\n\n".join(lines), step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """https://docs.wandb.ai/ref/python/init; steps that a resumed run repeats are ignored by the server."""

    def __init__(self, cfg: "TrainConfig", run_id: str, step: int):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=PROJECT,
            name=cfg.out.name,
            id=run_id,
            resume="allow",
            dir=str(cfg.out.absolute()),
            config=settings(cfg),
        )

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.run.log(figures, step=step)

    def text(self, step: int, lines: list[str]) -> None:
        table = self.wandb.Table(columns=["sample"], data=[[line] for line in lines])
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """https://docs.swanlab.cn/api/py-init.html"""

    def __init__(self, cfg: "TrainConfig", run_id: str, step: int):
        import swanlab

        self.swanlab = swanlab
        folder = cfg.out / "swanlab"
        folder.mkdir(exist_ok=True)
        swanlab.init(
            project=PROJECT,
            experiment_name=cfg.out.name,
            id=run_id,
            resume="allow",
            logdir=str(folder),
            config=settings(cfg),
        )

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.swanlab.log(figures, step=step)

    def text(self, step: int, lines: list[str]) -> None:
        self.swanlab.log({"samples": [self.swanlab.Text(line) for line in lines]}, step=step)

    def close(self) -> None:
        self.swanlab.finish()


TRACKERS: dict[str, Callable[..., Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab}


def check_installed(names: tuple[str, ...]) -> None:
    """Raise UserError, with the command that helps, for a tracker whose package is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--track {name} 需要 {name} 包；请运行 pip install {name}，或去掉 --track {name}。"
            )


class Trackers:
    """The trackers of a run, in its main process."""

    def __init__(self, cfg: "TrainConfig", step: int):
        """step: where the run goes on; after 0 it continues the same run of every tracker."""
        self.active: dict[str, Tracker] = {}
        if cfg.track:
            run_id = resumed_run_id(cfg.out / "tracking.json", step)
            for name in cfg.track:
                tracker = self.attempt(name, lambda name=name: TRACKERS[name](cfg, run_id, step))
                if tracker is not None:
                    self.active[name] = tracker
            atexit.register(self.close)  # also after an error, so that the last figures are not lost

    def record(self, record: dict[str, Any]) -> None:
        """Pass a record of the log on: its numbers as curves, its samples as text."""
        figures = {k: v for k, v in record.items() if k != "step" and isinstance(v, int | float)}
        for name, tracker in list(self.active.items()):
            if "samples" in record:
                self.attempt(name, lambda t=tracker: t.text(record["step"], record["samples"]))
            elif figures:
                self.attempt(name, lambda t=tracker: t.figures(record["step"], figures))

    def close(self) -> None:
        for name, tracker in list(self.active.items()):
            self.attempt(name, tracker.close)
        self.active = {}

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """Do something with a tracker; if it fails, say so and go on without it."""
        try:
            return action()
        except Exception as error:  # anything: network, login, disk, a change of its interface
            self.active.pop(name, None)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"{name} 出错，不再向它记录（训练照常，log.jsonl 不受影响）：{reason}", flush=True)
            return None


def resumed_run_id(path: Path, step: int) -> str:
    """The id under which the trackers know this run; a new one for a run that starts from nothing."""
    if step and path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError):
            print(f"{path} 已损坏：在记录工具里开始新的一条。", flush=True)
    run_id = secrets.token_hex(11)[:21]  # SwanLab used to insist on 21 lower-case letters and digits
    write_json(path, {"id": run_id})
    return run_id
