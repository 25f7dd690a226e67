"""Restartable work in worker processes: a task that is finished stays finished, whatever happens next.

    with WorkFolder(folder, key) as work:
        results = work.run("tokenise", tokenise, tasks, sizes, workers, label="分词")

A task writes its files into a folder of its own, which gets its final name only when the task is done; a
second run with the same key finds it there and goes on behind it. The order of results, and so all that is
made of them, does not depend on the number of workers.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stage import ROOT, UserError, atomic_path, remove

Function = Callable[[Any, Path], dict[str, Any]]  # (task, its folder) -> result, made of JSON values
RESULT = "result.json"
KEY = "key.json"


class WorkFolder:
    """Intermediate results on disk; deleted when the block that uses them ends without an error."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        """key: all that the results depend on, i.e. settings and input files; the code is added to it."""
        self.path = path
        self.key = json.dumps({**key, "code": code_hash()}, ensure_ascii=False, sort_keys=True, default=str)

    def __enter__(self) -> "WorkFolder":
        key_file = self.path / KEY
        if key_file.is_file() and key_file.read_bytes() == self.key.encode():
            print(f"从上次中断的地方继续（{self.path}）", flush=True)
            for leftover in self.path.glob("*/.*.tmp-*"):
                remove(leftover)
        else:
            remove(self.path)
            with atomic_path(key_file) as temporary:
                temporary.write_text(self.key, encoding="utf-8")
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            remove(self.path)

    def folder(self, step: str, number: int) -> Path:
        """Where the files of a task are when it is finished."""
        return self.path / step / f"{number:06d}"

    def run(
        self,
        step: str,
        function: Function,
        tasks: Sequence[Any],
        sizes: Sequence[int],
        workers: int,
        label: str,
    ) -> list[dict[str, Any]]:
        """The results of all tasks, in order; what an earlier run finished is not done again.

        function: a module's own (no lambda), so that other processes can import it. sizes: bytes of each task,
        for the progress bar. workers: processes; 0 for as many as there are processors.
        """
        folders = [self.folder(step, number) for number in range(len(tasks))]
        unfinished = [n for n, folder in enumerate(folders) if not (folder / RESULT).is_file()]
        jobs = [(function, tasks[n], folders[n]) for n in unfinished]
        with progress(sum(sizes), label) as advance:
            advance(sum(sizes) - sum(sizes[n] for n in unfinished))
            for position in run_jobs(jobs, min(workers or processors(), len(jobs))):
                advance(sizes[unfinished[position]])
        return [json.loads((folder / RESULT).read_text(encoding="utf-8")) for folder in folders]


@contextmanager
def progress(total: int, label: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes; where there is no terminal a plain line at most every half minute."""
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        done, begin = 0, time.monotonic()
        last = begin

        def advance(size: int) -> None:
            nonlocal done, last
            done += size
            bar.update(size)
            now = time.monotonic()
            if bar.disable and now - last > 30 and done:
                left = (now - begin) * (total - done) / done
                print(f"{label}：{done / max(total, 1):.0%}，还需约 {left / 60:.0f} 分钟", flush=True)
                last = now

        yield advance


def run_jobs(jobs: list[tuple[Function, Any, Path]], processes: int) -> Iterator[int]:
    """Do every job, in this process or in several; yields its position when it is finished."""
    if processes <= 1:
        for position, job in enumerate(jobs):
            finish(*job)
            yield position
        return
    # Not forked: the threads of Arrow and of tokenizers do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent) as pool:
        try:
            positions = {pool.submit(finish, *job): position for position, job in enumerate(jobs)}
            for future in as_completed(positions):
                future.result()
                yield positions[future]
        except BrokenProcessPool as error:
            raise UserError(
                "一个工作进程被系统终止（多半是内存不足）；请减小 --workers 后重跑，已完成的部分不会重做。"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def finish(function: Function, task: Any, final: Path) -> None:
    """Run one task; its folder appears under its final name together with its result."""
    with atomic_path(final) as folder:
        folder.mkdir()
        result = function(task, folder)
        (folder / RESULT).write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")


def die_with_parent() -> None:
    """End this worker when the main process is gone, even if that was killed without a chance to say so."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def code_hash() -> str:
    """Of all code that intermediate results depend on: results of an older version are not continued."""
    files = sorted(
        file
        for pattern in ("*.py", "sources/*.py", "data_clean/*.py", "chatglm_tokenizer/*.py")
        for file in ROOT.glob(pattern)
    )
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def file_key(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """What tells whether input files have changed: name, bytes, time of the last change."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
