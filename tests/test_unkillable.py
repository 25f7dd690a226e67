"""What a long run survives: bad steps, spikes, signals, full disks, hangs, killed processes."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, script

from model import IGNORE, ModelArgs, Transformer
from stage import UserError
from training import checkpoint, guards
from training.config import TrainConfig
from training.loader import MicroBatch
from training.log import Log, read_log
from training.loop import train
from training.optimizer import factor as schedule
from training.recipes import settle
from training.runtime import Runtime, agree_on_name

ARGS = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=50, max_seq_len=8)
TINY = ["--dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_seq_len", 32, "--batch_tokens", 256]
TINY += ["--lr", 3e-3, "--log_every", 1, "--device", "cpu", "--precision", "fp32", "--eval_tokens", 32]


class Rows:
    """Random rows, a function of the step; remembers which steps were asked for."""

    steps_per_epoch, signature = 1000.0, {"seed": 0}

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}  # tokens of a micro-batch -> its step

    def step(self, step: int) -> list[MicroBatch]:
        rows = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(step))
        parts = [MicroBatch(part[:, :-1], part[:, 1:]) for part in rows.split(2)]
        self.known |= {part.tokens.numpy().tobytes(): step for part in parts}
        return parts

    def step_of(self, tokens: torch.Tensor) -> int:
        return self.known.get(tokens.numpy().tobytes(), -1)

    def describe(self, step: int) -> str:
        return f"rows of {step}"


class Troubled(Transformer):
    """A model whose loss is multiplied, in some steps of the data, by something that does not belong there."""

    def __init__(self, rows: Rows, trouble: dict[int, float]):
        torch.manual_seed(0)
        super().__init__(ARGS)
        self.rows, self.trouble = rows, trouble
        self.seen: list[int] = []  # steps of the data trained on

    def forward(self, tokens, *args, **kwargs):
        step = self.rows.step_of(tokens)
        if self.training and step not in self.seen[-1:]:
            self.seen.append(step)
        return super().forward(tokens, *args, **kwargs) * self.trouble.get(step, 1.0)


@pytest.fixture(autouse=True)
def handlers():
    """Training in this process takes over the signals; give them back. Tiny matrices need no second thread."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def settings(out: Path, **values) -> TrainConfig:
    return TrainConfig(out=out, recipe="original", lr=1e-2, log_every=1, eval_every=0, device="cpu", **values)


def run(cfg: TrainConfig, trouble: dict[int, float]) -> tuple[Troubled, Rows]:
    """Train in this process, with trouble at some steps of the data."""
    rows = Rows()
    model = Troubled(rows, trouble)
    cfg = settle(cfg, cfg.total_steps(rows.steps_per_epoch), None)
    train(
        cfg,
        Runtime(torch.device("cpu"), torch.float32),
        model,
        {"tokenizer.model": b"vocabulary"},
        rows,
        lambda model: {},
    )
    return model, rows


def reference(steps: list[int], skip: set[int], total: int) -> dict[str, torch.Tensor]:
    """Weights after plain PyTorch training on these steps of the data, without those to be skipped."""
    rows, cfg = Rows(), settle(settings(Path()), total, None)
    torch.manual_seed(0)
    model = Transformer(ARGS)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(cfg.beta1, cfg.beta2),
    )
    for step in steps:
        if step in skip:
            continue
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * schedule(step, total, cfg)
        parts = rows.step(step)
        x, y = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
    return model.state_dict()


def assert_same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_left_out_and_reported(factor, tmp_path, capfd) -> None:
    model, _ = run(settings(tmp_path, max_steps=12), {0: factor, 5: factor, 6: factor})
    assert_same_weights(model, reference(list(range(12)), {0, 5, 6}, 12))
    printed = capfd.readouterr().out
    assert printed.count("rows of ") == 3
    assert all(f"rows of {step}" in printed for step in (0, 5, 6))
    records = read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in records if r.get("skipped")] == [1, 6, 7]
    assert [r["step"] for r in records if "loss" in r] == [2, 3, 4, 5, 8, 9, 10, 11, 12]


