"""What a run shows of itself: lines, log.jsonl, MFU, curves, trackers, samples."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, script

from stage import UserError
from training import checkpoint, hardware, log, plot
from training.config import TrainConfig
from training.log import Log, read_log
from training.runtime import Runtime

SHAPE = ["--dim", 32, "--n_layers", 1, "--n_heads", 2, "--max_seq_len", 64, "--batch_tokens", 512]
SHAPE += ["--log_every", 2, "--device", "cpu", "--precision", "fp32", "--eval_tokens", 640]

# Names as drivers report them, the number of multiprocessors, and what must come of it.
DEVICES = [
    ("NVIDIA GeForce RTX 3090", 82, "3090"),
    ("GeForce RTX 3090", 82, "3090"),
    ("NVIDIA GeForce RTX 3090 Ti", 84, "3090 Ti"),
    ("NVIDIA GeForce RTX 4090", 128, "4090"),
    ("NVIDIA GeForce RTX 4090 D", 114, "4090 D"),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, None),
    ("NVIDIA GeForce RTX 3080 Ti Laptop GPU", 58, None),
    ("NVIDIA GeForce RTX 5090", 170, "5090"),
    ("NVIDIA GeForce RTX 5090 D", 170, None),
    ("NVIDIA GeForce RTX 5090 Laptop GPU", 82, None),
    ("NVIDIA RTX A6000", 84, "RTX A6000"),
    ("NVIDIA RTX A6000-48Q", 84, None),
    ("NVIDIA RTX 6000 Ada Generation", 142, "RTX 6000 Ada"),
    ("Quadro RTX 6000", 72, None),
    ("NVIDIA RTX 4000 Ada Generation", 48, None),
    ("NVIDIA RTX 4000 SFF Ada Generation", 48, None),
    ("NVIDIA RTX A4000", 48, None),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 188, None),
    ("NVIDIA A100-SXM4-40GB", 108, "A100"),
    ("NVIDIA A100-SXM4-80GB", 108, "A100"),
    ("A100-SXM4-40GB", 108, "A100"),
    ("A100-SXM-80GB", 108, "A100"),
    ("NVIDIA A100-SXM-64GB", 124, None),
    ("NVIDIA A100-PCIE-40GB", 108, "A100 PCIe"),
    ("NVIDIA A100 80GB PCIe", 108, "A100 PCIe"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 14, None),
    ("NVIDIA A100-SXM4-80GB MIG 7g.80gb", 98, None),
    ("NVIDIA A100-SXM4-80GB", 98, None),  # a slice whose name does not say so
    ("GRID A100-10C", 108, None),
    ("NVIDIA A100X", 108, None),
    ("NVIDIA A800-SXM4-80GB", 108, "A800"),
    ("NVIDIA A800 80GB PCIe", 108, "A800 PCIe"),
    ("NVIDIA A800 40GB Active", 108, None),
    ("NVIDIA A10", 72, "A10"),
    ("NVIDIA A10G", 80, None),
    ("NVIDIA A10-24Q", 72, None),
    ("NVIDIA A16", 10, None),
    ("NVIDIA A30", 56, "A30"),
    ("NVIDIA A40", 84, "A40"),
    ("NVIDIA A40-48Q", 84, None),
    ("NVIDIA L4", 58, "L4"),
    ("NVIDIA L20", 92, "L20"),
    ("NVIDIA L20X", 132, None),
    ("NVIDIA L40", 142, "L40"),
    ("NVIDIA L40S", 142, "L40S"),
    ("NVIDIA L40G", 142, None),
    ("NVIDIA H100 80GB HBM3", 132, "H100"),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, None),
    ("NVIDIA H100 PCIe", 114, "H100 PCIe"),
    ("NVIDIA H100 NVL", 132, "H100 NVL"),
    ("NVIDIA H100", 132, None),
    ("NVIDIA H800", 132, "H800"),
    ("NVIDIA H800 PCIe", 114, "H800 PCIe"),
    ("NVIDIA H200", 132, "H200"),
    ("NVIDIA H200 NVL", 132, "H200 NVL"),
    ("NVIDIA H20", 78, "H20"),
    ("NVIDIA H20-3e", 78, None),
    ("NVIDIA GH200 480GB", 132, "GH200"),
    ("NVIDIA GH200 120GB", 132, "GH200"),
    ("NVIDIA B200", 148, "B200"),
    ("NVIDIA GB200", 152, None),
    ("Tesla V100-SXM2-16GB", 80, "V100"),
    ("Tesla V100-SXM2-32GB", 80, "V100"),
    ("Tesla V100-PCIE-32GB", 80, "V100 PCIe"),
    ("Tesla V100S-PCIE-32GB", 80, None),
    ("Tesla V100-DGXS-32GB", 80, None),
    ("NVIDIA TITAN V", 80, None),
    ("Tesla T4", 40, "T4"),
    ("NVIDIA T400 4GB", 6, None),
    ("AMD Instinct MI300X", 304, None),
    ("", 1, None),
]


@pytest.mark.parametrize(("name", "multiprocessors", "expected"), DEVICES)
def test_a_device_is_known_by_its_whole_name_or_not_at_all(name, multiprocessors, expected) -> None:
    found = hardware.identify(name, multiprocessors)
    assert (found.name if found else None) == expected


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "tf32", "fp32"),
    [
        ("NVIDIA GeForce RTX 3090", 71, 71, 35.6, 35.6),
        ("NVIDIA A100-SXM4-80GB", 312, 312, 156, 19.5),
        ("NVIDIA H100 NVL", 835.5, 835.5, 417.5, 60),
        ("Tesla V100-SXM2-32GB", None, 125, 15.7, 15.7),
    ],
)
def test_the_peak_is_that_of_the_precision_in_use(name, bf16, fp16, tf32, fp32) -> None:
    gpu = hardware.identify(name)
    peaks = [hardware.peak_flops(gpu, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    peaks.append(hardware.peak_flops(gpu, torch.float32, tf32=False))
    assert peaks == [
        None if peak is None else pytest.approx(peak * 1e12) for peak in (bf16, fp16, tf32, fp32)
    ]
    assert hardware.device_peak_flops(torch.device("cpu"), torch.float32) is None


def test_every_name_of_the_table_can_be_asked_for() -> None:
    for gpu in hardware.GPUS:
        assert hardware.parse_hardware(f"{gpu.name} x4") == (gpu, 4)
        assert hardware.parse_hardware(gpu.name) == (gpu, 1)
    assert hardware.parse_hardware("RTX 4090x8")[0].name == "4090"
    for wrong in ("4090 x0", "4091", "", "x4"):
        with pytest.raises(hardware.UserError, match="--hardware"):
            hardware.parse_hardware(wrong)


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    return now


def test_a_line_has_the_speed_the_mfu_and_the_time_left(tmp_path, clock, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Runtime, "peak_flops", lambda self: 1e12)
    lines = Log(
        TrainConfig(out=tmp_path), Runtime(torch.device("cpu"), torch.float32, world=2), 0, 0, 100, 10**8
    )
    clock[0] += 50  # the first steps are slow: compilation
    lines.step(10, 10_000, 5.0, 1e-3, 0.5)
    with lines.pause():
        clock[0] += 5  # an evaluation: part of the time left, not of the speed
    clock[0] += 10
    lines.step(20, 20_000, 4.0, 1e-3, 0.5)
    slow, fast = read_log(tmp_path / "log.jsonl")
    assert slow["ms"] == pytest.approx(5000)
    assert fast["ms"] == pytest.approx(1000)
    assert fast["tokens_per_second"] == pytest.approx(1000)
    assert fast["mfu"] == pytest.approx(1000 * 10**8 / 2e12)
    assert 0.1 < fast["rss_gb"] < 100
    printed = capsys.readouterr().out.splitlines()[-1]
    for part in ("步 20/100", "0.02M", "4.0000", "1,000 token/s", "MFU 5.0%", "剩余 0:02:00"):
        assert part in printed


def test_no_mfu_without_a_known_peak(tmp_path, capsys) -> None:
    Log(TrainConfig(out=tmp_path), Runtime(torch.device("cpu"), torch.float32), 0, 0, 9, 1).step(
        1, 9, 1, 1, 1
    )
    assert "MFU" not in capsys.readouterr().out
    assert read_log(tmp_path / "log.jsonl")[0]["mfu"] is None


def test_figures_that_are_not_finite_are_valid_json(tmp_path) -> None:
    lines = Log(TrainConfig(out=tmp_path), Runtime(torch.device("cpu"), torch.float32), 0, 0, 9, 1)
    lines.step(1, 10, float("nan"), 1e-3, float("inf"))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is record["grad_norm"] is None


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_does_not_end_the_log(tmp_path, capsys) -> None:
    import resource

    lines = Log(TrainConfig(out=tmp_path), Runtime(torch.device("cpu"), torch.float32), 0, 0, 9, 1)
    lines.step(1, 10, 4.0, 1e-3, 1.0)
    size, limits = (tmp_path / "log.jsonl").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))  # in the middle of the next line
        lines.step(2, 20, 3.0, 1e-3, 1.0)
        lines.step(3, 30, 2.0, 1e-3, 1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capsys.readouterr().out.count("无法写入日志") == 1
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1]
    lines.step(4, 40, 1.0, 1e-3, 1.0)
    written = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4]


def test_a_resumed_log_drops_what_is_torn_and_what_comes_again(tmp_path) -> None:
    cfg, runtime = TrainConfig(out=tmp_path), Runtime(torch.device("cpu"), torch.float32)
    lines = Log(cfg, runtime, 0, 0, 9, 1)
    for step in (1, 2, 3):
        lines.step(step, 10 * step, 5.0, 1e-3, 1.0)
    lines.samples(2, 20, ["【从前】有座山"])
    whole = (tmp_path / "log.jsonl").read_bytes()
    (tmp_path / "log.jsonl").write_bytes(whole + b'7\n{"step": null}\n{"step": 4, "samples": ["\xe4\xbb')
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 2]
    Log(cfg, runtime, 2, 20, 9, 1).step(3, 30, 4.0, 1e-3, 1.0)
    records = read_log(tmp_path / "log.jsonl")
    assert [(r["step"], r.get("loss")) for r in records] == [(1, 5.0), (2, 5.0), (2, None), (3, 4.0)]
    assert records[2]["samples"] == ["【从前】有座山"]


# Trackers.

FAKE = """
import json, os, sys
class Run:
    def log(self, figures, step): call("log", step=step, figures=figures)
    def finish(self): call("finish")
