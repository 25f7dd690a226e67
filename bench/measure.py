"""What a command costs: time, processor time and memory of it and of all processes that it starts."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from stage import UserError

with suppress(ImportError):  # Windows has none; run_measured says so
    import resource

INTERVAL = 0.1  # seconds between two looks at the memory
PROC = Path("/proc")
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, see getrusage(2)
# One thread, for packages that would take all processors; ours is told by its own options.
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class Cost(NamedTuple):
    """Memory is 0 where it cannot be seen (no /proc)."""

    wall: float  # seconds
    cpu: float  # seconds of processor time, user and system, of all processes
    memory: int  # bytes resident at the worst moment, summed over the processes: shared pages count in each
    anonymous: int  # bytes of these that are no files: what must really be there
    largest: int  # bytes resident at its worst moment of the largest single process


def run_measured(command: Sequence[object], environment: dict[str, str] | None = None) -> tuple[str, Cost]:
    """Run a command; returns what it printed, and its cost."""
    if not hasattr(os, "wait4"):
        raise UserError("这个基准要用 wait4 计量子进程，请在 Linux 或 macOS 上运行。")
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=errors, env={**os.environ, **(environment or {})}
        )
        watch = MemoryWatch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.stop()
        printed, complaint = _text(output), _text(errors)
    if process.returncode:
        last = (complaint.strip() or printed.strip() or "没有输出").splitlines()[-1]
        raise UserError(f"子进程失败（{process.returncode}）：{last}；命令：{' '.join(map(str, command))}")
    cpu = usage.ru_utime + usage.ru_stime
    # On Linux ru_maxrss is no less than what this process had when it started the other.
    largest = watch.largest or usage.ru_maxrss * MAXRSS_UNIT
    return printed, Cost(wall, cpu, watch.memory, watch.anonymous, largest)


class MemoryWatch:
    """Looks at the memory of a process and its descendants in a thread, until `stop`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.memory = self.anonymous = self.largest = 0  # bytes, the most so far
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while PROC.is_dir() and not self.ended.wait(INTERVAL):
            tree = [_status(pid) for pid in process_tree(self.pid)]
            self.memory = max(self.memory, sum(map(_resident, tree)))
            self.anonymous = max(self.anonymous, sum(map(_anonymous, tree)))
            self.largest = max(self.largest, *(1024 * fields.get("VmHWM", 0) for fields in tree))

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()


def process_tree(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            children.setdefault(_status(int(entry.name)).get("PPid", 0), []).append(int(entry.name))
    found = [pid]
    for process in found:  # grows while it is walked through
        found += children.get(process, [])
    return found


def restart_peak() -> int:
    """Let `peak_memory` count from now on, where the system can (Linux); returns bytes resident now."""
    try:
        (PROC / "self" / "clear_refs").write_text("5")  # see proc_pid_clear_refs(5)
    except OSError:
        return peak_memory()
    return _resident(_status(os.getpid()))


def peak_memory() -> int:
    """Most bytes that this process has had resident since `restart_peak`."""
    fields = _status(os.getpid())
    return (
        1024 * fields["VmHWM"] if fields else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
    )


def _resident(fields: dict[str, int]) -> int:
    return 1024 * fields.get("VmRSS", 0)


def _anonymous(fields: dict[str, int]) -> int:
    return 1024 * (fields.get("RssAnon", 0) + fields.get("RssShmem", 0))


def _status(pid: int) -> dict[str, int]:
    """Numbers in /proc/PID/status, memory in KiB; nothing if the process is gone."""
    try:
        lines = (PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split()[:2] for line in lines if len(line.split()) >= 2)
    return {name.rstrip(":"): int(value) for name, value in pairs if value.isdigit()}


def _text(file) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
