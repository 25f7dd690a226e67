"""Windows that cut few documents: against packing written plainly, and through the command line."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script, torchrun
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset_fit
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset import TokenWindows
from dataset_fit import FittedWindows, best_fit, build_indices, index_path
from model import IGNORE
from stage import UserError
from training import checkpoint
from training.log import read_log

EOS = 2


def plain_best_fit(lengths: list[int], room: int) -> list[int]:
    """Room left in every window, when each piece, longest first, goes where the least room that suffices is."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in left if r >= length]
        if fitting:
            left[left.index(min(fitting))] -= length
        else:
            left.append(room - length)
    return sorted(left)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_leaves_the_room_that_plain_best_fit_leaves(lengths: list[int]) -> None:
    sizes = np.array(lengths)
    windows = best_fit(sizes, np.argsort(-sizes, kind="stable"), 20)
    filled = np.bincount(windows, sizes)
    assert sorted((20 - filled).astype(int).tolist()) == plain_best_fit(lengths, 20)


@pytest.mark.parametrize("block", [50, 1 << 24])  # many blocks, and one
@pytest.mark.parametrize("closed", [True, False])  # whether the last document has its <eos>
def test_every_token_is_a_target_once_and_short_documents_are_whole(
    block: int, closed: bool, tmp_path, vocabulary, monkeypatch
) -> None:
    monkeypatch.setattr(dataset_fit, "BLOCK", block)
    rng = np.random.default_rng(block + closed)
    documents = [
        np.append(np.full(n, 3 + i), EOS) for i, n in enumerate(rng.choice([0, 1, 4, 9, 15, 16, 40, 130], 60))
    ]
    stream = np.concatenate(documents)[: None if closed else -1]
    windows = build(tmp_path / "x.bin", stream, vocabulary, 16)
    targets, whole = [], 0
    for window in range(len(windows)):
        places = windows.places(0, window)
        tokens, expected = np.zeros(16, np.int64), np.full(16, IGNORE)
        numbers, column = np.full(16, -1), 0
        for number, (a, b) in enumerate(places):
            part = slice(column, column + b - a)
            tokens[part], expected[part], numbers[part] = stream[a:b], stream[a + 1 : b + 1], number
            targets += range(a + 1, b + 1)
            whole += stream[a] == EOS and (b + 1 == len(stream) or stream[b] == EOS)
            column += b - a
        row = windows.read(np.array([window]))
        assert row.tokens[0].tolist() == tokens.tolist()
        assert row.targets[0].tolist() == expected.tolist()
        if len(places) > 1:
            assert row.documents[0].tolist() == numbers.tolist()
        else:
            assert row.documents is None
    assert sorted(targets) == list(range(1, len(stream)))
    # All but the first document, which has no <eos> before it, and those longer than a window.
    assert whole == sum(len(d) <= 16 for d in documents[1:-1]) + (len(documents[-1]) - (not closed) <= 16)
    together = windows.read(np.arange(len(windows)))
    for window in range(len(windows)):
        assert torch.equal(together.targets[window], windows.read(np.array([window])).targets[0])


def build(path: Path, stream: np.ndarray, vocabulary: Path, seq_len: int) -> FittedWindows:
    """The fitted windows of a token file with this content."""
    tokenizer = ChatGLMTokenizer(vocabulary)
    stream.astype("<u2").tofile(path)
    build_indices(TokenWindows([path], seq_len, tokenizer), EOS)
    return FittedWindows([path], seq_len, tokenizer, document_mask=True)


def test_an_index_is_made_again_when_its_file_has_changed(tmp_path, vocabulary) -> None:
    path = tmp_path / "x.bin"
    first = build(path, np.tile([5, 6, 7, EOS], 20), vocabulary, 16)
    tokenizer = ChatGLMTokenizer(vocabulary)
    np.tile([5, 6, 7, 8, 9, 10, EOS], 40).astype("<u2").tofile(path)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=r"x\.bin"):
        FittedWindows([path], 16, tokenizer)
    second = build(path, np.tile([5, 6, 7, 8, 9, 10, EOS], 40), vocabulary, 16)
    assert len(first) != len(second)
    made = index_path(path, 16).stat().st_mtime_ns
    build_indices(TokenWindows([path], 16, tokenizer), EOS)
    assert index_path(path, 16).stat().st_mtime_ns == made  # nothing to do
    assert not [p for p in tmp_path.iterdir() if "tmp" in p.name or "old" in p.name]


def losses(out: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(out / "log.jsonl") if "loss" in r}


def test_training_on_fitted_windows_resumes_with_another_number_of_processes(tokens, tmp_path) -> None:
    data = tmp_path / "data.bin"  # a copy: the index is written beside it
    shutil.copy(tokens, data)
    shutil.copy(tokens.with_suffix(".json"), data.with_suffix(".json"))
    options = [
        "--data", data, "--valid", tokens.parent / "valid.bin", "--windows", "fit", "--document_mask", "--dim", 32,
        "--n_layers", 2, "--n_heads", 2, "--max_seq_len", 64, "--batch_tokens", 512, "--lr", 3e-3, "--log_every", 1,
        "--device", "cpu", "--precision", "fp32", "--max_steps", 10, "--save_every", 4, "--keep_last", 9,
    ]  # fmt: skip
    out = tmp_path / "out"
    torchrun(2, "pretrain.py", *options, "--out", out)
    curve = losses(out)
    assert curve[10] < curve[1] - 0.2
    for folder in checkpoint.list_steps(out)[1:]:
        shutil.rmtree(folder)
    script("pretrain.py", *options, "--out", out, "--resume")
    resumed = losses(out)
    assert sorted(resumed) == sorted(curve)
    assert max(abs(curve[s] - resumed[s]) for s in curve) < 2e-3
