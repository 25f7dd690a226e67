"""Checkpoints: the same bits back, every damage noticed, old ones kept and deleted, failed writes reported."""

import json
import resource
import threading
from pathlib import Path

import pytest
import torch
from conftest import script
from safetensors.torch import load_file, save_file

from model import ModelArgs, Transformer
from stage import StageConfig, UserError
from training import checkpoint
from training.runtime import Runtime
from training.step_folder import Damaged

ALONE = Runtime(torch.device("cpu"), torch.float32)
FILES = {
    "model.safetensors", "optimizer.safetensors", "config.json", "train_config.json", "tokenizer.model",
    "state.json", "checksums.json",
}  # fmt: skip


def training(seed: int = 0, steps: int = 0, **options: object) -> tuple[Transformer, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=300, max_seq_len=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
    go_on(model, optimizer, range(steps))
    return model, optimizer


def go_on(model: Transformer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(step))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(out: Path, step: int, model, optimizer, **options: object) -> checkpoint.Writer:
    writer = checkpoint.Writer(out, ALONE, **{"keep_last": 9, **options})
    writer.save(
        step,
        model,
        optimizer,
        StageConfig(),
        {"tokenizer.model": b"vocabulary"},
        {"step": step, "scaler": {}},
    )
    writer.wait()
    return writer


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("saved")
    save(out, 3, *training(steps=3))
    return out / "step_00000003"


def copied(folder: Path, to: Path) -> Path:
    for file in folder.iterdir():
        (to / folder.name).mkdir(parents=True, exist_ok=True)
        (to / folder.name / file.name).write_bytes(file.read_bytes())
    return to / folder.name


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_training_goes_on_with_the_same_bits(options, tmp_path) -> None:
    ours, unbroken = training(steps=3, **options), training(steps=6, **options)
    save(tmp_path, 3, *ours)
    model, optimizer = training(seed=1, steps=2, **options)  # whatever it held before is replaced
    assert checkpoint.restore(tmp_path / "step_00000003", model, optimizer) == {"step": 3, "scaler": {}}
    go_on(model, optimizer, range(3, 6))
    for ours, theirs in zip(model.parameters(), unbroken[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_folder_holds_tensors_and_json_and_no_pickle(saved) -> None:
    assert {f.name for f in saved.iterdir()} == FILES
    assert "output.weight" not in load_file(saved / "model.safetensors")  # tied: once
    moments = load_file(saved / "optimizer.safetensors")
    assert moments["layers.0.attention.wq.weight.exp_avg"].shape == (32, 32)
    assert moments["norm.weight.step"] == 3
    assert set(json.loads((saved / "checksums.json").read_text())) == FILES - {"checksums.json"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_changed_byte_in_any_file_is_noticed(name, saved, tmp_path) -> None:
    folder = copied(saved, tmp_path)
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    model, optimizer = training(seed=1)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(Damaged, match=str(folder)):
        checkpoint.restore(folder, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    if name == "model.safetensors":
        with pytest.raises(UserError, match=str(folder)):
            checkpoint.read_weights(folder)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_noticed(name, saved, tmp_path) -> None:
    folder = copied(saved, tmp_path)
    (folder / name).unlink()
    with pytest.raises(Damaged, match=name):
        checkpoint.restore(folder, *training())


def test_the_last_and_every_nth_are_kept(tmp_path) -> None:
    model, optimizer = training(steps=1)
    for step in range(10, 130, 10):
        save(tmp_path, step, model, optimizer, keep_last=2, keep_every=50)
    kept = [int(f.name.removeprefix("step_")) for f in checkpoint.list_steps(tmp_path)]
    assert kept == [50, 100, 110, 120]


def test_a_kill_while_an_old_one_is_deleted_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    model, optimizer = training(steps=1)
    for step in (10, 20):
        save(tmp_path, step, model, optimizer)

    def die(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        raise KeyboardInterrupt

    writer = checkpoint.Writer(tmp_path, ALONE, keep_last=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.writer.shutil.rmtree", die)
        writer.delete_old()
    assert [f.name for f in checkpoint.list_steps(tmp_path)] == ["step_00000020"]
    save(tmp_path, 30, model, optimizer, keep_last=1)
    assert [f.name for f in tmp_path.iterdir()] == ["step_00000030"]


def test_in_the_background_the_state_of_the_call_is_written(tmp_path, monkeypatch) -> None:
    model, optimizer = training(steps=3)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    may_write, write = threading.Event(), checkpoint.Writer.write
    monkeypatch.setattr(checkpoint.Writer, "write", lambda *a: may_write.wait(30) and write(*a))
    writer = checkpoint.Writer(tmp_path, ALONE, keep_last=2, in_background=True)
    writer.save(3, model, optimizer, StageConfig(), {}, {})
    assert not checkpoint.list_steps(tmp_path)  # save has returned before anything was written
    go_on(model, optimizer, range(3, 5))
    may_write.set()
    writer.wait()
    found = checkpoint.read_weights(tmp_path / "step_00000003")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    buffers = {name: buffer.data_ptr() for name, buffer in writer.buffers.items()}
    writer.save(5, model, optimizer, StageConfig(), {}, {})
    writer.save(6, model, optimizer, StageConfig(), {}, {})  # waits for the one before
    assert (tmp_path / "step_00000005").is_dir()
    writer.wait()
    assert {name: buffer.data_ptr() for name, buffer in writer.buffers.items()} == buffers


@pytest.mark.parametrize("call", ["wait", "save"])
def test_a_write_that_fails_in_the_background_is_reported_and_the_old_one_stays(call, tmp_path) -> None:
    model, optimizer = training(steps=3)
    save(tmp_path, 3, model, optimizer)
    writer = checkpoint.Writer(tmp_path, ALONE, keep_last=1, in_background=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (5000, hard)
    )  # from here on, every larger file fails like a full disk
    try:
        writer.save(4, model, optimizer, StageConfig(), {}, {})
        writer.thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(UserError, match="step_00000004"):
        if call == "wait":
            writer.wait()
        else:
            writer.save(5, model, optimizer, StageConfig(), {}, {})
    assert [f.name for f in tmp_path.iterdir()] == ["step_00000003"]
    checkpoint.restore(tmp_path / "step_00000003", *training())
    writer.save(6, model, optimizer, StageConfig(), {}, {})  # reported once; then it goes on
    writer.wait()
    assert [f.name for f in tmp_path.iterdir()] == ["step_00000006"]


def test_a_checkpoint_of_another_shape_is_a_mistake_and_no_damage(saved) -> None:
    model = Transformer(ModelArgs(dim=64, n_layers=2, n_heads=2, vocab_size=300, max_seq_len=16))
    with pytest.raises(UserError, match="不符") as caught:
        checkpoint.restore(saved, model, torch.optim.AdamW(model.parameters()))
    assert not isinstance(caught.value, Damaged)


def test_the_earlier_format_cannot_be_continued_but_its_weights_load(tokens, vocabulary, tmp_path) -> None:
    folder = tmp_path / "out" / "step_00000010"
    folder.mkdir(parents=True)
    model = Transformer(ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=2600, max_seq_len=64))
    weights = {k: v for k, v in model.state_dict().items() if k != "output.weight"}
    save_file(weights, folder / "model.safetensors")
    shape = {k: getattr(model.args, k) for k in ModelArgs.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "train_config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    torch.save({"step": 10}, folder / "training_state.pt")
    with pytest.raises(UserError, match="旧格式") as caught:
        checkpoint.restore(folder, model, torch.optim.AdamW(model.parameters()))
    assert not isinstance(caught.value, Damaged)
    loaded = checkpoint.load(tmp_path / "out").model
    assert torch.equal(loaded.norm.weight, model.norm.weight)
    assert torch.equal(loaded.layers[1].attention.wq.weight, model.layers[1].attention.wq.weight)


def test_a_run_with_a_background_writer_is_the_run_without(tokens, tmp_path) -> None:
    tiny = [
        "--data",
        tokens,
        "--valid",
        tokens.parent / "valid.bin",
        "--dim",
        32,
        "--n_layers",
        2,
        "--n_heads",
        2,
    ]
    tiny += [
        "--max_seq_len",
        32,
        "--batch_tokens",
        128,
        "--max_steps",
        8,
        "--save_every",
        2,
        "--keep_last",
        1,
    ]
    tiny += ["--keep_every", 4, "--device", "cpu", "--precision", "fp32", "--eval_tokens", 3000]
    for name, value in (("plain", "False"), ("background", "True")):
        script("pretrain.py", *tiny, "--out", tmp_path / name, "--async_save", value)
    for step in (4, 8):
        ours, theirs = (tmp_path / n / f"step_{step:08d}" for n in ("background", "plain"))
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert len(checkpoint.list_steps(tmp_path / "background")) == 2
