"""The filter by a model: batched figures against one text at a time, computed from the logits by hand."""

import json
import random
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import script

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from data_clean import perplexity
from data_clean.perplexity import HIGH, LOW, batches, bits_per_byte, outside
from model import ModelArgs, Transformer
from stage import ROOT, StageConfig, UserError
from training import checkpoint
from training.runtime import Runtime

TEXTS = [
    "床前明月光，疑是地上霜。",
    "",
    "a",
    "中国的首都是北京，它位于华北平原的北部。" * 30,
    "🙂𠀀\n\n  ！",
    "感冒了应该多喝水。" * 3,
    "二" * 5000,
]


@pytest.fixture(scope="module")
def tiny(vocabulary, tmp_path_factory):
    """A checkpoint of random weights, large enough that its predictions differ from place to place."""
    torch.manual_seed(0)
    tokenizer = ChatGLMTokenizer(vocabulary)
    args = ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=64)
    model = Transformer(args)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    out = tmp_path_factory.mktemp("tiny")
    writer = checkpoint.Writer(out, Runtime(torch.device("cpu"), torch.float32), keep_last=1)
    writer.save(1, model, None, StageConfig(), {"tokenizer.model": vocabulary.read_bytes()}, {})
    writer.wait()
    return out


def alone(text, model, tokenizer, limit):
    """Bits per byte of one text, from the probabilities of its tokens."""
    while len(tokenizer.encode(text)) > limit:
        text = text[: len(text) * limit // len(tokenizer.encode(text))]
    ids = tokenizer.encode(text)
    if not ids:
        return float("nan")
    with torch.inference_mode():
        logits = model(torch.tensor([[tokenizer.special_tokens["<eos>"], *ids[:-1]]]))[0]
    probabilities = logits.double().softmax(-1)
    nats = -sum(float(probabilities[place, token].log()) for place, token in enumerate(ids))
    return nats / np.log(2) / len(text.encode())


@pytest.mark.parametrize("max_tokens", [20, 512])
def test_batched_figures_are_those_of_single_texts(tiny, max_tokens):
    loaded = checkpoint.load(tiny)
    loaded.model.eval()
    found = bits_per_byte(TEXTS, tiny, max_tokens)
    limit = min(max_tokens, loaded.model.args.max_seq_len)
    expected = [alone(text, loaded.model, loaded.tokenizer, limit) for text in TEXTS]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert np.isnan(found[1]) and len(set(np.round(found, 3).tolist())) == len(TEXTS)  # texts are told apart


def test_same_figures_however_batched_and_every_time(tiny, monkeypatch):
    once = bits_per_byte(TEXTS, tiny, 32)
    assert np.array_equal(once, bits_per_byte(TEXTS, tiny, 32), equal_nan=True)
    monkeypatch.setitem(perplexity.LOGITS, "cpu", 1)  # one text at a time
    np.testing.assert_allclose(bits_per_byte(TEXTS, tiny, 32), once, rtol=1e-5)


def test_a_repeated_text_is_looked_at_only_as_far_as_the_context_goes(tiny):
    long, short = bits_per_byte(["二" * 100_000, "二" * 5000], tiny)
    assert long == short


def test_batches_hold_each_text_once_within_the_budget():
    lengths = np.random.default_rng(0).integers(0, 50, 200).tolist()
    made = list(batches(lengths, 120))
    assert sorted(i for batch in made for i in batch) == [i for i, length in enumerate(lengths) if length]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 120 for batch in made)
    assert list(batches([500], 120)) == [[0]] and list(batches([], 120)) == []


def test_what_is_outside_the_limits_is_dropped():
    values = np.array([0.1, 1.0, 9.0, np.nan, 0.5, 2.0])
    found = outside(values, 0.5, 2.0)
    assert {rule: positions.tolist() for rule, positions in found.items()} == {LOW: [0], HIGH: [2]}
    assert outside(values, 0.0, np.inf) == {}


def test_no_checkpoint_is_a_clear_mistake(tmp_path):
    with pytest.raises(UserError, match="找不到检查点"):
        bits_per_byte(["文"], tmp_path / "none")


def test_torch_is_imported_only_when_used():
    code = "import sys, data_clean.perplexity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_cleaning_drops_what_the_model_finds_too_easy_or_too_hard(tiny, tmp_path):
    rng = random.Random(0)
    texts = ["".join(chr(0x4E00 + rng.randrange(3000)) for _ in range(40)) + "。" for _ in range(20)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "raw.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = sorted(bits_per_byte(texts, tiny))
    low, high = (values[4] + values[5]) / 2, (values[15] + values[16]) / 2
    bounds = ["--model", tiny, "--min_bits", low, "--max_bits", high]
    script("data_clean/clear.py", "--data", tmp_path / "raw.jsonl", "--out", tmp_path / "out", *bounds)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert {rule: report["rules"][rule]["rows"] for rule in (LOW, HIGH)} == {LOW: 5, HIGH: 4}
    kept = pq.read_table(tmp_path / "out" / "part-00000.parquet")["text"].to_pylist()
    assert sorted(kept) == sorted(text for text in texts if low < bits_per_byte([text], tiny)[0] < high)