class Table:
    def __init__(self, columns, data): self.data = data
def Text(line): return line
def call(what, **details):
    if os.environ.get("BROKEN") == what: raise RuntimeError("server said no\\nand more")
    with open(os.environ["CALLS"], "a") as f:
        details |= {"what": what, "module": __name__, "rank": os.environ.get("RANK", "0")}
        f.write(json.dumps(details, default=vars) + "\\n")
def init(**options): call("init", **options); return Run()
def log(figures, step): Run().log(figures, step)
def finish(): call("finish")
"""


@pytest.fixture
def fakes(tmp_path) -> dict[str, str]:
    """An environment in which wandb and swanlab are modules that write down how they are called."""
    for name in ("wandb", "swanlab"):
        (tmp_path / "fakes" / name).mkdir(parents=True)
        (tmp_path / "fakes" / name / "__init__.py").write_text(FAKE)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "fakes"), "CALLS": str(tmp_path / "calls")}


def pretrain(tokens: Path, out: Path, *more: object) -> list[object]:
    return ["--data", tokens, "--valid", tokens.parent / "valid.bin", "--out", out, *SHAPE, *more]


def test_trackers_get_the_figures_once_and_a_resumed_run_goes_on_in_them(tokens, fakes, tmp_path) -> None:
    options = pretrain(tokens, tmp_path / "run", "--track", "wandb", "swanlab", "--save_every", 4)
    options += ["--eval_every", 4, "--sample_every", 4]
    script("pretrain.py", *options, "--max_steps", 4, env=fakes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += map(str, [ROOT / "pretrain.py", *options, "--max_steps", 8, "--resume"])
    done = subprocess.run(command, capture_output=True, text=True, env={**fakes, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in Path(fakes["CALLS"]).read_text().splitlines()]
    assert {c["rank"] for c in calls} == {"0"}
    for module in ("wandb", "swanlab"):
        mine = [c for c in calls if c["module"] == module]
        first, second = (c for c in mine if c["what"] == "init")
        assert first["id"] == second["id"]
        assert first["resume"] == "allow"
        assert first["config"]["max_steps"] == 4
        logged = {
            c["step"]: c["figures"]["loss"] for c in mine if c["what"] == "log" and "loss" in c["figures"]
        }
        written = {r["step"]: r["loss"] for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r}
        assert logged == written
        assert sorted(logged) == [2, 4, 6, 8]
        assert sum("val_loss" in c.get("figures", ()) for c in mine) == 2
        assert sum("samples" in c.get("figures", ()) for c in mine) == 2
        assert sum(c["what"] == "finish" for c in mine) == 2


def test_a_tracker_that_fails_does_not_stop_training(tokens, fakes, tmp_path) -> None:
    options = pretrain(tokens, tmp_path / "run", "--track", "wandb", "--max_steps", 4, "--sample_every", 0)
    done = script("pretrain.py", *options, env={**fakes, "BROKEN": "log"})
    assert done.stdout.count("wandb 出错") == 1
    assert "server said no" in done.stdout
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.jsonl")] == [2, 4, 4]


@pytest.mark.skipif(importlib.util.find_spec("swanlab") is not None, reason="swanlab is installed here")
def test_a_tracker_that_is_missing_is_one_line_with_the_remedy(tokens, tmp_path) -> None:
    failed = script("pretrain.py", *pretrain(tokens, tmp_path / "run", "--track", "swanlab"), ok=False)
    assert "pip install swanlab" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_tensorboard_reads_what_was_logged(tmp_path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = TrainConfig(out=tmp_path, track=("tensorboard",))
    runtime = Runtime(torch.device("cpu"), torch.float32)
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # interrupted after 3, resumed from 2
        lines = Log(cfg, runtime, start, start, 9, 1)
        for step in steps:
            lines.step(step, step, 10.0 * start + step, 1e-3, 1.0)
        lines.trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


# Samples.


def test_samples_are_the_greedy_continuations_of_the_model(tokens, tmp_path) -> None:
    out = tmp_path / "run"
    done = script("pretrain.py", *pretrain(tokens, out, "--max_steps", 6, "--sample_every", 4, "--lr", 1e-2))
    assert done.stdout.count("续写 |") == 6
    samples = {r["step"]: r["samples"] for r in read_log(out / "log.jsonl") if "samples" in r}
    assert sorted(samples) == [4, 6]
    loaded = checkpoint.load(out)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    valid = np.fromfile(tokens.parent / "valid.bin", "<u2")
    eos = tokenizer.special_tokens["<eos>"]
    documents = [d.tolist() for d in np.split(valid, np.flatnonzero(valid == eos) + 1)]
    for line in samples[6]:
        prompt = line[1 : line.index("】")]
        (ids,) = {
            tuple(d[:12])
            for d in documents
            if len(d) > 24 and " ".join(tokenizer.decode(d[:12]).split()) == prompt
        }
        new = list(ids)
        for _ in range(40):
            with torch.no_grad():
                new.append(int(model(torch.tensor([new]))[0, -1].argmax()))
            if new[-1] == eos:
                break
        assert line == " ".join(f"【{prompt}】{tokenizer.decode(new[12:])}".split())


# Curves.


def write_run(folder: Path, steps: int, **changes: float) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "tokens": step * 512,
                "loss": 9 / step**0.2 + rng.normal() / 9,
                "lr": 1e-3,
            }
            record |= {"grad_norm": 1.0, "tokens_per_second": 5000.0} | changes
            file.write(json.dumps(record) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"step": step, "tokens": step * 512, "val_loss": 9 / step**0.2}) + "\n")
    return folder


def test_one_run_and_several_are_drawn(tmp_path) -> None:
    from matplotlib.image import imread

    runs = [write_run(tmp_path / name, steps) for name, steps in (("a/x", 5000), ("b/x", 30), ("中文/x", 1))]
    command = [sys.executable, "-m", "training.plot", *map(str, runs), "--out", str(tmp_path / "all.png")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    several = imread(tmp_path / "all.png")
    plot.draw_run(runs[0])
    alone = imread(runs[0] / "loss.png")
    for picture in (several, alone):
        inked = (picture[..., :3].min(-1) < 0.9).mean(1)  # share of each row of pixels
        assert all(part.max() > 0.3 for part in np.array_split(inked, 4))  # a panel's frame in every quarter
    assert plot.labels(runs) == ["a/x", "b/x", "中文/x"]
    assert plot.labels(runs[:1]) == ["x"]


def test_logs_that_cannot_be_drawn_are_one_clear_line(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "log.jsonl").write_text('{"step": 1, "tok')
    for name, word in (("none", "找不到"), ("empty", "还没有记录")):
        with pytest.raises(plot.UserError, match=word) as raised:
            plot.read_curves(tmp_path / name, "x")
        assert str(tmp_path / name) in str(raised.value)
    plot.draw_run(tmp_path / "empty")
    assert not (tmp_path / "empty" / "loss.png").exists()


def test_a_damaged_log_is_drawn_without_what_is_no_number(tmp_path) -> None:
    path = write_run(tmp_path / "run", 20) / "log.jsonl"
    damaged = ["{", "null", "7", '{"step": "x"}', '{"step": 3, "tokens": "a", "loss": 1}']
    damaged += [
        f'{{"step": 4, "tokens": 9, "loss": {value}}}' for value in ("NaN", "1e999", "[1]", "1" + "0" * 400)
    ]
    path.write_bytes("\n".join(damaged).encode() + b"\n" + path.read_bytes() + b'{"step": 21, "\xe4')
    _, losses = plot.read_curves(path, "run").figures["loss"]
    assert len(losses) == 20
    plot.main(plot.Config(runs=(path.parent, path), out=tmp_path / "both.SVG"))
    assert "<svg" in (tmp_path / "both.SVG").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"\.png"):
        plot.Config(runs=(path,), out=tmp_path / "loss.txt").check()


def test_smoothing_is_a_mean_of_finite_values_and_thinning_keeps_spikes() -> None:
    y = np.random.default_rng(1).normal(size=5000)
    y[[7, 8]] = np.nan
    expected = [np.nanmean(y[max(0, i - 20) : i + 21]) for i in range(len(y))]
    np.testing.assert_allclose(plot.running_mean(y, 40), expected)
    y[3210] = 99.0
    x, drawn = plot.envelope(np.arange(5000.0), y)
    assert len(x) <= plot.POINTS + 2
    assert np.nanmax(drawn) == 99.0
    assert abs(x[np.nanargmax(drawn)] - 3210) < 10
    x, drawn = plot.thin(np.arange(5000.0), y)
    assert (x[0], x[-1]) == (0, 4999)
    assert len(x) <= plot.POINTS + 1


def test_a_resumed_or_repeated_step_counts_as_it_was_last(tmp_path) -> None:
    rows = [(1, 9.0), (2, 8.0), (2, 7.0), (3, None), (1, 6.0)]
    lines = [json.dumps({"step": s, "tokens": 10 * s, "loss": v, "lr": 1.0}) for s, v in rows]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    x, y = plot.read_curves(tmp_path, "x").figures["loss"]
    assert (x.tolist(), y.tolist()) == ([10, 20], [6, 7])
