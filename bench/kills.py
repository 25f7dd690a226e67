"""Does a run survive being killed? `python bench/kills.py` kills a real pretrain.py again and again.

One run is left alone; another gets SIGKILL at random moments, some of them forced inside the writing of a checkpoint,
and goes on with --resume. At the end both must have the same weights and optimizer state, byte for byte, and the
same log. A third run changes between one process and two: the data must be the same, and the losses to rounding.
"""

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from stage import DEMO_DIR, ROOT, StageConfig, UserError, need, require, run_stage
from training.checkpoint import find
from training.log import read_log

SHAPE: dict[str, object] = dict(
    dim=64, n_layers=2, n_heads=2, max_seq_len=64, batch_tokens=1024, lr=3e-3, warmup=10
)
SHAPE |= dict(device="cpu", precision="fp32", log_every=1, eval_every=0, eval_tokens=64)
OPTIONS = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]


@dataclass
class Config(StageConfig):
    """Kill a run of pretrain.py at random moments and compare its end with that of a run left alone."""

    data: Path = DEMO_DIR / "pretrain_data.bin"  # tokens to train on; by default the demo's, made if missing
    kills: int = 20  # how often the run is killed
    inside: int = 3  # how many of these inside the writing of a checkpoint
    steps: int = 600  # steps of a run
    save_every: int = 10  # steps between two checkpoints
    seed: int = 0  # of the moments
    work: Path | None = None  # where the runs are written; by default a temporary folder

    def check(self) -> None:
        require(1 <= self.inside <= self.kills, "inside", self.inside, "至少为 1，且不大于 --kills")
        require(self.steps >= 2 * self.kills, "steps", self.steps, "至少为 --kills 的两倍")


def main(cfg: Config) -> None:
    cfg.demo = True  # so that a missing demo corpus is made
    need(cfg.data, "data_process.py", cfg)
    with tempfile.TemporaryDirectory() as temporary:
        work = cfg.work or Path(temporary)
        start = time.perf_counter()
        finish(cfg, work / "unbroken")
        print(f"unbroken run of {cfg.steps} steps: {time.perf_counter() - start:.0f} s", flush=True)
        found_inside = kill_repeatedly(cfg, work / "killed")
        same = compare_bytes(work / "unbroken", work / "killed")
        print(f"{cfg.kills} kills, {found_inside} inside a write: " + ("same bytes" if same else "DIFFERENT"))
        data, worst = change_processes(cfg, work / "changed", work / "unbroken")
        print(f"1 -> 2 -> 1 processes: {'same' if data else 'DIFFERENT'} data, losses within {worst:.1e}")
    if not (same and data and found_inside >= cfg.inside and worst < 2e-3):
        raise UserError("中断过的训练与没有中断过的不同，见上面的输出。")


def command(cfg: Config, out: Path, processes: int = 1) -> list[str]:
    """pretrain.py on the tiny model; it starts anew where there is nothing to resume."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    valid = cfg.data.with_name("none.bin")  # no validation: it is not what is tested here
    options = ["--data", cfg.data, "--valid", valid, "--out", out, "--max_steps", cfg.steps, "--resume"]
    options += ["--save_every", cfg.save_every, *OPTIONS]
    start = [sys.executable, *(several if processes > 1 else []), ROOT / "pretrain.py"]
    return [str(word) for word in (*start, *options)]


def finish(cfg: Config, out: Path) -> None:
    """Run to the last step."""
    done = subprocess.run(command(cfg, out), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"训练没有完成：{(done.stderr or done.stdout).strip().splitlines()[-1]}")


def last_step(out: Path) -> int:
    """The last logged step of a run; only the end of the log is read, for this is asked all the time."""
    with suppress(OSError), open(out / "log.jsonl", "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        found = re.findall(rb'"step": (\d+), .*\n', log.read())
        return int(found[-1]) if found else 0
    return 0


def is_writing(out: Path) -> bool:
    """Whether a checkpoint is half-written."""
    return any(out.glob(".step_*.tmp-*"))


def kill_when(cfg: Config, out: Path, ready: Callable[[], bool], processes: int = 1) -> bool:
    """Start or resume a run and kill all of it once `ready`; False if it came to its end before."""
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # A session of its own: torchrun and its workers are found by it, and nothing else is.
    run = subprocess.Popen(command(cfg, out, processes), start_new_session=True, **quiet)
    workers = children(run.pid) if processes > 1 else []
    while run.poll() is None and not ready():
        time.sleep(0.001)
        if processes > 1 and len(workers) < processes:
            workers = children(run.pid)
    was_running = run.poll() is None
    for pid in (*workers, run.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.wait()
    return was_running


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill_repeatedly(cfg: Config, out: Path) -> int:
    """Kill a run at random moments, then let it finish; returns how many kills left a half-written checkpoint."""
    rng, inside = random.Random(cfg.seed), 0
    forced = set(rng.sample(range(cfg.kills), cfg.inside))
    for number in range(cfg.kills):
        begin = last_step(out)
        # So far it may come: the steps left are shared among the kills left.
        share = max(1, (cfg.steps - begin) // (cfg.kills - number + 1))
        goal, pause = begin + rng.randint(0, share), rng.random() * 0.05
        if number in forced:
            alive = kill_when(cfg, out, lambda goal=goal: last_step(out) >= goal and is_writing(out))
        else:

            def at_random(goal: int = goal, pause: float = pause) -> bool:
                if last_step(out) < goal:
                    return False
                time.sleep(pause)  # anywhere in a step
                return True

            alive = kill_when(cfg, out, at_random)
        inside += is_writing(out)
        print(f"  kill {number + 1}: step {last_step(out)}" + ("" if alive else ", too late"), flush=True)
    finish(cfg, out)
    return inside


def compare_bytes(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, optimizer state and log."""
    files = ("model.safetensors", "optimizer.safetensors")
    same = all((find(one) / name).read_bytes() == (find(other) / name).read_bytes() for name in files)
    return same and figures(one) == figures(other)


def figures(out: Path) -> dict[int, tuple[str, float]]:
    """Fingerprint of the data so far, and loss, of each step."""
    return {r["step"]: (r["data"], r["loss"]) for r in read_log(out / "log.jsonl") if "loss" in r}


def change_processes(cfg: Config, out: Path, unbroken: Path) -> tuple[bool, float]:
    """Run with one process, two, one, killed in between; whether the data was the same, and the worst loss."""
    for processes, goal in ((1, cfg.steps // 3), (2, 2 * cfg.steps // 3)):
        kill_when(cfg, out, lambda goal=goal: last_step(out) >= goal, processes)
    finish(cfg, out)
    expected, got = figures(unbroken), figures(out)
    same = [data for data, _ in got.values()] == [data for data, _ in expected.values()]
    return same, max(abs(got[step][1] - expected[step][1]) for step in got)


if __name__ == "__main__":
    run_stage(Config, main)
