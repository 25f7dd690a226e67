"""Stage 1: token files hold every document once, say what they are, and never mix vocabularies."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sources import published_tokens
from sources.published_tokens import published_bins
from sources.token_files import open_token_files
from sources.token_runs import ENTRY
from stage import UserError

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
    assert 20 <= len(decoded[1]) <= 45  # about a twelfth: fewer than 50, the corpus being small
    for (ids, sidecar), part in zip(files, decoded, strict=True):
        assert sidecar["dtype"] == "uint16" and sidecar["tokens"] == len(ids) == sidecar["text_tokens"]
        assert sidecar["documents"] == len(part) == sidecar["sources"]["corpus"]["documents"]
        assert sidecar["characters"] == sum(map(len, part))
        assert sidecar["bytes"] == sum(len(text.encode()) for text in part)
        assert sidecar["tokenizer"]["vocab_size"] == 300 and len(sidecar["tokenizer"]["sha256"]) == 64
    assert "token/秒" in result.stdout and "字段 text 不是文字" in result.stdout


def test_empty_files_do_no_harm(tmp_path, corpus, vocabulary):
    (tmp_path / "a_empty.jsonl").write_bytes(b"")
    result, _ = process(tmp_path, tmp_path, vocabulary)
    assert result.returncode == 0 and "空文件" in result.stdout
    corpus.unlink()
    result, _ = process(tmp_path, tmp_path, vocabulary)
    assert result.returncode and "没有一篇可用的文档" in result.stderr


def test_same_result_twice_and_from_any_order(tmp_path, corpus, vocabulary):
    for name in ("one", "two", "reversed"):
        (tmp_path / name).mkdir()
    lines = corpus.read_text(encoding="utf-8").splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join(lines[::-1]), encoding="utf-8")
    _, one = process(tmp_path / "one", corpus, vocabulary)
    _, two = process(tmp_path / "two", corpus, vocabulary)
    _, other = process(tmp_path / "reversed", tmp_path / "other.jsonl", vocabulary)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert sorted(documents_of(one[1][0])) == sorted(documents_of(other[1][0]))


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Tokenizer:
        vocab_size, sha256, vocab_file = 70_000, "", tmp_path / "x.model"

    entries = np.zeros(1, ENTRY)
    entries["tokens"] = 2
    with open_token_files([tmp_path / "x.bin"], Tokenizer(), ["源"], {}) as (file,):
        file.write(entries, np.array([69_999, EOS]))
    assert np.fromfile(tmp_path / "x.bin", "<u4").tolist() == [69_999, EOS]
    sidecar = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert sidecar["dtype"] == "uint32" and sidecar["sources"]["源"]["tokens"] == 2


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
    ids = np.concatenate(published).astype("<u2")
    ids[:-1].tofile(tmp_path / "corpus63b.bin")  # the last <eos> is missing
    result, files = process(tmp_path, corpus, CHATGLM2, "--bin", tmp_path / "corpus63b.bin")
    assert result.returncode == 0, result.stderr
    (train, train_json), (valid, valid_json) = files
    merged = documents_of(train) + documents_of(valid)
    assert len(merged) == len(texts) + 1000
    assert {tuple(ids.tolist()) for ids in published} <= set(map(tuple, merged))
    for sidecar in (train_json, valid_json):
        assert sum(source["tokens"] for source in sidecar["sources"].values()) == sidecar["tokens"]
    assert 10 < valid_json["sources"]["corpus63b"]["documents"] < 150


@needs_chatglm2
def test_a_published_document_and_its_text_are_the_same_document(tmp_path, corpus, texts):
    """The split goes by the text, however it came: no text is in both files, and weights count for both."""
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

    sp = ChatGLMTokenizer(CHATGLM2).sp
    np.concatenate([[*sp.encode(text), EOS] for text in texts]).astype("<u2").tofile(tmp_path / "bin.bin")
    _, alone = process(tmp_path, corpus, CHATGLM2)
    options = ("--bin", tmp_path / "bin.bin", "--weights", "bin=2")
    _, ((train, train_json), (valid, valid_json)) = process(tmp_path, corpus, CHATGLM2, *options)
    assert np.array_equal(valid, alone[1][0]) and valid_json["validation"]["repeated_documents"] == len(
        documents_of(valid)
    )
    counts = Counter(map(tuple, documents_of(train)))
    assert set(counts) == set(map(tuple, documents_of(alone[0][0]))) and set(counts.values()) == {3}
    assert train_json["characters"] == 3 * alone[0][1]["characters"]
    assert train_json["sources"]["bin"]["bytes"] == 2 * alone[0][1]["bytes"]


@needs_chatglm2
def test_pieces_of_published_files_hold_every_document_once(tmp_path, monkeypatch):
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

    rng = np.random.default_rng(1)
    ids = rng.integers(3, 64_789, 3000).astype("<u2")
    ids[rng.integers(0, 3000, 90)] = EOS
    path = tmp_path / "a.bin"
    ids.tofile(path)
    tokenizer = ChatGLMTokenizer(CHATGLM2)
    reader = published_tokens.PublishedReader(tokenizer)
    for size, searched, batch in ((1, 7, 50), (100, 10, 1), (999, 1000, 10**6), (10**6, 3, 500)):
        monkeypatch.setattr(published_tokens, "PIECE_TOKENS", size)
        monkeypatch.setattr(published_tokens, "SEARCHED", searched)
        monkeypatch.setattr(published_tokens, "BATCH_TOKENS", batch)
        pieces = published_tokens.split_published([path], tokenizer, tmp_path / "out.bin")
        batches = [batch for piece in pieces for batch in reader.read(piece)]
        assert np.concatenate([ids for _, ids, _ in batches]).tolist() == [*ids.tolist(), EOS]
        for texts, part, counts in batches:
            assert counts.sum() == len(part) and texts.count == len(counts)
            assert (part[np.cumsum(counts) - 1] == EOS).all()
    monkeypatch.setattr(published_tokens, "LONGEST_DOCUMENT", 30)
    monkeypatch.setattr(published_tokens, "PIECE_TOKENS", 1)
    with pytest.raises(UserError, match="<eos>"):
        published_tokens.split_published([path], tokenizer, tmp_path / "out.bin")


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
    assert files == [] and not list(tmp_path.glob(".*.tmp-*"))  # nothing half-written is left


def test_published_tokens_need_their_own_vocabulary(tmp_path, corpus, vocabulary):
    (tmp_path / "published.bin").write_bytes(b"\5\0\2\0")
    result, files = process(tmp_path, corpus, vocabulary, "--bin", tmp_path / "published.bin")
    assert result.returncode and "ChatGLM2" in result.stderr and files == []


# --- weights, order, several processes, interruptions ---


@pytest.fixture
def two_sources(tmp_path, texts):
    """A folder of two sources: `few` with 100 documents, `many` with 300."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name, part in (("few", texts[:100]), ("many", texts[100:])):
        lines = "\n".join(json.dumps({"text": text}) for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_weights_repeat_and_sample_training_documents_only(tmp_path, two_sources, vocabulary):
    _, plain = process(tmp_path, two_sources, vocabulary)
    weights = ("--weights", "few=3", "many=0.5")
    result, ((train, sidecar), (valid, _)) = process(tmp_path, two_sources, vocabulary, *weights)
    assert np.array_equal(valid, plain[1][0])  # the validation set does not change
    few, many = (plain[0][1]["sources"][name]["documents"] for name in ("few", "many"))
    counts = Counter(map(tuple, documents_of(train)))
    assert not set(counts) & set(map(tuple, documents_of(valid)))
    chosen = sum(count == 1 for count in counts.values())
    assert Counter(counts.values()) == {3: few, 1: chosen} and 0.35 * many < chosen < 0.65 * many
    assert sidecar["documents"] == 3 * few + chosen == len(documents_of(train))
    report = sidecar["weights"]
    assert report["many"]["weight"] == 0.5 and report["many"]["read"]["documents"] == 300
    assert report["few"]["trained"]["documents"] == 3 * few and report["few"]["read"]["documents"] == 100
    assert "训练遍数" in result.stdout
    # Copies lie apart: epochs of `few` are shuffled into each other, not document by document.
    order = [tuple(ids) for ids in documents_of(train)]
    assert sum(a == b for a, b in pairwise(order)) <= 8


def test_without_shuffling_the_corpus_keeps_its_order(tmp_path, two_sources, texts, vocabulary):
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

    options = ("--no_shuffle", "--weights", "few=2", "--valid_fraction", 0)
    _, ((train, _), (valid, _)) = process(tmp_path, two_sources, vocabulary, *options)
    tokenizer = ChatGLMTokenizer(vocabulary)
    decoded = [tokenizer.decode(ids[:-1]) for ids in documents_of(train)]
    assert decoded == texts + texts[:100] and len(valid) == 0


def test_the_seed_changes_the_order_alone(tmp_path, corpus, vocabulary):
    _, one = process(tmp_path, corpus, vocabulary)
    _, two = process(tmp_path, corpus, vocabulary, "--seed", 1)
    assert not np.array_equal(one[0][0], two[0][0]) and np.array_equal(one[1][0], two[1][0])
    assert sorted(documents_of(one[0][0])) == sorted(documents_of(two[0][0]))


@pytest.mark.parametrize("weights", ["few", "few=", "few=0", "=2", "few=x", "few=1000", "few=nan", "fwe=2"])
def test_wrong_weights_are_one_line(tmp_path, two_sources, vocabulary, weights):
    result, files = process(tmp_path, two_sources, vocabulary, "--weights", weights)
    assert result.returncode and "--weights" in result.stderr and files == []


def test_weights_of_the_sources_inside_parquet(tmp_path, vocabulary, texts):
    table = pa.table({"text": texts, "source": ["甲", "乙"] * 200})
    pq.write_table(table, tmp_path / "part-00000.parquet")
    _, ((_, sidecar), _) = process(tmp_path, tmp_path / "part-00000.parquet", vocabulary, "--weights", "甲=2")
    assert sidecar["weights"]["甲"]["trained"]["documents"] > 300 > sidecar["sources"]["乙"]["documents"]
    result, _ = process(tmp_path, tmp_path / "part-00000.parquet", vocabulary, "--weights", "丙=2")
    assert result.returncode and "丙" in result.stderr and "甲" in result.stderr


# Small pieces, runs and ranges, and a pool of processes although the corpus is small.
AS_IF_LARGE = """
import functools, sys
import data_process, sources.pieces, sources.tokenise, stage
data_process.COMPILED_FROM = data_process.PROCESSES_FROM = 0
sources.tokenise.PIECE_BYTES = 60_000
data_process.split_into_pieces = functools.partial(sources.pieces.split_into_pieces, piece_bytes=50_000)
stage.run_stage(data_process.Config, data_process.main)
"""


@pytest.fixture(scope="module")
def many_files(tmp_path_factory):
    """About 2 MB of text in 40 files: enough for a run to be interrupted at many places."""
    folder = tmp_path_factory.mktemp("many")
    rng = random.Random(5)
    for number in range(40):
        documents = [
            "".join(rng.choices("天地玄黄宇宙洪荒日月盈昃", k=rng.randrange(20, 200))) for _ in range(150)
        ]
        lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in documents)
        (folder / f"{number:02d}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def command_as_if_large(folder, data, tokenizer, *args):
    options = {
        "data": data,
        "tokenizer": tokenizer,
        "out": folder / "train.bin",
        "valid": folder / "valid.bin",
    }
    named = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return [sys.executable, "-c", AS_IF_LARGE, *named, "--no_find_bin", *map(str, args)]


def outputs(folder):
    return [(folder / name).read_bytes() for name in ("train.bin", "valid.bin")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory, many_files, vocabulary):
    """What one process makes of the files."""
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run(command_as_if_large(folder, many_files, vocabulary, "--workers", 1), cwd=ROOT, check=True)
    assert not list(folder.glob(".*"))
    return outputs(folder)


def test_the_number_of_processes_changes_nothing(tmp_path, many_files, vocabulary, reference):
    for workers in (2, 3):
        command = command_as_if_large(tmp_path, many_files, vocabulary, "--workers", workers)
        subprocess.run(command, cwd=ROOT, check=True)
        assert outputs(tmp_path) == reference


def test_small_and_large_corpora_take_different_ways_to_the_same_ids(
    tmp_path, many_files, vocabulary, reference
):
    _, ((train, _), (valid, _)) = process(tmp_path, many_files, vocabulary)
    assert [sorted(documents_of(np.frombuffer(content, "<u2"))) for content in reference] == [
        sorted(documents_of(ids)) for ids in (train, valid)
    ]


def kill_when(command, folder, pattern, count, delay) -> str:
    """Run a command; when it has made so many files of this pattern, kill it and its workers a little later."""
    before = set(folder.glob(pattern))
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )
    while process.poll() is None and len(set(folder.glob(pattern)) - before) < count:
        time.sleep(0.005)
    time.sleep(delay)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_a_killed_run_goes_on_where_it_was(tmp_path, many_files, vocabulary, reference):
    """SIGKILL at random moments: never a half-written file, and in the end the same bytes."""
    command = command_as_if_large(tmp_path, many_files, vocabulary, "--workers", 2)
    rng = random.Random(6)
    work = ".train.bin.work"
    moments = [
        (f"{work}/tokenise/.*", 1),  # the first piece is begun
        (f"{work}/tokenise/*/result.json", 3),
        (f"{work}/tokenise/*/result.json", 6),
        (".valid.bin.tmp-*", 1),  # the runs are put together
        ("*.json", 1),  # the first output appears
        ("*.bin", 1),
    ]
    for number, (pattern, count) in enumerate(moments):
        goes_on = (tmp_path / work / "key.json").exists()
        printed = kill_when(command, tmp_path, pattern, count, rng.uniform(0, 0.1))
        assert goes_on == ("继续" in printed) and (goes_on or number in (0, 4, 5))
        for path in (tmp_path / "train.bin", tmp_path / "valid.bin"):
            if path.exists():
                sidecar = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                assert sidecar["tokens"] * 2 == path.stat().st_size
    subprocess.run(command, cwd=ROOT, check=True)
    assert outputs(tmp_path) == reference and not list(tmp_path.glob(".*"))


