"""Averaged checkpoints against the mean worked out by hand."""

import pytest
import torch
from conftest import script

import average
from chatglm_tokenizer.model_file import read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from model import ModelArgs, Transformer
from stage import UserError, parse
from training import checkpoint
from training.plain import write_plain
from training.runtime import Runtime
from training.state import weights_of


def model_of(seed: int, vocab_size: int, **shape) -> Transformer:
    torch.manual_seed(seed)
    shape = dict(dim=32, n_layers=2, n_heads=4, max_seq_len=32) | shape
    return Transformer(ModelArgs(vocab_size=vocab_size, **shape))


@pytest.fixture
def tokenizer(vocabulary) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(vocabulary)


def run(*arguments: object) -> None:
    """The stage as its command line runs it, without a process of its own."""
    average.main(parse(average.Config, list(map(str, arguments))))


def save(folder, model: Transformer, tokenizer: ChatGLMTokenizer):
    write_plain(folder, model.args, weights_of(model), tokenizer.files, {})
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shares", [(), (3, 1)])
def test_weights_are_the_mean(tmp_path, tokenizer, tied, shares) -> None:
    models = [model_of(seed, tokenizer.vocab_size, tie_embeddings=tied) for seed in (0, 1)]
    folders = [save(tmp_path / str(i), m, tokenizer) for i, m in enumerate(models)]
    options = ["--weights", *shares] if shares else []
    run("--models", *folders, *options, "--out", tmp_path / "out")
    a, b = (share / sum(shares or (1, 1)) for share in (shares or (1, 1)))
    loaded = checkpoint.load(tmp_path / "out")
    first, second = (weights_of(m) for m in models)
    for name, weight in weights_of(loaded.model).items():
        assert torch.allclose(weight, a * first[name] + b * second[name], atol=1e-7), name
    assert loaded.tokenizer.sha256 == tokenizer.sha256
    assert loaded.model.args.tie_embeddings == tied


def test_last_checkpoints_of_a_run(tmp_path, tokenizer) -> None:
    out, runtime = tmp_path / "run", Runtime(torch.device("cpu"), torch.float32)
    writer = checkpoint.Writer(out, runtime, keep_last=5)
    models = [model_of(seed, tokenizer.vocab_size) for seed in range(4)]
    for step, model in enumerate(models):
        writer.save(step, model, None, average.Config(), tokenizer.files, {})
        writer.wait()
    run("--models", out, "--last", 3, "--out", tmp_path / "out")
    expected = torch.stack([m.norm.weight + m.tok_embeddings.weight[5] for m in models[1:]]).mean(0)
    loaded = checkpoint.load(tmp_path / "out").model
    assert torch.allclose(loaded.norm.weight + loaded.tok_embeddings.weight[5], expected, atol=1e-6)
    with pytest.raises(UserError, match="只有 4 个检查点"):
        run("--models", out, "--last", 9, "--out", tmp_path / "more")
    with pytest.raises(UserError, match="不会覆盖"):
        run("--models", out, tmp_path / "out", "--out", out)
    assert len(checkpoint.list_steps(out)) == 4


def test_what_does_not_fit_together_is_refused(tmp_path, tokenizer) -> None:
    size = tokenizer.vocab_size
    a = save(tmp_path / "a", model_of(0, size), tokenizer)
    deeper = save(tmp_path / "deeper", model_of(0, size, n_layers=3), tokenizer)
    other = tmp_path / "other"
    write_plain(
        other,
        model_of(1, size).args,
        weights_of(model_of(1, size)),
        {"tokenizer.model": changed(tokenizer)},
        {},
    )
    damaged = save(tmp_path / "damaged", model_of(2, size), tokenizer)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    cases = [
        (deeper, [], "形状不同（n_layers"), (other, [], "词表不同"), (damaged, [], "已损坏"),
        (deeper, ["--weights", 1], "一一对应"), (deeper, ["--weights", 0, 0], "不能全为 0"),
        (tmp_path / "none", [], "找不到检查点"),
    ]  # fmt: skip
    for path, options, message in cases:
        with pytest.raises(UserError, match=message):
            run("--models", a, path, *options, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    alone = script("average.py", "--models", a, "--out", tmp_path / "out", ok=False)
    assert "只有一个检查点" in alone.stderr and len(alone.stderr.strip().splitlines()) == 1


def changed(tokenizer: ChatGLMTokenizer) -> bytes:
    """A vocabulary as large as the other, with another last piece."""
    piece = read_model(tokenizer.content).pieces[-1].encode()
    at, other = tokenizer.content.rindex(piece), "x" * len(piece)
    return tokenizer.content[:at] + other.encode() + tokenizer.content[at + len(piece) :]
