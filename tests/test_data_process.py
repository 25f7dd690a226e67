"""Stage 1: token files hold every document once, say what they are, and never mix vocabularies."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.pretrain_text import Document
from sources.token_files import Encoded, TokenFile, Validation, published_bins

ROOT = Path(__file__).resolve().parents[1]
CHATGLM2 = ROOT.parent / "shared" / "data" / "chatglm2_tokenizer.model"
EOS = 2
needs_chatglm2 = pytest.mark.skipif(not CHATGLM2.exists(), reason="the ChatGLM2 vocabulary is not here")


def run(script, *args, root=ROOT, cwd=None):
    """Run a stage as a user does; never a traceback."""
    command = [sys.executable, script, *map(str, args)]
    result = subprocess.run(command, cwd=cwd or root, capture_output=True, text=True, encoding="utf-8")
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    return [
        "".join(rng.choice("天地玄黄宇宙洪荒日月盈昃") for _ in range(rng.randrange(20, 60)))
        for _ in range(400)
    ]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory, texts):
    """A tiny vocabulary with the project's ids: unknown 0, <bos> 1, <eos> 2."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("vocabulary") / "tiny"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def corpus(tmp_path, texts):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        "\n".join(json.dumps({"text": text}) for text in texts) + '\n{"text": 5}\n', encoding="utf-8"
    )
    return path


def process(folder, data, tokenizer, *args):
    """Tokenise into a folder; returns the process and, if it worked, both files with their sidecars."""
    out, valid = folder / "train.bin", folder / "valid.bin"
    options = (
        "--data",
        data,
        "--tokenizer",
        tokenizer,
        "--out",
        out,
        "--valid",
        valid,
        "--no_find_bin",
        *args,
    )
    result = run("data_process.py", *options)
    files = [
        (np.fromfile(path, "<u2"), json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        for path in (out, valid)
        if path.exists()
    ]
    return result, files


def documents_of(ids):
    assert ids[-1] == EOS
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]]


def test_every_document_once_with_eos(tmp_path, corpus, texts, vocabulary):
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

    result, files = process(tmp_path, corpus, vocabulary)
    assert result.returncode == 0, result.stderr
    tokenizer = ChatGLMTokenizer(str(vocabulary))
    decoded = [[tokenizer.decode(ids[:-1]) for ids in documents_of(tokens)] for tokens, _ in files]
    assert sorted(decoded[0] + decoded[1]) == sorted(texts)
    assert len(decoded[1]) == 40  # a tenth: fewer than 50, the corpus being small
    for (ids, sidecar), part in zip(files, decoded, strict=True):
        assert sidecar["dtype"] == "uint16" and sidecar["tokens"] == len(ids) == sidecar["text_tokens"]
        assert sidecar["documents"] == len(part) == sidecar["sources"]["corpus"]["documents"]
        assert sidecar["characters"] == sum(map(len, part))
        assert sidecar["bytes"] == sum(len(text.encode()) for text in part)
        assert sidecar["tokenizer"]["vocab_size"] == 300 and len(sidecar["tokenizer"]["sha256"]) == 64
    assert "token/秒" in result.stdout and "字段 text 不是文字" in result.stdout


def test_same_result_twice_and_from_any_order(tmp_path, corpus, vocabulary):
    for name in ("one", "two", "reversed"):
        (tmp_path / name).mkdir()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    _, one = process(tmp_path / "one", corpus, vocabulary)
    _, two = process(tmp_path / "two", corpus, vocabulary)
    _, other = process(tmp_path / "reversed", tmp_path / "other.jsonl", vocabulary)
    assert all((a[0] == b[0]).all() for a, b in zip(one, two, strict=True))
    assert sorted(documents_of(one[1][0])) == sorted(documents_of(other[1][0]))


DOCUMENTS = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(1, 50)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 5), st.sampled_from([60, 10_000]))
def test_validation_choice(documents, fraction, least, most_tokens):
    encoded = [Encoded(rank, np.zeros(size, "u2"), str(n), 0, 0) for n, (rank, size) in enumerate(documents)]
    choice = Validation(fraction, least, most_tokens)
    train = [leftover for document in encoded for leftover in choice.offer(document)]
    chosen, held_back = choice.settle()
    train += held_back
    assert sorted(d.source for d in chosen + train) == sorted(d.source for d in encoded)
    assert sum(len(d.ids) for d in chosen) <= most_tokens or len(chosen) == 1
    assert len(train) > 0 or not encoded
    if most_tokens == 10_000 and chosen and train:
        assert max(d.rank for d in chosen) <= min(d.rank for d in train)