def test_finished_pieces_are_not_done_again(tmp_path, many_files, vocabulary, reference):
    """With its first pieces in the work folder, a run reads only the files of the others."""
    stopped = AS_IF_LARGE.replace(
        "stage.run_stage",
        """
import workers
real, count = workers.finish, [0]
def finish(*job):
    count[0] += 1
    if count[0] > 3:
        sys.exit(9)
    real(*job)
workers.finish = finish
stage.run_stage""",
    )
    command = command_as_if_large(tmp_path, many_files, vocabulary, "--workers", 1)
    first = subprocess.run([part if part != AS_IF_LARGE else stopped for part in command], cwd=ROOT)
    assert first.returncode == 9
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / ".train.bin.work" / "tokenise").glob("*/*.ids")}
    assert len(done) == 3
    counted = AS_IF_LARGE.replace(
        "stage.run_stage", "import workers\nfinish = workers.finish\n"
        "workers.finish = lambda *job: (print('任务', job[1].number), finish(*job))\nstage.run_stage"
    )  # fmt: skip
    second = subprocess.run(
        [part if part != AS_IF_LARGE else counted for part in command],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=True,
    )  # fmt: skip
    assert "任务 3" in second.stdout and not any(f"任务 {number}\n" in second.stdout for number in range(3))
    assert outputs(tmp_path) == reference


