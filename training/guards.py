"""What keeps a long run alive: each guard watches one thing that can go wrong, and the loop asks it.

LateFigures   what a step left behind, read without making the device wait
SkippedSteps  losses and gradients that are not finite
SpikeWatch    losses far above those of the last steps
StopSignal    SIGTERM, SIGUSR1 and Ctrl-C
Watchdog      steps that never end
sole_run      two runs that write into the same folder
quiet_garbage the garbage collector's pauses
explain_memory  memory that does not suffice
"""

import faulthandler
import gc
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from model import IGNORE, ModelArgs
from stage import UserError
from training.loader import MicroBatch
from training.runtime import Runtime

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ADVICE = "请减小 --lr 或加长 --warmup，再用 --resume 从之前的检查点继续。"
SPIKE_STEPS = 3  # a spike that lasts so long will not pass by itself; one odd batch is no reason to go back
AROUND = 16  # batches before and after a spike that a rollback leaves out
ROLLBACKS = 2  # from one checkpoint; if a spike comes back once more, the data is not to blame
WARM_UP = 5  # steps after which what is alive stays alive: compiled code, optimizer state, buffers
LOCK_SECONDS = 10  # that a run waits for another one which is ending in its folder
COLLECT_EVERY = 1000  # steps between two collections of garbage


class Figures(NamedTuple):
    """What one step left behind; the same in every process."""

    step: int  # steps done with this one
    lr: float
    tokens: int  # seen in this step by all processes, without padding
    fingerprint: int  # of these tokens, see `tally`
    stopping: bool  # some process was asked to stop
    losses: list[float]  # each process's share; their sum is the mean loss of the step's tokens
    grad_norm: float  # before clipping
    skipped: bool  # not finite: weights and optimizer were left as they were

    @property
    def loss(self) -> float:
        return sum(self.losses)


class LateFigures:
    """Figures of steps on their way from the device, which never waits for the host.

    A step on a GPU is only queued when its Python code has run; reading its loss at once would drain the queue.
    So the copy to pinned memory is queued behind the step, and read when the next step has been queued too.
    (https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html#avoid-unnecessary-cpu-gpu-synchronization)
    """

    def __init__(self, lag: int):
        """lag: how many steps late figures are read; 0 where a step is done when its code has run (CPU)."""
        self.lag = lag
        self.waiting: deque[tuple] = deque()

    def put(
        self, step: int, lr: float, counts: Tensor, losses: Tensor, norm: Tensor, skipped: Tensor
    ) -> None:
        """counts: (3,) int64 tokens, fingerprint, processes asked to stop. losses: (world,). The rest: scalars."""
        values = torch.cat((norm.reshape(1), skipped.reshape(1), losses)).float()
        copies, event = [to_host(counts), to_host(values)], None
        if values.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self.waiting.append((step, lr, copies, event))

    def take(self, everything: bool) -> Iterator[Figures]:
        """The figures that have arrived, oldest first; everything: wait for the last ones too."""
        while len(self.waiting) > (0 if everything else self.lag):
            step, lr, (counts, values), event = self.waiting.popleft()
            if event is not None:
                event.synchronize()
            tokens, fingerprint, stopping = counts.tolist()
            norm, skipped, *losses = values.tolist()
            yield Figures(step, lr, tokens, fingerprint, stopping > 0, losses, norm, skipped > 0)

    def clear(self) -> None:
        self.waiting.clear()


def to_host(x: Tensor) -> Tensor:
    """A copy in the host's memory; from a GPU it arrives some time later."""
    if not x.is_cuda:
        return x.detach().to("cpu", copy=True)
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x.detach(), non_blocking=True)


