"""Restartable work: what is finished stays, what fails says so, no process is left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stage import UserError
from workers import WorkFolder, file_key

ROOT = Path(__file__).resolve().parents[1]


def square(task, folder):
    """A task that leaves a file, and a trace of every time that it is done."""
    number, trace = task
    with open(trace, "a", encoding="utf-8") as log:
        log.write(f"{number}\n")
    if number < 0:
        raise UserError(f"不能是 {number}")
    (folder / "square.txt").write_text(str(number**2), encoding="utf-8")
    return {"square": number**2}


def run(folder, numbers, workers=1, key=None):
    tasks = [(number, str(folder / "trace")) for number in numbers]
    with WorkFolder(folder / "work", key or {"a": 1}) as work:
        results = work.run("squares", square, tasks, [1] * len(tasks), workers, "平方")
        files = [(work.folder("squares", n) / "square.txt").read_text() for n in range(len(tasks))]
    assert files == [str(result["square"]) for result in results]
    return [result["square"] for result in results]


def done(folder):
    return sorted(map(int, (folder / "trace").read_text().split()))


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_the_folder_goes(tmp_path, workers):
    assert run(tmp_path, range(5), workers) == [0, 1, 4, 9, 16]
    assert not (tmp_path / "work").exists() and done(tmp_path) == list(range(5))


@pytest.mark.parametrize("workers", [1, 2])
def test_finished_tasks_are_not_repeated_after_an_error(tmp_path, workers):
    with pytest.raises(UserError, match="不能是 -1"):
        run(tmp_path, [2, 3, -1], workers)
    before = done(tmp_path)
    with pytest.raises(UserError):
        run(tmp_path, [2, 3, -1], workers)
    assert set(done(tmp_path)) == {-1, 2, 3}
    if workers == 1:
        assert done(tmp_path) == sorted([*before, -1])


def test_another_key_starts_afresh(tmp_path):
    with pytest.raises(UserError):
        run(tmp_path, [2, -1])
    assert run(tmp_path, [3], key={"a": 2}) == [9]


def test_a_damaged_key_starts_afresh(tmp_path):
    with pytest.raises(UserError):
        run(tmp_path, [2, -1])
    (tmp_path / "work" / "key.json").write_bytes(b"\xff")
    assert run(tmp_path, [3]) == [9]


def test_the_key_notices_changed_files(tmp_path):
    file = tmp_path / "file"
    file.write_text("a")
    before = file_key([file])
    assert file_key([file]) == before
    os.utime(file, (1, 1))
    assert file_key([file]) != before


def sleepy(task, folder):
    Path(task).with_name(f"pid-{os.getpid()}").touch()
    time.sleep(60)
    return {}


def test_workers_die_with_the_main_process(tmp_path):
    code = (
        "from test_workers import *\n"
        "if __name__ == '__main__':\n"
        f"    with WorkFolder(Path({str(tmp_path / 'work')!r}), {{}}) as work:\n"
        f"        work.run('sleep', sleepy, [{str(tmp_path / 'x')!r}] * 2, [1, 1], 2, '睡')\n"
    )
    (tmp_path / "main.py").write_text(code, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    while len(list(tmp_path.glob("pid-*"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    workers = [int(file.name.removeprefix("pid-")) for file in tmp_path.glob("pid-*")]
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the main process"
        time.sleep(0.1)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # a zombie waits for whoever adopted it
    return not (state.exists() and ") Z " in state.read_text())


def killed(task, folder):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_gives_advice(tmp_path):
    with (
        pytest.raises(UserError, match="--workers"),
        WorkFolder(tmp_path / "work", {}) as work,
    ):
        work.run("killed", killed, [0, 1], [1, 1], 2, "终止")
    assert not multiprocessing.active_children()
    assert json.loads((tmp_path / "work" / "key.json").read_text(encoding="utf-8"))