def test_training_documents_never_become_validation_documents():
    rng = random.Random(3)
    ranks = [rng.getrandbits(64) for _ in range(4000)]

    def valid_of(count):
        choice = Validation(0.02, 20, 10**6)
        for rank in ranks[:count]:
            choice.offer(Encoded(rank, np.zeros(3, "u2"), "", 0, 0))
        return {document.rank for document in choice.settle()[0]}

    for before, after in ((300, 1000), (1000, 4000)):
        assert not (valid_of(after) & set(ranks[:before])) - valid_of(before)


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Tokenizer:
        vocab_size, special_tokens = 70_000, {"<eos>": EOS}

    from contextlib import ExitStack

    with ExitStack() as stack:
        file = TokenFile(tmp_path / "x.bin", tmp_path / "x.bin", stack, Tokenizer())
        file.write(file.encoded(Document("甲", "源"), [69_999]))
    assert np.fromfile(tmp_path / "x.bin", "<u4").tolist() == [69_999, EOS] and file.dtype.name == "uint32"


# --- published token files ---


def test_published_bins_are_those_without_a_sidecar(tmp_path):
    for name in ("published.bin", "ours.bin", "out.bin", ".hidden.bin"):
        (tmp_path / name).write_bytes(b"\0\0")
    (tmp_path / "ours.json").write_text('{"dtype": "uint16", "tokens": 1}', encoding="utf-8")
    (tmp_path / "published.json").write_text('[{"text": "a corpus of the same name"}]', encoding="utf-8")
    assert published_bins(tmp_path, {tmp_path / "out.bin"}) == [tmp_path / "published.bin"]


@needs_chatglm2
def test_merging_published_tokens(tmp_path, corpus, texts):
    rng = np.random.default_rng(0)
    published = [np.append(rng.integers(3, 64_789, size), EOS) for size in rng.integers(5, 40, 1000)]
    np.concatenate(published).astype("<u2").tofile(tmp_path / "corpus63b.bin")
    result, files = process(tmp_path, corpus, CHATGLM2, "--bin", tmp_path / "corpus63b.bin")
    assert result.returncode == 0, result.stderr
    (train, train_json), (valid, valid_json) = files
    merged = documents_of(train) + documents_of(valid)
    assert len(merged) == len(texts) + 1000
    assert {tuple(ids.tolist()) for ids in published} <= set(map(tuple, merged))
    for sidecar in (train_json, valid_json):
        assert sum(source["tokens"] for source in sidecar["sources"].values()) == sidecar["tokens"]
        assert sidecar["text_tokens"] < sidecar["tokens"]
    assert 0 < valid_json["sources"]["corpus63b"]["documents"] < 20


@needs_chatglm2
@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\1\0\2", "不是偶数"), (b"", "空文件"), (b"\xff\xff\2\0", "超出词表大小 64,793"), (None, "找不到")],
)
def test_bad_published_files_are_refused(tmp_path, corpus, content, message):
    path = tmp_path / "bad.bin"
    if content is not None:
        path.write_bytes(content)
    result, files = process(tmp_path, corpus, CHATGLM2, "--bin", path)
    assert result.returncode and message in result.stderr and "bad.bin" in result.stderr
    assert files == [] and not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_published_tokens_need_their_own_vocabulary(tmp_path, corpus, vocabulary):
    (tmp_path / "published.bin").write_bytes(b"\5\0\2\0")
    result, files = process(tmp_path, corpus, vocabulary, "--bin", tmp_path / "published.bin")
    assert result.returncode and "ChatGLM2" in result.stderr and files == []


# --- mistakes, and running without arguments ---


def test_mistakes_end_in_one_line(tmp_path, corpus, vocabulary):
    result, _ = process(tmp_path, tmp_path / "missing", vocabulary)
    assert result.returncode and "找不到" in result.stderr
    result, _ = process(tmp_path, corpus, tmp_path / "missing.model")
    assert result.returncode and "download.py" in result.stderr
    (tmp_path / "bad.jsonl").write_text('{"txt": "x"}\n', encoding="utf-8")
    result, files = process(tmp_path, tmp_path / "bad.jsonl", vocabulary)
    assert result.returncode and "--text_column" in result.stdout and files == []


def test_without_arguments_the_users_data_is_found(tmp_path, corpus, vocabulary):
    root = tmp_path / "repository"
    for name in ("stage.py", "data_process.py"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name in ("sources", "data_clean", "chatglm_tokenizer"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.model"))
    (root / "data" / "mine").mkdir(parents=True)
    shutil.copy(corpus, root / "data" / "mine" / "a.jsonl")
    shutil.copy(vocabulary, root / "chatglm_tokenizer" / "tokenizer.model")
    sidecar = root / "data" / "pretrain_data.json"

    for _ in range(2):  # the second run does not take its own output for data
        assert run("data_process.py", root=root).returncode == 0
        assert set(json.loads(sidecar.read_text(encoding="utf-8"))["sources"]) == {"mine"}
    for _ in range(2):
        result = run("clear.py", cwd=root / "data_clean")
        assert result.returncode == 0, result.stderr
    cleaned = json.loads((root / "data" / "clean" / "report.json").read_text(encoding="utf-8"))
    assert run("data_process.py", root=root).returncode == 0
    processed = [
        json.loads((root / "data" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("pretrain_data", "valid_data")
    ]
    assert sum(file["documents"] for file in processed) == cleaned["steps"][-1]["rows_out"]
    assert processed[0]["settings"]["data"].endswith("clean")