def tally(micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Targets that bear loss, tokens without padding, and a fingerprint of the rows, (3,) int64.

    The fingerprint is a sum over rows (modulo 2^64): cutting a batch up differently does not change it, and other
    rows do. It is nothing but arithmetic on the device where the rows are.
    """
    counts = torch.zeros(3, dtype=torch.int64, device=micro_batches[0].tokens.device)
    for mb in micro_batches:
        places = torch.arange(1, mb.tokens.shape[1] + 1, device=counts.device)
        weights = places * places * 0x9E3779B1 + places  # (T,)
        rows = (mb.tokens * weights).sum(1)  # (b,); a zero, padding, adds nothing
        rows = (rows ^ (rows >> 29)) * 0x2545F4914F6CDD1D
        counts += torch.stack(((mb.targets != IGNORE).sum(), (mb.tokens != 0).sum(), rows.sum()))
    return counts


def chained(before: int, fingerprint: int) -> int:
    """The fingerprint of all steps so far, in their order (modulo 2^63: the JSON of any language holds it)."""
    return (before * 0x5851F42D4C957F2D + fingerprint) % 2**63


class SkippedSteps:
    """Counts the steps whose loss or gradient was not finite; gives up after too many in a row."""

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0):
        self.limit, self.total, self.in_a_row = limit, total, in_a_row

    def see(self, skipped: bool) -> None:
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def check(self, step: int) -> None:
        """UserError if there have been too many: other data will not help."""
        if self.in_a_row >= self.limit:
            raise UserError(
                f"到第 {step} 步为止，连续 {self.in_a_row} 步的损失或梯度不是有限数（上限 --max_skipped）；"
                f"之前的检查点未被改动。{ADVICE}"
            )


class SpikeWatch:
    """Notices losses far above the median of the last steps, in units of their usual deviation.

    The deviation is 1.4826 times the median absolute deviation: for normal noise the standard deviation, but
    spikes themselves hardly move it (https://en.wikipedia.org/wiki/Median_absolute_deviation).
    """

    def __init__(self, window: int, deviations: float, losses: Sequence[float] = (), lasted: int = 0):
        """window: steps that count as the last ones. deviations: how far is far; 0 notices nothing."""
        self.window, self.deviations = window, deviations
        self.losses = deque(losses, maxlen=window)
        self.lasted = lasted  # steps of the spike that is going on

    def see(self, loss: float) -> int:
        """How many steps a spike has lasted with this one; 0: there is none."""
        self.lasted = self.lasted + 1 if loss > self.threshold() else 0
        self.losses.append(loss)
        return self.lasted

    def threshold(self) -> float:
        """Losses above this are a spike; infinite until half of the window is known."""
        if not self.deviations or 2 * len(self.losses) < self.window:
            return float("inf")
        median = statistics.median(self.losses)
        deviation = 1.4826 * statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.deviations * max(deviation, 0.01 * median)  # a flat curve has next to none


def pass_over(step: int, avoided: Sequence[Sequence[int]]) -> int:
    """The next step that no range [first, end, ...] leaves out."""
    for first, end, *_ in sorted(avoided):
        if first <= step < end:
            step = end
    return step


def merge(*lists: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ranges of all lists, each once, in order."""
    return [list(item) for item in sorted({tuple(item) for items in lists for item in items})]


class StopSignal:
    """Notices SIGTERM, Ctrl-C and SIGUSR1 (Slurm's --signal): the loop then saves and ends at the next step.

    A second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.received = False
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.receive)

    def receive(self, number: int, frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


class Watchdog:
    """Ends this process when no step has finished for a while, so that torchrun can start it anew.

    A process that waits for another which is gone waits for ever: this is what a hung run looks like.
    """

    def __init__(self, minutes: float, rank: int):
        """minutes: 0 watches nothing. A step that compiles, an evaluation or a checkpoint must fit in them."""
        self.seconds, self.rank = 60 * minutes, rank
        self.last_beat = time.monotonic()
        self.ended = threading.Event()

    def beat(self) -> None:
        """Something was finished."""
        self.last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self.watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def watch(self) -> None:
        while not self.ended.wait(min(10, self.seconds / 5)):
            if time.monotonic() - self.last_beat < self.seconds:
                # If C code never gives the interpreter back, this thread is stuck too: then a timer of C's acts.
                faulthandler.dump_traceback_later(self.seconds + 60, exit=True)
                continue
            print(
                f"错误：进程 {self.rank} 有 {self.seconds / 60:g} 分钟没有完成一步（--hang_timeout），多半是在等待"
                "已经不在的进程，或设备卡住了；现在结束。用同样的命令加 --resume 继续。各线程停在：",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)  # neither locks nor queues of a hung process can be trusted


@contextmanager
def sole_run(out: Path, runtime: Runtime) -> Iterator[None]:
    """Hold the folder of a run, so that no other run writes there; UserError in all processes if one does."""
    with ExitStack() as held:
        runtime.main_first(lambda: held.enter_context(lock(out)))
        yield


@contextmanager
def lock(out: Path) -> Iterator[None]:
    """Lock a folder; the system gives it back when this process ends, however that happens."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not try_lock(file):  # the other may be about to end
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read() or "未知的进程"
                raise UserError(
                    f"另一次训练（{holder}）正在写入 {out}：请等它结束，或用 --out 换一个文件夹。"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{platform.node()} 的进程 {os.getpid()}")
        file.flush()
        yield


def try_lock(file: IO[str]) -> bool:
    """Lock a file unless another process has; where the system or the file system has no locks, all may have it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def quiet_garbage() -> Iterator[Any]:
    """Yield a function to be called after every step, which collects garbage when it suits the run.

    By itself Python looks at every object there is at moments of its own choosing: with millions of them, a
    pause of a tenth of a second, in each process at another step, for which all the others wait. Training makes
    hardly any cycles. So what is alive after the warm-up is set aside for good (gc.freeze), and the rest is
    looked at now and then, in all processes at the same step. (https://docs.python.org/3/library/gc.html)
    """
    done = 0

    def after_step() -> None:
        nonlocal done
        done += 1
        if done == WARM_UP:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif done % COLLECT_EVERY == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        gc.enable()
        gc.unfreeze()


@contextmanager
def explain_memory(cfg: Any, args: ModelArgs) -> Iterator[None]:
    """Turn running out of memory into one line that says which settings to change, with their values."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        knobs = [f"减小 --micro_batch（现在 {cfg.micro_batch}；结果不变）"]
        for name, what in (("recompute", "重算激活，慢一些而结果不变"), ("shard", "多卡分摊权重与优化器")):
            if getattr(cfg, name, True) is False:
                knobs.append(f"加 --{name}（{what}）")
        knobs.append(f"减小 --max_seq_len（现在 {args.max_seq_len}）或换小一些的模型")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "MemoryError"
        raise UserError(f"内存或显存不足。依次可以：{'；'.join(knobs)}。（{reason}）") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how torch or numpy says that memory does not suffice, on a GPU or on a CPU."""
    words = ("can't allocate memory", "DefaultCPUAllocator", "out of memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in str(error) for w in words)