def test_too_many_in_a_row_stop_and_no_checkpoint_is_written_meanwhile(tmp_path) -> None:
    nan = float("nan")
    cfg = settings(tmp_path, max_steps=30, save_every=1, keep_last=1, max_skipped=4)
    with pytest.raises(UserError, match="--lr"):
        run(cfg, {3: nan, 4: nan, 5: nan, 8: nan, 9: nan, 10: nan, 11: nan})  # three in a row, then four
    assert [f.name for f in checkpoint.list_steps(tmp_path)] == ["step_00000008"]


def test_a_spike_is_reported_once_and_a_rollback_leaves_its_data_out(tmp_path, capfd) -> None:
    trouble = dict.fromkeys(range(60, 66), 8.0)
    options = dict(max_steps=100, save_every=20, keep_last=9, spike_window=32)
    run(settings(tmp_path / "warn", **options), trouble)
    assert capfd.readouterr().out.count("远高于") == 1
    assert [r["step"] for r in read_log(tmp_path / "warn" / "log.jsonl") if "spike" in r] == [61]
    model, _ = run(settings(tmp_path / "back", on_spike="rollback", **options), trouble)
    # Seen after three steps of it, at step 63; back to step 40; left out is all within 16 of the spike.
    left = [*range(44), *range(79, 100)]

    assert model.seen == [*range(63), *range(40, 44), *range(79, 100)]
    assert_same_weights(model, reference(left, set(), 100))
    curve = [r["step"] for r in read_log(tmp_path / "back" / "log.jsonl") if "loss" in r]
    assert curve == [step + 1 for step in left]


def test_a_rollback_interrupted_anywhere_ends_with_the_same_weights(tmp_path, monkeypatch) -> None:
    trouble = dict.fromkeys(range(60, 66), 8.0)
    options = dict(max_steps=90, save_every=20, keep_last=2, spike_window=32, on_spike="rollback")
    unbroken, _ = run(settings(tmp_path / "unbroken", **options), trouble)
    # The calls with which a rollback begins, saves and ends: the 1st, the 4th (after steps 20, 40, 60), the 2nd.
    for owner, name, nth in (
        (guards.LateFigures, "clear", 1),
        (checkpoint.Writer, "save", 4),
        (Log, "rewind", 2),
    ):
        calls, original = [], getattr(owner, name)

        def die(*args, nth=nth, calls=calls, original=original):
            calls.append(args)
            if len(calls) == nth:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, die)
            run(settings(tmp_path / name, **options), trouble)
        model, _ = run(settings(tmp_path / name, resume=True, **options), trouble)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), unbroken.parameters(), strict=True))


def test_spikes_that_new_data_does_not_mend_end_the_run(tmp_path) -> None:
    cfg = settings(tmp_path, max_steps=300, save_every=40, keep_last=1, spike_window=32, on_spike="rollback")
    with pytest.raises(UserError, match="尖峰"):
        run(cfg, dict.fromkeys(range(40, 300), 8.0))
    assert [f.name for f in checkpoint.list_steps(tmp_path)] == ["step_00000040"]


def test_a_flat_or_noisy_curve_has_no_spikes_and_a_new_level_is_accepted() -> None:
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0)).mul(0.1).tolist()
    watch = guards.SpikeWatch(128, 8.0)
    assert not any(watch.see(5 * 0.999**i + n) for i, n in enumerate(noise))
    watch = guards.SpikeWatch(128, 8.0)
    assert not any(watch.see(2.0) for _ in range(200))
    lasted = [watch.see(4.0) for _ in range(100)]
    assert lasted[0] == 1
    assert lasted[-1] == 0
    assert not any(guards.SpikeWatch(128, 0).see(loss) for loss in [1.0] * 99 + [1e9])