def test_a_changed_corpus_starts_afresh(tmp_path, many_files, vocabulary):
    work = tmp_path / ".train.bin.work" / "tokenise" / "000000"
    work.mkdir(parents=True)
    (work / "result.json").write_text('{"runs": 0, "sources": {}, "set_aside": {}}', encoding="utf-8")
    (tmp_path / ".train.bin.work" / "key.json").write_text("{}", encoding="utf-8")
    result, ((_, sidecar), _) = process(tmp_path, many_files, vocabulary)
    assert result.returncode == 0 and "继续" not in result.stdout and sidecar["documents"] > 5000
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1.5 MB, by turns as large as it is asked to be."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if not mount or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(
    small_disk, many_files, vocabulary, reference
):
    command = command_as_if_large(small_disk, many_files, vocabulary, "--workers", 2)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert result.returncode and "磁盘已满" in result.stderr and "Traceback" not in result.stderr
    assert not list(small_disk.glob("*.bin"))
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert "继续" in result.stdout and outputs(small_disk) == reference


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
    for name in ("stage.py", "workers.py", "data_process.py"):
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


@pytest.mark.parametrize("stage", ["data_process.py", "train_tokenizer.py"])
def test_the_description_of_an_output_never_replaces_the_corpus(tmp_path, vocabulary, stage):
    corpus = tmp_path / "wiki.json"
    corpus.write_text('[{"text": "天地玄黄，宇宙洪荒。"}]', encoding="utf-8")
    for data in (corpus, tmp_path):
        more = (
            ["--tokenizer", vocabulary, "--valid", tmp_path / "v.bin"] if stage == "data_process.py" else []
        )
        failed = run(stage, "--data", data, "--out", tmp_path / "wiki.bin", *more)
        assert failed.returncode and "会被覆盖" in failed.stderr
        assert corpus.read_text(encoding="utf-8").startswith("[") and not (tmp_path / "wiki.bin").exists()
