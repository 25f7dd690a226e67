"""Windows over token files, their random order, and the masked batches of fine-tuning."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset import PretrainBatches, TokenWindows
from dataset_sft import SftBatches, collate
from dataset_sft_tokens import read_samples, split_validation
from model import IGNORE
from sources.aside import SetAside
from stage import UserError
from training.mixture import permute


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**40))
def test_permutation_is_a_bijection(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key)) == list(range(n))


def test_permutation_looks_random() -> None:
    n = 100_000
    p = permute(np.arange(n), n, key=1)
    assert abs(np.corrcoef(np.arange(n), p)[0, 1]) < 0.02
    assert abs(np.corrcoef(p[:-1], p[1:])[0, 1]) < 0.02
    assert (permute(np.arange(n), n, key=2) == p).mean() < 0.001
    # The gaps between neighbours are spread as those of a random order are.
    gaps = np.abs(np.diff(p)) / n
    np.testing.assert_allclose(np.quantile(gaps, [0.1, 0.5, 0.9]), [0.0513, 0.2929, 0.6838], atol=0.01)


@pytest.fixture
def two_files(tmp_path, vocabulary) -> tuple[list, ChatGLMTokenizer]:
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    np.arange(3, 3 + 105, dtype="<u2").tofile(paths[0])
    np.arange(1000, 1000 + 58, dtype="<u4").tofile(paths[1])
    paths[1].with_suffix(".json").write_text(json.dumps({"dtype": "uint32"}), encoding="utf-8")
    return paths, ChatGLMTokenizer(vocabulary)


def test_windows_cover_every_file_and_never_cross_into_another(two_files) -> None:
    windows = TokenWindows(two_files[0], 10, two_files[1])
    assert len(windows) == 10 + 5
    x, y, *_ = windows.read(np.arange(15))
    assert (y[:, :-1] == x[:, 1:]).all()
    assert (y == x + 1).all()  # consecutive numbers: no window spans two files
    assert sorted(y.flatten().tolist()) == [*range(4, 104), *range(1001, 1051)]


def test_processes_share_the_global_batch_whatever_their_number(two_files) -> None:
    windows = TokenWindows(two_files[0], 10, two_files[1])

    def batch(step: int, world: int, micro: int) -> list[list[list[int]]]:
        ranks = [PretrainBatches(windows, 4, micro, rank, world, seed=3).step(step) for rank in range(world)]
        return [torch.cat([mb.tokens for mb in parts]).tolist() for parts in ranks]

    for step in range(12):
        alone = batch(step, 1, 4)[0]
        split = batch(step, 2, 1)
        assert sorted(alone) == sorted(split[0] + split[1])
        assert len(split[0]) == len(split[1]) == 2
    whole = PretrainBatches(windows, 15, 15, 0, 1, seed=3)  # a step an epoch
    firsts = [whole.step(epoch)[0].tokens[:, 0].tolist() for epoch in range(4)]
    assert all(sorted(epoch) == [*range(3, 103, 10), *range(1000, 1050, 10)] for epoch in firsts)
    assert len({tuple(epoch) for epoch in firsts}) == 4
    seen = [row[0] for step in range(15) for row in batch(step, 1, 2)[0]]  # 60 windows: the same 4 epochs
    assert sorted(seen) == sorted(itertools.chain(*firsts))


def test_a_process_without_samples_takes_part_but_learns_nothing(csv, vocabulary) -> None:
    samples = read_samples(csv, ChatGLMTokenizer(vocabulary), 64, SetAside())[:3]
    parts = [SftBatches(samples, 8, 8, rank, 4, seed=0).step(0) for rank in range(4)]
    assert all(len(p) == 1 for p in parts)
    answers = [int((mb.targets != IGNORE).sum()) for p in parts for mb in p]
    assert answers[3] == 0
    assert sum(answers) == sum(int(s.bears_loss.sum()) for s in samples)


def test_bad_token_files_are_clear_errors(tmp_path, vocabulary) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    path = tmp_path / "x.bin"
    for content, message in ((b"", "0 字节"), (b"abc", "3 字节"), (b"ab" * 5, "不足一个")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            TokenWindows([path], 10, tokenizer)
    np.full(100, 60_000, dtype="<u2").tofile(path)
    good = tmp_path / "good.bin"
    np.full(100, 9, dtype="<u2").tofile(good)
    with pytest.raises(UserError, match=r"^\S+x\.bin 里有 id 60000，超出词表"):
        TokenWindows([good, path], 10, tokenizer).read(np.array([0, 9]))
    path.with_suffix(".json").write_text(json.dumps({"tokenizer": {"sha256": "0" * 64, "path": "other"}}))
    with pytest.raises(UserError, match="other"):
        TokenWindows([path], 10, tokenizer)
    for content in ("[]", "{", '{"dtype": "float32"}', '{"tokenizer": null}'):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(UserError, match=r"x\.json"):
            TokenWindows([path], 10, tokenizer)
    with pytest.raises(UserError, match=r"data_process\.py"):
        TokenWindows([tmp_path / "none.bin"], 10, tokenizer)


@pytest.fixture
def csv(tmp_path) -> "Path":  # noqa: F821
    path = tmp_path / "sft.csv"
    rows = ["prompt,answer"] + [
        f'问题{"很" * (i % 13)}长{i}？,"回答{i}，\n第二行{"好" * (i % 7)}。"' for i in range(100)
    ]
    rows += [",没有问题", "没有答案,", f"{'太长' * 200},答案放不下", "NA,nan"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_samples_and_set_aside_rows_add_up(csv, vocabulary) -> None:
    aside = SetAside()
    tokenizer = ChatGLMTokenizer(vocabulary)
    samples = read_samples(csv, tokenizer, 64, aside)
    assert (len(samples), len(aside)) == (101, 3)
    last = samples[-1]
    assert tokenizer.decode(last.ids[last.bears_loss].tolist()) == "nan"
    training, validation = split_validation(samples, 0.2)
    assert len(training) + len(validation) == 101
    assert 5 <= len(validation) <= 40
    kept = {s.ids.tobytes() for s in split_validation(samples[:50], 0.2)[1]}
    assert kept <= {s.ids.tobytes() for s in validation}  # more data moves no sample


def test_only_answers_bear_loss(csv, vocabulary) -> None:
    tokenizer = ChatGLMTokenizer(vocabulary)
    x, y, *_ = collate([[sample] for sample in read_samples(csv, tokenizer, 64, SetAside())[:7]])
    for row in range(7):
        ids = x[row].tolist()
        answer = y[row][y[row] != IGNORE].tolist()
        start = ids.index(1)  # predicted from <bos> on
        assert answer[-1] == 2
        assert y[row, :start].eq(IGNORE).all()
        assert y[row, start : start + len(answer)].tolist() == answer
        assert tokenizer.decode(answer) == f"回答{row}，\n第二行{'好' * (row % 7)}。"


def test_every_sample_once_an_epoch_whatever_the_processes(csv, vocabulary) -> None:
    samples = read_samples(csv, ChatGLMTokenizer(vocabulary), 64, SetAside())
    for world, micro in ((1, 8), (2, 3)):
        ranks = [SftBatches(samples, 8, micro, rank, world, seed=0) for rank in range(world)]
        seen = []
        for step in range(ranks[0].steps_per_epoch):
            for rank in ranks:
                for mb in rank.step(step):
                    assert len(mb.tokens) <= micro
                    seen += [tuple(t[t != IGNORE].tolist()) for t in mb.targets]
        assert sorted(seen) == sorted(tuple(s.ids[s.bears_loss].tolist()) for s in samples)