def test_the_fingerprint_tells_data_apart_but_not_how_it_is_cut_up() -> None:
    rows = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(1))

    def fingerprint(*parts: torch.Tensor) -> list[int]:
        return guards.tally([MicroBatch(p[:, :-1], p[:, 1:]) for p in parts]).tolist()

    whole = fingerprint(rows)
    assert whole[:2] == [48, 48]
    padded = [MicroBatch(torch.nn.functional.pad(rows[:, :-1], (0, 3)), torch.full((6, 11), IGNORE))]
    assert guards.tally(padded).tolist() == [0, 48, whole[2]]
    assert fingerprint(*rows.split(4)) == fingerprint(*rows.flip(0).split(1)) == whole
    for other in (rows[:5], rows[[0, 0, 2, 3, 4, 5]], rows.flip(1)):
        assert fingerprint(other)[2] != whole[2]
    swapped = rows.clone()
    swapped[:2, 3] = rows[:2, 3].flip(0)
    assert rows[0, 3] != rows[1, 3]
    assert fingerprint(swapped)[2] != whole[2]
    assert guards.chained(guards.chained(0, 1), 2) != guards.chained(guards.chained(0, 2), 1)


def test_figures_are_read_late_in_order_and_all_of_them_when_needed() -> None:
    late = guards.LateFigures(lag=1)
    for step in (1, 2, 3):
        counts, losses = torch.tensor([10 * step, -5, 0]), torch.tensor([1.0, float("nan")])
        late.put(step, 0.1, counts, losses, torch.tensor(2.0), torch.tensor(step == 2))
        counts += 1  # what the device does next must not change what was put
        assert [f.step for f in late.take(everything=False)] == ([step - 1] if step > 1 else [])
    (last,) = late.take(everything=True)
    assert (last.step, last.tokens, last.fingerprint, last.grad_norm) == (3, 30, -5, 2.0)
    assert last.losses[0] == 1.0
    assert not last.skipped


def test_out_of_memory_names_the_settings(tmp_path) -> None:
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None):
        with pytest.raises(UserError) as raised, guards.explain_memory(settings(tmp_path), ARGS):
            if error:
                raise error
            torch.empty(2**58)  # the CPU's allocator has an error of its own
        assert "--micro_batch（现在 32" in str(raised.value)
        assert "--max_seq_len（现在 8" in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(RuntimeError, match="size"), guards.explain_memory(settings(tmp_path), ARGS):
        torch.ones(2) @ torch.ones(3)


def test_the_garbage_collector_is_quiet_while_training_and_only_then() -> None:
    with guards.quiet_garbage() as after_step:
        for _ in range(guards.WARM_UP):
            assert gc.isenabled()
            after_step()
        assert not gc.isenabled()
        assert gc.get_freeze_count()
    assert gc.isenabled()
    assert not gc.get_freeze_count()


def command(tmp_path: Path, tokens: Path, *more: object, sabotage: str = "", processes: int = 0) -> list[str]:
    """A command that runs pretrain.py as it is, or after some lines that spoil something."""
    path = ROOT / "pretrain.py"
    if sabotage:
        path = tmp_path / "sabotaged.py"
        lines = [
            "import os, sys, time",
            f"sys.path.insert(0, {str(ROOT)!r})",
            "import pretrain, stage",
            sabotage,
        ]
        lines.append("stage.run_stage(pretrain.Config, pretrain.main)")
        path.write_text("\n".join(lines), encoding="utf-8")
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "--max-restarts=3",
    ]
    options = [
        "--data",
        tokens,
        "--valid",
        tokens.parent / "valid.bin",
        "--out",
        tmp_path / "out",
        *TINY,
        *more,
    ]
    return [str(word) for word in (sys.executable, *(several if processes else []), path, *options)]


def finished(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=300, env=environment
    )


