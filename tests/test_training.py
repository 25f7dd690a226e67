"""Pretraining, fine-tuning and evaluation through their command lines: resume, processes, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, script, torchrun
from safetensors.torch import load_file

from model import ModelArgs, Transformer
from training import checkpoint
from training.log import read_log

TINY = [
    "--dim",
    32,
    "--n_layers",
    2,
    "--n_heads",
    2,
    "--max_seq_len",
    64,
    "--batch_tokens",
    512,
    "--lr",
    2e-2,
]
TINY += ["--log_every", 1, "--device", "cpu", "--precision", "fp32"]


def arguments(tokens: Path, out: Path, *more: object) -> list[object]:
    return ["--data", tokens, "--valid", tokens.parent / "valid.bin", "--out", out, *TINY, *more]


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r}


@pytest.fixture(scope="module")
def unbroken(tokens, tmp_path_factory) -> Path:
    """A run of 40 steps, with a checkpoint every 10."""
    out = tmp_path_factory.mktemp("run") / "unbroken"
    script("pretrain.py", *arguments(tokens, out, "--max_steps", 40, "--save_every", 10, "--keep_last", 9))
    return out


@pytest.fixture(scope="module")
def tuned(unbroken, corpus, tmp_path_factory) -> Path:
    """A few steps of fine-tuning."""
    folder = tmp_path_factory.mktemp("sft")
    script("sft_data_process.py", "--data", corpus / "sft", "--out", folder / "sft.csv")
    script(
        "sft.py", "--data", folder / "sft.csv", "--init", unbroken, "--out", folder / "out",
        "--max_steps", 12, "--log_every", 1, "--lr", 1e-3, "--device", "cpu", "--precision", "fp32",
    )  # fmt: skip
    return folder


def test_a_run_leaves_what_the_design_says(unbroken) -> None:
    assert [f.name for f in checkpoint.list_steps(unbroken)] == [f"step_{s:08d}" for s in (10, 20, 30, 40)]
    records = read_log(unbroken / "log.jsonl")
    curve = losses(unbroken)
    assert sorted(curve) == list(range(1, 41))
    assert curve[40] < curve[1] - 0.7
    last = [r for r in records if "val_loss" in r][-1]
    assert last["val_loss"] < curve[1] - 0.7
    assert 0 < last["val_bpb"] < last["val_loss"]
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    weights = load_file(unbroken / "step_00000040" / "model.safetensors")
    assert "output.weight" not in weights  # tied: stored once
    config = json.loads((unbroken / "step_00000040" / "train_config.json").read_text(encoding="utf-8"))
    assert config["max_steps"] == 40


def test_sigkill_and_resume_give_the_unbroken_run_bit_for_bit(tokens, unbroken, tmp_path) -> None:
    out = tmp_path / "killed"
    options = arguments(tokens, out, "--max_steps", 40, "--save_every", 10, "--keep_last", 9)
    command = [sys.executable, str(ROOT / "pretrain.py"), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(losses(out)) < 13:  # between two checkpoints
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert checkpoint.list_steps(out)
    (out / ".step_00000020.tmp-1").mkdir()  # what a kill inside a checkpoint write leaves
    script("pretrain.py", *options, "--resume")
    assert losses(out) == losses(unbroken)
    ours, theirs = (load_file(o / "step_00000040" / "model.safetensors") for o in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(out.glob(".step_*"))


def test_sigterm_saves_and_resume_goes_on(tokens, unbroken, tmp_path) -> None:
    out = tmp_path / "stopped"
    options = arguments(tokens, out, "--max_steps", 40, "--save_every", 1000)
    command = [sys.executable, str(ROOT / "pretrain.py"), *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    while len(losses(out)) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in printed
    script("pretrain.py", *options, "--resume")
    assert losses(out) == losses(unbroken)
    assert "完成" in script("pretrain.py", *options, "--resume").stdout  # nothing left to do


def test_accumulation_and_processes_do_not_change_the_curve(tokens, unbroken, tmp_path) -> None:
    script("pretrain.py", *arguments(tokens, tmp_path / "accumulated", "--max_steps", 40, "--micro_batch", 3))
    torchrun(2, "pretrain.py", *arguments(tokens, tmp_path / "two", "--max_steps", 40))
    expected = losses(unbroken)
    for name in ("accumulated", "two"):
        curve = losses(tmp_path / name)
        assert sorted(curve) == sorted(expected)
        assert max(abs(curve[s] - expected[s]) for s in expected) < 2e-3


def test_resume_skips_a_damaged_checkpoint(tokens, unbroken, tmp_path) -> None:
    out = tmp_path / "damaged"
    options = arguments(tokens, out, "--max_steps", 40, "--save_every", 10, "--keep_last", 9)
    script("pretrain.py", *options)
    for name in ("model.safetensors", "state.json", "config.json", "checksums.json"):
        newest = checkpoint.list_steps(out)[-1]
        content = (newest / name).read_bytes()
        if name == "checksums.json":
            (newest / name).unlink()
        elif name == "config.json":  # still JSON, but of another shape: no mistake of the settings
            (newest / name).write_bytes(content.replace(b'"dim": 32', b'"dim": 36'))
        else:
            (newest / name).write_bytes(content[: len(content) // 2])
        assert name in script("pretrain.py", *options, "--resume").stdout
        assert losses(out) == losses(unbroken)
        assert (out / f"damaged_{newest.name}").is_dir()
    for folder in checkpoint.list_steps(out):  # none is whole: say so instead of starting from nothing
        (folder / "state.json").write_bytes(b"")
    assert "都已损坏" in script("pretrain.py", *options, "--resume", ok=False).stderr


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tokens, tmp_path) -> None:
    out = tmp_path / "diverged"
    options = arguments(tokens, out, "--max_steps", 40, "--save_every", 5, "--keep_last", 1)
    script("pretrain.py", *options[:-6], "--max_steps", 5, "--save_every", 5)
    wild = [*options, "--clip", 0, "--weight_decay", 1e5, "--resume"]  # weights grow a thousandfold a step
    assert "--lr" in script("pretrain.py", *wild, ok=False).stderr
    (kept,) = checkpoint.list_steps(out)
    assert all(v.isfinite().all() for v in checkpoint.read_weights(kept).values())


def test_an_existing_run_is_not_overwritten_and_settings_must_match(tokens, unbroken) -> None:
    again = script("pretrain.py", *arguments(tokens, unbroken, "--max_steps", 40), ok=False)
    assert "--resume" in again.stderr
    other = arguments(tokens, unbroken, "--max_steps", 60, "--resume")
    other[other.index("--batch_tokens") + 1] = 1024
    assert "batch_tokens" in script("pretrain.py", *other, ok=False).stderr
    wider = arguments(tokens, unbroken, "--max_steps", 60, "--resume")
    wider[wider.index("--dim") + 1] = 64
    assert "模型形状 dim=32 训练的，现在是 64" in script("pretrain.py", *wider, ok=False).stderr


def test_wrong_input_to_pretraining_is_one_clear_line(tokens, vocabulary, tmp_path) -> None:
    odd = tmp_path / "odd.bin"
    odd.write_bytes(tokens.read_bytes()[:-1])
    for options, word in (
        (["--data", tmp_path / "none.bin"], "none.bin"),
        (["--data", odd, "--tokenizer", vocabulary], "odd.bin"),
        ([*arguments(tokens, tmp_path / "o"), "--n_heads", 5], "n_heads"),
        ([*arguments(tokens, tmp_path / "o"), "--lr", -1], "--lr"),
        ([*arguments(tokens, tmp_path / "o"), "--precision", "fp16"], "fp16"),
        ([*arguments(tokens, tmp_path / "o"), "--max_seq_len", 0], "--max_seq_len"),
        ([*arguments(tokens, tmp_path / "o"), "--seed", -1], "--seed"),
        ([*arguments(tokens, tmp_path / "o"), "--epochs", "nan"], "--epochs"),
        ([*arguments(tokens, tmp_path / "o"), "--batch_tokens", 0], "--batch_tokens"),
        (arguments(tokens, odd), "odd.bin"),
        (["--demo", *arguments(tmp_path / "none.bin", tmp_path / "o")], "none.bin"),
    ):
        failed = script("pretrain.py", *options, ok=False)
        assert word in failed.stderr
        assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr
    assert "max_stepz" in script("pretrain.py", "--max_stepz", 3, ok=False).stderr


def test_a_vocabulary_that_does_not_match_is_refused(tokens, chatglm2, tmp_path) -> None:
    options = arguments(tokens, tmp_path / "o", "--tokenizer", chatglm2.vocab_file)
    assert "词表" in script("pretrain.py", *options, ok=False).stderr


def test_fine_tuning_lowers_the_loss_of_answers(tuned) -> None:
    curve = losses(tuned / "out")
    assert curve[12] < curve[1]
    args = checkpoint.read_args(checkpoint.find(tuned / "out"))
    assert (args.dim, args.n_layers) == (32, 2)


def test_fine_tuning_in_two_processes_gives_the_same_curve(tuned, unbroken, tmp_path) -> None:
    torchrun(
        2, "sft.py", "--data", tuned / "sft.csv", "--init", unbroken, "--out", tmp_path / "two",
        "--max_steps", 12, "--log_every", 1, "--lr", 1e-3, "--device", "cpu", "--precision", "fp32", "--micro_batch", 5,
    )  # fmt: skip
    expected, curve = losses(tuned / "out"), losses(tmp_path / "two")
    assert max(abs(curve[s] - expected[s]) for s in expected) < 2e-3


def test_fine_tuning_without_a_model_or_data_says_so(tuned, unbroken, tmp_path) -> None:
    sft = ["--data", tuned / "sft.csv", "--out", tmp_path / "o"]
    assert "pretrain.py" in script("sft.py", *sft, "--init", tmp_path / "none", ok=False).stderr
    missing = script("sft.py", "--data", tmp_path / "none.csv", "--init", unbroken, ok=False)
    assert "none.csv" in missing.stderr
    (tmp_path / "header.csv").write_text("question,reply\n一,二\n", encoding="utf-8")
    wrong = script(
        "sft.py", "--data", tmp_path / "header.csv", "--init", unbroken, "--out", tmp_path / "o", ok=False
    )
    assert "prompt" in wrong.stderr


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_an_original_pth_loads_strictly_with_the_same_logits(prefix, tuned, vocabulary, tmp_path) -> None:
    torch.manual_seed(0)
    # 512 x 8: the head count of the 92M preset is not in the weights; a small vocabulary keeps it quick.
    model = Transformer(ModelArgs(dim=512, n_layers=8, n_heads=8, vocab_size=2500)).eval()
    path = tmp_path / "epoch_0.pth"
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, path)
    loaded = checkpoint.load(path, tokenizer=vocabulary).model.eval()
    assert loaded.args == model.args
    tokens = torch.randint(0, 2500, (2, 30))
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=0, rtol=0)
    if prefix:  # and fine-tuning starts from it
        sft = [
            "--data",
            tuned / "sft.csv",
            "--init",
            path,
            "--tokenizer",
            vocabulary,
            "--out",
            tmp_path / "o",
        ]
        script("sft.py", *sft, "--max_steps", 1, "--batch", 2, "--device", "cpu", "--precision", "fp32")


def test_damaged_checkpoints_are_one_clear_line(tuned, vocabulary, tmp_path) -> None:
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    for file in checkpoint.find(tuned / "out").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    (tmp_path / "bad.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    torch.save({"a": torch.ones(2)}, tmp_path / "other.pth")
    for path in (folder, tmp_path / "bad.pth", tmp_path / "other.pth", tmp_path / "none"):
        for name in ("eval.py", "eval_pretrain.py"):
            failed = script(name, "--model", path, ok=False)
            assert path.name in failed.stderr
            assert len(failed.stderr.strip().splitlines()) == 1, failed.stderr


def test_a_pth_of_unknown_shape_needs_its_number_of_heads(vocabulary, tmp_path) -> None:
    model = Transformer(ModelArgs(dim=96, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=2500)).eval()
    torch.save(model.state_dict(), tmp_path / "odd.pth")
    failed = script("eval.py", "--model", tmp_path / "odd.pth", "--tokenizer", vocabulary, ok=False)
    assert "--n_heads" in failed.stderr
    loaded = checkpoint.load(tmp_path / "odd.pth", tokenizer=vocabulary, n_heads=6).model.eval()
    assert loaded.args == model.args
    tokens = torch.randint(0, 2500, (2, 30))
    torch.testing.assert_close(loaded(tokens), model(tokens), atol=0, rtol=0)


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.getuid() != 0, reason="needs root to mount a tmpfs")
def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tokens, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        options = arguments(tokens, disk / "out", "--max_steps", 40, "--save_every", 2, "--keep_last", 9)
        assert "无法写入" in script("pretrain.py", *options, ok=False).stderr
        kept = checkpoint.list_steps(disk / "out")
        assert kept
        assert checkpoint.load(kept[-1]).model.num_params() > 0
        assert not [f for f in (disk / "out").iterdir() if ".tmp" in f.name]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_pickle_with_code_is_not_run(tmp_path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "pwned",))

    torch.save({"tok_embeddings.weight": Evil()}, tmp_path / "evil.pth")
    script("eval.py", "--model", tmp_path / "evil.pth", ok=False)
    assert not (tmp_path / "pwned").exists()


def test_eval_pretrain_measures_what_plain_torch_measures(unbroken, tmp_path) -> None:
    text = "这是一段用来测量困惑度的文字，共有两行。"
    (tmp_path / "held.txt").write_text(f"{text}\n第二篇文字更短，也要算进去。\n", encoding="utf-8")
    done = script(
        "eval_pretrain.py", "--model", unbroken, "--text", tmp_path / "held.txt", "--max_new_tokens", 8
    )
    loaded = checkpoint.load(unbroken)
    ids = [2]
    for line in (text, "第二篇文字更短，也要算进去。"):
        ids += [*loaded.tokenizer.encode(line), 2]
    loss = 0.0
    for start in range(0, len(ids) - 1, 64):
        window = torch.tensor([ids[start : start + 65]])
        logits = loaded.model(window[:, :-1]).detach().log_softmax(-1)
        loss -= float(logits.gather(2, window[:, 1:, None]).sum())
    size = len(text.encode()) + len("第二篇文字更短，也要算进去。".encode())
    assert f"损失 {loss / (len(ids) - 1):.4f}" in done.stdout
    assert f"每字节 {loss / 0.6931471805599453 / size:.4f} 比特" in done.stdout
    assert done.stdout.count("【") == 4


def test_eval_answers_scores_and_saves(tuned, tmp_path) -> None:
    questions = tmp_path / "q.jsonl"
    rows = [
        {"question": "水的化学式是什么？", "answer": "水的化学式是H2O。"},
        {"instruction": "你好吗", "output": "好"},
    ]
    questions.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    done = script(
        "eval.py", "--model", tuned / "out", "--file", questions, "--questions", "你好", "--max_new_tokens", 8,
        "--save", tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert "完全一致" in done.stdout
    assert "问：你好" in done.stdout
    saved = [
        json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["reference"] for row in saved] == ["", "水的化学式是H2O。", "好"]
    (tmp_path / "plain.txt").write_text("第一个问题\n第二个问题\n", encoding="utf-8")
    plain = script(
        "eval.py", "--model", tuned / "out", "--file", tmp_path / "plain.txt", "--max_new_tokens", 4
    )
    assert plain.stdout.count("问：") == 2


def test_text_that_is_not_text_is_one_clear_line(tuned, tmp_path) -> None:
    for options in (["--questions", b"\xff\xfe".decode("utf-8", "surrogateescape")],):
        failed = script("eval.py", "--model", tuned / "out", *options, ok=False)
        assert "surrogate" in failed.stderr
    (tmp_path / "gbk.txt").write_bytes("这是一个问题，用的是国标编码\n第二个问题也是\n".encode("gbk"))
    failed = script("eval.py", "--model", tuned / "out", "--file", tmp_path / "gbk.txt", ok=False)
    assert "GBK" in failed.stdout
    (tmp_path / "log.txt").write_text("[INFO] data here\n[INFO] data\n", encoding="utf-8")
    script("sft_data_process.py", "--data", tmp_path / "log.txt", "--out", tmp_path / "x.csv", ok=False)


def test_chat_keeps_history_and_obeys_commands(tuned) -> None:
    done = script(
        "eval.py", "--model", tuned / "out", "--chat", "--max_new_tokens", 5,
        input="你好\n再说一遍\n/clear\n问题\n/exit\n",
    )  # fmt: skip
    assert done.stdout.count("答：") == 3
    assert "历史已清空" in done.stdout


def test_scores_are_those_of_known_answers() -> None:
    import eval as evaluation

    perfect = evaluation.score(["北京是中国的首都。"] * 3, ["北京是中国的首都。"] * 3)
    assert perfect["exact"] == 1
    assert [perfect[k] for k in ("rouge1", "rouge2", "rougeL")] == [100, 100, 100]
    assert perfect["bleu"] == pytest.approx(100)
    half = evaluation.score(["今天 天气", "完全不同"], ["今天 下雨", "另外文字"])
    assert half["exact"] == 0
    assert half["rouge1"] == pytest.approx(25)  # one of two words, in one of two answers
