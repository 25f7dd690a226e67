"""Several processes (gloo): gradients, curves and checkpoints equal those of one, with DDP and with FSDP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from conftest import ROOT, script, torchrun
from gradients_of_processes import problem
from safetensors.torch import load_file

from model import IGNORE
from training import checkpoint
from training.log import read_log

TINY = ["--dim", 32, "--n_layers", 2, "--n_heads", 2, "--max_seq_len", 32, "--batch_tokens", 352]
TINY += [
    "--lr",
    3e-3,
    "--log_every",
    1,
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--timeout",
    1,
    "--max_steps",
    12,
]
TINY += ["--micro_batch", 2, "--save_every", 4, "--keep_last", 9, "--eval_tokens", 3000]


def arguments(tokens: Path, out: Path, *more: object) -> list[object]:
    return ["--data", tokens, "--valid", tokens.parent / "valid.bin", "--out", out, *TINY, *more]


def records(out: Path, key: str) -> dict[int, float]:
    return {r["step"]: r[key] for r in read_log(out / "log.jsonl") if key in r}


def assert_same_run(out: Path, reference: Path) -> None:
    for key in ("loss", "val_loss", "tokens", "grad_norm"):
        ours, theirs = records(out, key), records(reference, key)
        assert sorted(ours) == sorted(theirs)
        assert max(abs(ours[s] / theirs[s] - 1) for s in theirs) < 1e-3, key


@pytest.fixture(scope="module")
def one(tokens, tmp_path_factory) -> Path:
    """A run of one process: eleven windows a step, so that no number of processes divides them."""
    out = tmp_path_factory.mktemp("one") / "one"
    script("pretrain.py", *arguments(tokens, out))
    return out


@pytest.fixture(scope="module")
def sharded(tokens, tmp_path_factory) -> Path:
    """The same in two processes that share the state; written in the background."""
    out = tmp_path_factory.mktemp("sharded") / "sharded"
    torchrun(2, "pretrain.py", *arguments(tokens, out, "--shard", "--async_save", "True"))
    return out


@pytest.mark.parametrize(
    ("processes", "how", "tied"),
    [(2, "ddp", "tied"), (2, "shard", "tied"), (4, "ddp", "apart"), (4, "shard", "apart")],
)
def test_gradients_are_those_of_one_process_with_plain_torch(processes, how, tied, tmp_path) -> None:
    rows = 9  # 9 rows in micro-batches of 2 on 4 processes: some have two micro-batches, some one and an idle one
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["tests/gradients_of_processes.py", str(tmp_path / "g.safetensors"), how, "2", str(rows), tied]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    model, batch = problem(rows, tied == "tied")
    logits = model(batch.tokens).flatten(0, 1)
    F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))
    got = load_file(tmp_path / "g.safetensors")
    assert float(norm) > 0.5  # so that clipping is part of it
    torch.testing.assert_close(got.pop("norm"), norm, rtol=1e-5, atol=0)
    assert sorted(got) == sorted(name for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        expected = parameter.grad * 0.5 / (norm + 1e-6)
        assert float((got[name] - expected).norm() / expected.norm()) < 1e-5, name


def test_two_sharing_processes_train_like_one(one, sharded) -> None:
    assert_same_run(sharded, one)
    last = checkpoint.list_steps(sharded)[-1]
    assert (last / "model-00002-of-00002.safetensors").is_file()
    assert not list(last.glob("*.pt*"))
    sizes = [f.stat().st_size for f in sorted(last.glob("optimizer-*"))]
    whole = (checkpoint.list_steps(one)[-1] / "optimizer.safetensors").stat().st_size
    assert max(sizes) < 0.6 * whole  # each holds its half only
    ours, theirs = checkpoint.load(last).model, checkpoint.load(one).model
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(("processes", "options"), [(1, []), (3, ["--shard"]), (2, [])])
def test_a_sharded_checkpoint_goes_on_in_other_processes(
    processes, options, tokens, one, sharded, tmp_path
) -> None:
    out = copy_until(sharded, tmp_path / "out", 4)
    torchrun(processes, "pretrain.py", *arguments(tokens, out, "--resume", *options))
    assert_same_run(out, one)


def test_a_checkpoint_of_one_process_goes_on_sharded(tokens, one, tmp_path) -> None:
    out = copy_until(one, tmp_path / "out", 8)
    torchrun(4, "pretrain.py", *arguments(tokens, out, "--resume", "--shard"))
    assert_same_run(out, one)


def copy_until(run: Path, out: Path, step: int) -> Path:
    """A copy of a run as it was when this step had been saved."""
    source = run / f"step_{step:08d}"
    for file in source.iterdir():
        (out / source.name).mkdir(parents=True, exist_ok=True)
        (out / source.name / file.name).write_bytes(file.read_bytes())
    (out / "log.jsonl").write_bytes((run / "log.jsonl").read_bytes())
    return out


def test_shards_are_read_by_torch_and_consolidated_to_one_plain_file(sharded, tmp_path) -> None:
    last = checkpoint.list_steps(sharded)[-1]
    script("training/consolidate.py", last, "--out", tmp_path / "plain.safetensors", env=with_root())
    plain = load_file(tmp_path / "plain.safetensors")
    assert {k: v.shape for k, v in plain.items()} == {
        k: v.shape for k, v in checkpoint.read_weights(last).items()
    }
    theirs = {name: torch.zeros_like(value) for name, value in plain.items()}
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(last)), no_dist=True)
    assert all(torch.equal(theirs[name], value) for name, value in plain.items())


def with_root() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_fine_tuning_starts_from_a_sharded_checkpoint(sharded, corpus, tmp_path) -> None:
    script("sft_data_process.py", "--data", corpus / "sft", "--out", tmp_path / "sft.csv")
    options = ["--data", tmp_path / "sft.csv", "--init", sharded, "--max_steps", 3, "--log_every", 1]
    options += ["--device", "cpu", "--precision", "fp32", "--batch", 5, "--micro_batch", 2, "--timeout", 1]
    script("sft.py", *options, "--out", tmp_path / "one")
    torchrun(2, "sft.py", *options, "--out", tmp_path / "two", "--shard")
    ours, theirs = records(tmp_path / "two", "loss"), records(tmp_path / "one", "loss")
    assert max(abs(ours[s] - theirs[s]) for s in theirs) < 1e-3


def test_damage_on_one_process_is_noticed_by_all(tokens, one, sharded, tmp_path) -> None:
    out = copy_until(sharded, tmp_path / "out", 4)
    copy_until(sharded, out, 8)
    file = out / "step_00000008" / "optimizer-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = torchrun(2, "pretrain.py", *arguments(tokens, out, "--resume", "--shard"))
    assert file.name in done.stdout
    assert_same_run(out, one)