def started(command: list[str], out: Path, steps: int) -> subprocess.Popen:
    """A run that has logged so many steps."""
    pipe, deadline = subprocess.PIPE, time.monotonic() + 100
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")
    while process.poll() is None and len(read_log(out / "log.jsonl")) < steps:
        if time.monotonic() > deadline:
            process.terminate()
            pytest.fail("".join(process.communicate(timeout=60)))
        time.sleep(0.01)
    return process


def output(process: subprocess.Popen, limit: float) -> tuple[str, str]:
    """What a run prints until it ends; past the limit it is ended, torchrun with its workers, and the test fails."""
    try:
        return process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        pytest.fail("\n".join(process.communicate(timeout=60)))


def test_twenty_kills_in_small(tokens, tmp_path) -> None:
    options = ["--kills", 2, "--inside", 1, "--steps", 60, "--save_every", 5, "--work", tmp_path]
    printed = script("bench/kills.py", "--data", tokens, *options).stdout
    assert "same bytes" in printed
    assert "same data" in printed


def test_sigusr1_saves_and_ends_well_and_a_second_ctrl_c_ends_at_once(tokens, tmp_path) -> None:
    long = command(tmp_path, tokens, "--max_steps", 100_000, "--save_every", 100_000)
    process = started(long, tmp_path / "out", 3)
    process.send_signal(signal.SIGUSR1)
    printed, errors = output(process, 60)
    assert process.returncode == 0, errors
    (saved,) = checkpoint.list_steps(tmp_path / "out")
    assert f"第 {int(saved.name[5:])} 步" in printed
    slow = "pretrain.Transformer.forward = lambda *args, **kwargs: time.sleep(100)"
    process = subprocess.Popen(
        command(tmp_path, tokens, "--resume", sabotage=slow),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    assert any("开始" in line for line in process.stdout)
    time.sleep(1)
    process.send_signal(signal.SIGINT)  # waits for the step, which takes long
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors.strip() == "已中断。"


FULL_DISK = """
import errno, training.writer as c
kept = c.tensor_files.write
def write(path, *rest):
    if {condition}:
        raise OSError(errno.ENOSPC, "No space left on device")
    return kept(path, *rest)
c.tensor_files.write = write
"""


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run_but_the_last_one_does(
    tokens, tmp_path
) -> None:
    in_the_middle = FULL_DISK.format(condition="'step_00000010' in str(path)")
    options = ["--max_steps", 20, "--save_every", 5, "--keep_last", 9]
    done = finished(command(tmp_path, tokens, *options, sabotage=in_the_middle))
    assert done.returncode == 0, done.stderr
    assert "step_00000010" in done.stdout
    assert [int(f.name[5:]) for f in checkpoint.list_steps(tmp_path / "out")] == [5, 15, 20]
    at_the_end = FULL_DISK.format(condition="'step_00000025' in str(path)")
    options = ["--max_steps", 25, "--save_every", 5, "--keep_last", 9, "--resume"]
    failed = finished(command(tmp_path, tokens, *options, sabotage=at_the_end))
    assert failed.returncode == 1
    assert "step_00000025" in failed.stderr.strip().splitlines()[-1]
    assert checkpoint.list_steps(tmp_path / "out")[-1].name == "step_00000020"


POISON = """
import math, dataset
kept, bad = dataset.PretrainBatches.step, set()
def step(self, step):
    parts = kept(self, step)
    if (self.rank, step) == (1, 3):
        bad.update(part.tokens.numpy().tobytes() for part in parts)
    return parts
dataset.PretrainBatches.step = step
forward = pretrain.Transformer.forward
def poisoned(self, tokens, *args, **kwargs):
    return forward(self, tokens, *args, **kwargs) * (math.nan if tokens.numpy().tobytes() in bad else 1.0)
pretrain.Transformer.forward = poisoned
"""


def test_with_several_processes_the_one_with_the_bad_batch_is_named(tokens, tmp_path) -> None:
    done = finished(command(tmp_path, tokens, "--max_steps", 6, sabotage=POISON, processes=2))
    assert done.returncode == 0, done.stderr
    skipped = [r for r in read_log(tmp_path / "out" / "log.jsonl") if r.get("skipped")]
    assert [(r["step"], r["ranks"]) for r in skipped] == [(4, [1])]
    assert "进程 1 这一步的数据" in done.stdout
    assert "进程 0 这一步的数据" not in done.stdout


def test_a_hung_run_says_where_and_ends(tokens, tmp_path) -> None:
    hangs = "pretrain.Transformer.forward = lambda *args, **kwargs: time.sleep(1000)"
    done = finished(command(tmp_path, tokens, "--hang_timeout", 0.03, sabotage=hangs))
    assert done.returncode == 1
    assert "--hang_timeout" in done.stderr
    assert "train_step" in done.stderr  # the stack of the main thread
    assert "sabotaged.py" in done.stderr


def test_what_an_earlier_start_left_in_the_store_misleads_nobody() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("question/2", "left by a process that was killed while it waited")

    def start(rank: int, delay: float) -> str:
        time.sleep(delay)
        return agree_on_name(store, rank, 3)

    names = []
    for delays in ((0.2, 0, 0), (0, 0.2, 0.1), (0.1, 0, 0.2)):  # who comes late
        with ThreadPoolExecutor(3) as pool:
            found = set(pool.map(start, range(3), delays))
        assert len(found) == 1
        names += found
    assert len(set(names)) == 3
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(dist.DistStoreError, match="rank 1"):
        agree_on_name(store, 0, 3)


def test_two_runs_do_not_write_into_one_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(guards, "LOCK_SECONDS", 0.2)
    alone = Runtime(torch.device("cpu"), torch.float32)
    with guards.sole_run(tmp_path, alone), pytest.raises(UserError, match=f"{os.getpid()}.*--out"):
        run(settings(tmp_path, max_steps=2), {})
    run(settings(tmp_path, max_steps=2), {})  # the lock went with the run that held it


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_workers_whose_torchrun_is_killed_save_and_end(tokens, tmp_path) -> None:
    out, options = tmp_path / "out", ["--max_steps", 100_000, "--save_every", 100_000]
    process = started(command(tmp_path, tokens, *options, processes=2), out, 3)
    process.kill()
    printed, _ = output(process, 60)  # the pipe is closed when the workers have ended, too
    (saved,) = checkpoint.list_steps(out)
    assert f"已保存第 {int(saved.name[5:])} 步" in printed


LATE = """
if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("0", "1"):
    time.sleep(2)  # the other finds what the first start has left in torchrun's store
"""


def test_a_killed_worker_is_restarted_and_the_run_goes_on_by_itself(tokens, tmp_path) -> None:
    out, options = tmp_path / "out", ["--max_steps", 60, "--save_every", 5, "--resume"]
    process = started(command(tmp_path, tokens, *options, sabotage=LATE, processes=2), out, 12)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.is_file():
        pytest.skip("needs /proc to find the workers")
    os.kill(int(children.read_text().split()[1]), signal.SIGKILL)
    printed, errors = output(process, 150)
    assert process.returncode == 0, errors
    assert "完成" in printed
    assert printed.count("步开始") == 2
    curve = {r["step"]: r for r in read_log(out / "log.jsonl") if "loss" in r}
    assert sorted(curve) == list(range(1, 61))
    alone = tmp_path / "alone"
    alone.mkdir()
    assert finished(command(alone, tokens, "--max_steps", 60)).returncode == 0
    expected = {r["step"]: r for r in read_log(alone / "out" / "log.jsonl") if "loss" in r}
    assert all(curve[step]["data"] == record["data"] for step, record in expected.items())
    assert max(abs(curve[step]["loss"] - record["loss"]) for step, record in expected.items()) < 1e-3
