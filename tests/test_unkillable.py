"""What a long run survives: bad steps, spikes, signals, full disks, hangs, killed processes."""

import gc
import signal
from pathlib import Path

import pytest
import torch

from model import IGNORE, ModelArgs, Transformer
from stage import UserError
from training import checkpoint, guards
from training.config import TrainConfig
from training.estimate import PROBES
from training.loader import MicroBatch
from training.log import Log, read_log
from training.loop import train
from training.optimizer import learning_rate
from training.runtime import Runtime

ARGS = ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=50, max_seq_len=8)
TINY = ["--dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_seq_len", 32, "--batch_tokens", 256]
TINY += ["--lr", 3e-3, "--log_every", 1, "--device", "cpu", "--eval_tokens", 32]


class Rows:
    """Random rows, a function of the step; remembers which steps were asked for."""

    steps_per_epoch, signature = 1000.0, {"seed": 0}

    def __init__(self) -> None:
        self.asked: list[int] = []

    def step(self, step: int) -> list[MicroBatch]:
        self.asked.append(step)
        rows = torch.randint(1, 50, (4, 9), generator=torch.Generator().manual_seed(step))
        return [MicroBatch(part[:, :-1], part[:, 1:]) for part in rows.split(2)]

    def describe(self, step: int) -> str:
        return f"rows of {step}"


class Troubled(Transformer):
    """A model whose loss is multiplied, in some steps of the data, by something that does not belong there."""

    def __init__(self, rows: Rows, trouble: dict[int, float]):
        torch.manual_seed(0)
        super().__init__(ARGS)
        self.rows, self.trouble = rows, trouble

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) * self.trouble.get(self.rows.asked[-1], 1.0)


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
    return TrainConfig(out=out, lr=1e-2, log_every=1, eval_every=0, device="cpu", **values)


def run(cfg: TrainConfig, trouble: dict[int, float]) -> tuple[Troubled, Rows]:
    """Train in this process, with trouble at some steps of the data."""
    rows = Rows()
    model = Troubled(rows, trouble)
    train(cfg, Runtime(torch.device("cpu"), torch.float32), model, b"vocabulary", rows, lambda model: {})
    return model, rows


def reference(steps: list[int], skip: set[int], total: int) -> dict[str, torch.Tensor]:
    """Weights after plain PyTorch training on these steps of the data, without those to be skipped."""
    rows, cfg = Rows(), settings(Path())
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
            group["lr"] = learning_rate(step, total, cfg)
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
    model, rows = run(settings(tmp_path / "back", on_spike="rollback", **options), trouble)
    # Seen after three steps of it, at step 63; back to step 40; left out is all within 16 of the spike.
    left = [*range(44), *range(79, 100)]
    trained = rows.asked[PROBES:]  # after what the estimate looks at
    assert trained == [*range(63), *range(40, 44), *range(79, 100)]
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
