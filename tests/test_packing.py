"""Packed fine-tuning: nothing but the speed changes, whatever the rows, the processes and the cache."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, script, torchrun
from gradients_of_processes import fine_tuning
from hf_folders import LLAMA2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import dataset_sft_tokens
from chatglm_tokenizer.chat import encode_chat
from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset_sft import SftBatches, collate, labelled_places, pack, round_for_processes, row_length
from dataset_sft_tokens import load_samples, read_samples, to_messages
from model import IGNORE, ModelArgs, Transformer
from sources.aside import SetAside
from sources.sft_csv import write_sft_csv
from training.estimate import flops_per_token
from training.log import read_log

SAMPLES = fine_tuning()[1]  # 40 made-up samples of 3 to 30 tokens


def model(max_seq_len: int = 64) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        ModelArgs(
            dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=101, max_seq_len=max_seq_len, dropout=0
        )
    )


def gradients(network: Transformer, loss: torch.Tensor) -> torch.Tensor:
    network.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def packed_loss(network: Transformer, rows: list[np.ndarray], length: int) -> torch.Tensor:
    mb = collate([[SAMPLES[i] for i in row] for row in rows], length)
    return network(mb.tokens, mb.targets, reduction="sum", documents=mb.documents, labelled=mb.labelled)


# --- rows ---


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(60, 100), st.integers(0, 2**32))
def test_rows_hold_every_sample_once_and_waste_little(lengths, room, seed) -> None:
    lengths = np.array(lengths)
    rows = pack(lengths, np.random.default_rng(seed).permutation(len(lengths)), room)
    assert sorted(np.concatenate(rows)) == list(range(len(lengths)))
    sums = [lengths[row].sum() for row in rows]
    assert max(sums) <= room
    assert sum(2 * s <= room for s in sums) <= 1  # two rows that are half empty would have become one
    assert len(rows) == len(pack(lengths, np.arange(len(lengths)), room))  # whatever the order


def test_no_sample_sees_another() -> None:
    """Loss and gradients are those of every sample in a forward pass of its own, with plain torch."""
    network = model()
    rows = pack(SAMPLES.lengths - 1, np.arange(len(SAMPLES)), 64)
    assert len(rows) < len(SAMPLES) / 2
    ours = packed_loss(network, rows, 64)
    alone = torch.zeros(())
    for ids, bears_loss in SAMPLES:
        ids = torch.from_numpy(ids.astype(np.int64))
        logits = network(ids[None, :-1])[0]
        alone = (
            alone
            + (F.cross_entropy(logits, ids[1:], reduction="none") * torch.from_numpy(bears_loss[1:])).sum()
        )
    torch.testing.assert_close(ours, alone, rtol=1e-6, atol=0)
    found, expected = gradients(network, ours), gradients(network, alone)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


def test_another_sample_in_the_row_changes_nothing() -> None:
    network, losses = model(), []
    for other in (1, 2, 3):
        mb = collate([[SAMPLES[other], SAMPLES[0]]], 64)
        mb.targets[mb.documents != 1] = IGNORE
        with torch.no_grad():
            losses.append(float(network(mb.tokens, mb.targets, reduction="sum", documents=mb.documents)))
    assert max(losses) - min(losses) < 1e-5
    mb = collate([[SAMPLES[1], SAMPLES[0]]], 64)
    mb.targets[mb.documents != 1] = IGNORE
    with torch.no_grad():
        unmasked = float(network(mb.tokens, mb.targets, reduction="sum"))
    assert abs(unmasked - losses[0]) > 0.01  # it would, were it seen


def test_padding_is_a_document_of_its_own_without_labels() -> None:
    mb = collate([[SAMPLES[0], SAMPLES[1]], [SAMPLES[2]]], 64)
    ends = [len(SAMPLES[0].ids) + len(SAMPLES[1].ids) - 2, len(SAMPLES[2].ids) - 1]
    for row, end in enumerate(ends):
        assert mb.documents[row, end:].eq(-1).all() and mb.documents[row, :end].ge(0).all()
        assert mb.targets[row, end:].eq(IGNORE).all() and mb.tokens[row, end:].eq(0).all()
    answers = np.concatenate([SAMPLES[i].ids[SAMPLES[i].bears_loss] for i in range(3)])
    assert mb.targets[mb.targets != IGNORE].tolist() == answers.tolist()


# --- head and loss where a label stands ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.97, 1.0])
def test_logits_are_made_where_a_label_stands_and_gradients_stay(share, dtype, monkeypatch) -> None:
    network, generator = model(), torch.Generator().manual_seed(1)
    tokens = torch.randint(101, (6, 64), generator=generator)
    targets = tokens.roll(-1, 1).masked_fill(torch.rand(6, 64, generator=generator) >= share, IGNORE)
    labelled, seen = labelled_places(targets.numpy()), []
    norm = network.norm.forward
    monkeypatch.setattr(network.norm, "forward", lambda x: seen.append(x.numel() // 32) or norm(x))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        some = network(tokens, targets, reduction="sum", labelled=labelled)
        everywhere = network(tokens, targets, reduction="sum")
    count = int((targets != IGNORE).sum())
    assert seen[1] == 6 * 64 and count <= seen[0] <= count + 6 * 64 // 32
    exact = dtype == torch.float32
    torch.testing.assert_close(some, everywhere, rtol=1e-6 if exact else 1e-3, atol=0)
    found, expected = gradients(network, some), gradients(network, everywhere)
    assert float((found - expected).norm()) <= (1e-6 if exact else 2e-2) * float(expected.norm())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_labelled_places_are_all_labels_and_each_place_once(bears_loss) -> None:
    targets = np.where(bears_loss, 7, IGNORE)
    places = labelled_places(targets[None])
    if places is not None:
        assert len(set(places.tolist())) == len(places)
        assert set(np.flatnonzero(targets != IGNORE)) <= set(places.tolist())
        assert 0 < len(places) < len(targets)


# --- steps ---


def test_a_step_is_the_same_for_any_number_of_processes_and_micro_batches() -> None:
    def documents(mbs) -> list[tuple]:
        return [
            (*mb.tokens[r][mb.documents[r] == d].tolist(), *mb.targets[r][mb.documents[r] == d].tolist())
            for mb in mbs
            for r in range(len(mb.tokens))
            for d in range(int(mb.documents[r].max()) + 1)
            if mb.tokens.any()  # an idle process has none
        ]

    alone = SftBatches(SAMPLES, 12, 32, 0, 1, seed=3, row=64)
    epochs = []
    for step in range(2 * alone.steps_per_epoch):
        expected = documents(alone.step(step))
        for world in (2, 3, 8):
            split = [
                SftBatches(SAMPLES, 12, 1, rank, world, seed=3, row=64).step(step) for rank in range(world)
            ]
            assert sorted(d for part in split for d in documents(part)) == sorted(expected)
        epochs.append(expected)
    half = alone.steps_per_epoch
    first, second = (sorted(d for step in part for d in step) for part in (epochs[:half], epochs[half:]))
    assert first == second and len(first) == len(SAMPLES)
    assert epochs[:half] != epochs[half:]
    again = SftBatches(SAMPLES, 12, 32, 0, 1, seed=3, row=64)  # a resumed run goes on anywhere
    assert documents(again.step(half + 1)) == epochs[half + 1]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_processes_get_equal_work(world) -> None:
    samples = fine_tuning(count=3000)[1]
    ranks = [SftBatches(samples, 300, 4, rank, world, seed=0, row=64) for rank in range(world)]
    even = []
    for step in range(ranks[0].steps_per_epoch - 1):  # the last may have too few rows
        parts = [rank.step(step) for rank in ranks]
        rows = {sum(len(mb.tokens) for mb in part) for part in parts}
        tokens = [sum(int((mb.documents >= 0).sum()) for mb in part) for part in parts]
        assert len(rows) == 1
        even.append(min(tokens) > 0.97 * max(tokens))
        assert {mb.tokens.shape[1] for part in parts for mb in part} == {64}
    assert even.count(False) <= 1  # an epoch has one row that is not full


def test_a_step_has_about_batch_samples_and_equally_many_tokens() -> None:
    samples = fine_tuning(count=3000)[1]
    batches = SftBatches(samples, 128, 32, 0, 1, seed=0, row=64)
    steps = [batches.rows(step) for step in range(batches.steps_per_epoch)]
    sizes = [sum(map(len, rows)) for rows in steps[:-1]]
    assert 0.88 * 128 < np.mean(sizes) < 1.12 * 128
    tokens = [sum((samples.lengths[row] - 1).sum() for row in rows) for rows in steps[:-1]]
    assert min(tokens) > 0.9 * max(tokens)
    assert min(tokens) > 0.97 * 64 * batches.per_step  # full rows


@given(st.floats(0.01, 1e6))
def test_rows_of_a_step_are_shared_evenly_when_there_are_many(rows) -> None:
    rounded = round_for_processes(rows)
    assert rounded >= 1 and abs(rounded - rows) <= max(0.5 if rows >= 0.5 else 1, rows / 8)
    assert rounded % 8 == 0 if rows >= 32 else rounded % 2 == 0 if rows >= 8 else True


def test_a_process_without_rows_takes_part_but_learns_nothing() -> None:
    ranks = [SftBatches(SAMPLES[:3], 8, 8, rank, 4, seed=0, row=64).step(0) for rank in range(4)]
    answers = [int((mb.targets != IGNORE).sum()) for part in ranks for mb in part]
    assert len(answers) == 4 and sum(answers) == SAMPLES[:3].labels.sum() and answers[2:] == [0, 0]


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (1, 2), (2, 8), (2, 3)])
def test_accumulation_and_processes_give_the_same_gradient(processes, micro_batch, tmp_path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [
        "tests/gradients_of_processes.py",
        str(tmp_path / "g"),
        "ddp",
        str(micro_batch),
        "0",
        "packed",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    network, samples = fine_tuning()
    total = torch.zeros(())
    chosen = np.concatenate(SftBatches(samples, 24, 99, 0, 1, seed=0, row=64).rows(0))
    for sample in (samples[i] for i in chosen):  # plain torch, a sample at a time
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        targets = torch.where(torch.from_numpy(sample.bears_loss), ids, IGNORE)[1:]
        logits = network(ids[None, :-1])[0]
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    expected = gradients(network, total / samples.labels[chosen].sum())
    got = load_file(tmp_path / "g")
    norm = got.pop("norm")
    torch.testing.assert_close(norm, expected.norm(), rtol=1e-5, atol=0)
    found = torch.cat([got[name].flatten() for name, _ in network.named_parameters()])
    assert float((found - expected * 0.5 / norm).norm() / found.norm()) < 1e-5


# --- tokens, and their cache ---

TURN = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=25).filter(
    lambda text: text.strip()
)
ROW = st.fixed_dictionaries(
    {
        "prompt": TURN,
        "answer": TURN,
        "system": st.just("") | TURN.map(str.strip),
        "history": st.lists(st.tuples(TURN, TURN).map(list), max_size=5),
    }
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12), max_len=st.integers(2, 80))
def test_truncation_keeps_bos_the_last_turns_and_an_answer(vocabulary, rows, max_len) -> None:
    tokenizer, aside = ChatGLMTokenizer(vocabulary), SetAside()
    bos, eos = (tokenizer.special_tokens[name] for name in ("<bos>", "<eos>"))
    with tempfile.TemporaryDirectory() as folder:
        write_sft_csv(Path(folder) / "x.csv", rows)
        samples = read_samples(Path(folder) / "x.csv", tokenizer, max_len, aside)
    assert len(samples) + len(aside) == len(rows)  # nothing is lost
    one_by_one = [encode_chat(to_messages(row), tokenizer, max_len) for row in rows]
    kept = [(row, encoded) for row, encoded in zip(rows, one_by_one, strict=True) if encoded]
    for (row, encoded), sample, labels in zip(kept, samples, samples.labels, strict=True):
        ids, bears_loss = sample.ids.tolist(), sample.bears_loss.tolist()
        assert (ids, bears_loss) == encoded  # together as alone
        assert len(ids) <= max_len and labels == sum(bears_loss) > 0
        assert all(bears_loss[i + 1] for i, token in enumerate(ids[:-1]) if token == bos)
        head = tokenizer.encode(row["system"]) if row["system"] else []
        turns = [*row["history"], [row["prompt"], row["answer"]]]
        wholes = [
            [t for q, a in turns[n:] for t in [*tokenizer.encode(q), bos, *tokenizer.encode(a), eos]]
            for n in range(len(turns))
        ]
        fitting = [head + whole for whole in wholes if len(head + whole) <= max_len]
        assert ids == (fitting[0] if fitting else (head + wholes[-1])[:max_len])  # the longest end that fits


@pytest.fixture
def csv(tmp_path) -> Path:
    path = tmp_path / "data" / "sft.csv"
    rows = [
        dict(prompt=f"问题{'很' * (i % 13)}长{i}？", answer=f"回答{i}。", system="", history=[["早", "好"]])
        for i in range(200)
    ]
    rows += [dict(prompt="太长" * 200, answer="放不下", system="", history=[])]
    write_sft_csv(path, rows)
    return path


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(a.ids, b.ids) and np.array_equal(a.bears_loss, b.bears_loss)
        for a, b in zip(ours, theirs, strict=True)
    )


def caches(csv: Path) -> list[Path]:
    return sorted(csv.parent.glob(".sft.csv.tokens-*"))


def test_tokens_are_made_once_and_mapped_after_that(csv, vocabulary, monkeypatch) -> None:
    tokenizer, first, second = ChatGLMTokenizer(vocabulary), SetAside(), SetAside()
    samples = load_samples(csv, tokenizer, 32, first)
    assert same(samples, read_samples(csv, tokenizer, 32, SetAside())) and len(first) == 1
    monkeypatch.setattr(dataset_sft_tokens, "tokenise", lambda *_: pytest.fail("tokenised again"))
    again = load_samples(csv, tokenizer, 32, second)
    assert same(again, samples) and again.cut == samples.cut
    assert second.report() == first.report()  # what was set aside is still said
    assert isinstance(again[0].ids.base, np.memmap)


def test_what_tokens_depend_on_makes_new_ones_and_stale_ones_go(
    csv, vocabulary, tmp_path, monkeypatch
) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    load_samples(csv, tokenizer, 32, SetAside())
    load_samples(csv, tokenizer, 24, SetAside())
    assert len(caches(csv)) == 2  # both can be needed again
    (tmp_path / "hf").mkdir()
    shutil.copy(vocabulary, tmp_path / "hf" / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config))
    load_samples(csv, load_tokenizer(tmp_path / "hf"), 24, SetAside())
    assert len(caches(csv)) == 3
    # What ends an answer, and what the template's names stand for, is not in the vocabulary's own file.
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    load_samples(csv, load_tokenizer(tmp_path / "hf"), 24, SetAside())
    assert len(caches(csv)) == 4
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<unk>"}))
    load_samples(csv, load_tokenizer(tmp_path / "hf"), 24, SetAside())
    assert len(caches(csv)) == 5
    monkeypatch.setattr(dataset_sft_tokens, "CODE", [Path(__file__)])
    load_samples(csv, tokenizer, 24, SetAside())
    assert len(caches(csv)) == 1
    with open(csv, "a", encoding="utf-8") as file:
        file.write('新的问题,新的回答,,"[]"\n')
    assert len(load_samples(csv, tokenizer, 24, SetAside())) == 201
    assert len(caches(csv)) == 1


@pytest.mark.parametrize("name", ["ids", "bears_loss", "lengths", "labels", "digests", "about.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_made_again(csv, vocabulary, name, damage) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    expected = read_samples(csv, tokenizer, 32, SetAside())
    load_samples(csv, tokenizer, 32, SetAside())
    file = caches(csv)[0] / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x11
        file.write_bytes(content)
    assert same(load_samples(csv, tokenizer, 32, SetAside()), expected)


def test_a_folder_that_cannot_be_written_is_no_obstacle(csv, vocabulary, monkeypatch, capsys) -> None:
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dataset_sft_tokens, "write_cache", refuse)
    assert len(load_samples(csv, ChatGLMTokenizer(vocabulary), 32, SetAside())) == 200
    assert "Permission denied" in capsys.readouterr().out and not caches(csv)


# --- sft.py ---


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, vocabulary) -> list[object]:
    """Options of a small fine-tuning run."""
    folder = tmp_path_factory.mktemp("packing")
    torch.manual_seed(3)
    tokenizer = ChatGLMTokenizer(vocabulary)
    args = ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=tokenizer.vocab_size, max_seq_len=64)
    torch.save(Transformer(args).state_dict(), folder / "small.pth")
    rows = [
        dict(
            prompt=f"{i} 加 {i % 7} 等于几？",
            answer=f"等于 {i + i % 7}。" * (1 + i % 3),
            system="",
            history=[],
        )
        for i in range(300)
    ]
    write_sft_csv(folder / "sft.csv", rows)
    options = ["--data", folder / "sft.csv", "--init", folder / "small.pth", "--tokenizer", vocabulary]
    options += ["--n_heads", 2, "--lr", 1e-2, "--valid_fraction", 0.1, "--log_every", 1]
    return options + ["--device", "cpu", "--precision", "fp32", "--timeout", 1, "--warmup", 2, "--epochs", 3]


def curve(out: Path, key: str = "loss") -> dict[int, float]:
    return {r["step"]: r[key] for r in read_log(out / "log.jsonl") if key in r}


def test_fine_tuning_packed_is_the_same_in_two_processes_and_learns(pretrained, tmp_path) -> None:
    one, two, apart = (tmp_path / name for name in ("one", "two", "apart"))
    script("sft.py", *pretrained, "--out", one)
    torchrun(2, "sft.py", *pretrained, "--out", two, "--micro_batch", 1)
    script("sft.py", *pretrained, "--out", apart, "--no_pack")
    for key in ("loss", "val_loss"):
        ours, theirs = curve(two, key), curve(one, key)
        assert sorted(ours) == sorted(theirs)
        assert max(abs(ours[step] / theirs[step] - 1) for step in theirs) < 1e-3
    assert [r["data"] for r in read_log(one / "log.jsonl") if "data" in r] == [
        r["data"] for r in read_log(two / "log.jsonl") if "data" in r
    ]
    first, last = curve(one)[1], curve(one, "val_loss")
    assert last[max(last)] < first - 1
    assert (
        abs(last[max(last)] - max(curve(apart, "val_loss").items())[1]) < 0.5
    )  # packing is no other training
    assert len(list(pretrained[1].parent.glob(".sft.csv.tokens-*"))) == 1


def test_a_packed_run_goes_on_where_it_stopped(pretrained, tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = [*pretrained, "--save_every", 10, "--keep_last", 9]  # behind the first epoch's end
    script("sft.py", *options, "--out", whole)
    assert max(curve(whole)) > 10
    shutil.copytree(whole / "step_00000010", parts / "step_00000010")
    shutil.copy(whole / "log.jsonl", parts)
    script("sft.py", *options, "--out", parts, "--resume")
    assert curve(parts) == curve(whole)
    message = script("sft.py", *options, "--out", parts, "--resume", "--no_pack", ok=False).stderr
    assert "row=64" in message  # other batches


def test_the_estimate_knows_packed_rows(pretrained, tmp_path) -> None:
    printed = script("sft.py", *pretrained, "--out", tmp_path / "x", "--estimate").stdout
    assert "× 64 的激活" in printed  # rows as long as they are
    found = (re.search(pattern, printed)[1] for pattern in (r"每 token (\S+) GFLOP", r"× (\S+) token ="))
    per_token, tokens = (float(number.replace(",", "")) for number in found)
    assert tokens > 0.5 * 64
    args = ModelArgs(dim=32, n_layers=2, n_heads=2, vocab_size=2500, max_seq_len=64)
    whole = flops_per_token(args, 64) / 1e9
    assert 0.3 * whole < per_token < 0.9 * whole  # a question's tokens need no logits
    assert not (tmp_path / "x").exists()
    assert row_length(SAMPLES, 512) == 64


def test_the_bench_compares_the_ways(corpus, vocabulary, tmp_path) -> None:
    options = ["--data", corpus / "sft", "--tokenizer", vocabulary, "--models", "demo", "--max_seq_len", 128]
    options += ["--batch", 8, "--original_batch", 2, "--seconds", 0.01, "--rounds", 1]
    printed = script(
        "bench/sft_packing.py", *options, "--ways", "original", "packed", "--out", tmp_path / "x.json"
    ).stdout
    original, packed = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert original["wasted"] > 0.5 and packed["wasted"] < 0.1
    assert min(way["answers_per_second"] for way in (original, packed)) > 0
    assert "original" in printed and "packed" in printed
