"""Pieces and batches: whatever the container, the compression and the size of the pieces, the same texts."""

import json
import os
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from corpus_files import (
    CHARACTERS,
    COMPRESSIONS,
    CONTAINERS,
    PIECE_BYTES,
    TEXT,
    compress,
    contain,
    documents,
    file_of,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean import clear
from sources import batches, streams
from sources.aside import FileAside, SetAside
from sources.json_rows import BAD_TEXT, lines
from sources.pieces import grouped, read_batches, read_together, split_into_pieces
from sources.pretrain_text import read_documents

LINE = st.text(CHARACTERS.filter(lambda char: char not in "\r\n"), max_size=25)
META = st.lists(TEXT, max_size=2)
PLAIN = st.fixed_dictionaries({"text": TEXT}, optional={"id": st.integers(0, 9), "meta": META})
TITLED = st.fixed_dictionaries({"title": TEXT | st.none(), "content": TEXT})
ROWS = st.lists(PLAIN, min_size=1, max_size=12) | st.lists(TITLED, min_size=1, max_size=12)


def as_text(row: dict) -> str:
    title = (row.get("title") or "").strip()
    body = (row["text"] if "text" in row else row["content"]).strip()
    return f"{title}\n{body}" if body and title and body[: len(title)] != title else body


@settings(max_examples=300, deadline=None)
@given(ROWS, st.sampled_from(CONTAINERS), st.sampled_from(COMPRESSIONS), st.booleans(), PIECE_BYTES)
def test_rows_come_back_from_any_container(rows, container, compression, is_zipped, piece_bytes):
    expected = [as_text(row) for row in rows]
    with file_of(compress(contain(rows, container), compression), is_zipped) as path:
        texts, aside = read(path, piece_bytes)
        assert texts == [text for text in expected if text]
        assert len(aside) == expected.count("")
        assert [document.text for document in read_documents(path, SetAside())] == texts


@settings(max_examples=200, deadline=None)
@given(
    st.lists(LINE, min_size=1, max_size=15),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
    PIECE_BYTES,
)
def test_plain_text_in_pieces(parts, newline, has_mark, ends, piece_bytes):
    documents = ["第一篇", *(f"篇{part}" if len(part) % 4 else " " for part in parts)]
    content = newline.join(documents) + newline * ends
    with file_of(content.encode("utf-8-sig" if has_mark else "utf-8")) as path:
        texts, aside = read(path, piece_bytes)
    assert texts == [text.strip() for text in documents if text.strip()] and not aside


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.binary(max_size=40) | st.just(b"\xef\xbb\xbf."), max_size=12),
    st.integers(1, 30),
    st.integers(1, 20),
)
def test_every_line_is_in_one_piece(parts, step, block):
    content = b"\n".join(parts)
    expected, offset = [], 0
    for line in content.split(b"\n"):
        expected.append((offset, line))
        offset += len(line) + 1
    if not expected[-1][1]:
        expected.pop()
    found = []
    with file_of(content) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "LINE_BLOCK", block)
        for start, end in pairwise([*range(0, len(content), step), None]):
            with open(path, "rb") as handle:
                found += list(lines(handle, FileAside(SetAside(), path), start, end))
    mark = b"\xef\xbb\xbf"
    assert [line for _, line in found] == [line if at else line.removeprefix(mark) for at, line in expected]
    numbers = [number if at < step else at for number, (at, _) in enumerate(expected, 1)]
    assert [where for where, _ in found] == numbers


BAD_LINES = [
    (b'{"text": "\xff"}', BAD_TEXT),
    (b'{"text": "\\ud800"}', BAD_TEXT),
    (b'{"text": "a"b"}', "不是有效的 JSON"),
    (b'{"text": "a', "不是有效的 JSON"),
    (b"[1]", "不是 JSON 对象"),
    (b'"a"', "不是 JSON 对象"),
    (b'{"text": null}', "字段 text 为空"),
    (b'{"text": " \\n"}', "字段 text 为空"),
    (b'{"text": 7}', "字段 text 不是文字"),
    (b'{"other": "a"}', "没有已知的正文字段（现有字段：other）"),
    (b"{" + b'"text": [' * 2000 + b"]" * 2000 + b"}", "不是有效的 JSON"),
]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from(BAD_LINES)), max_size=8),
    st.integers(300, 20_000),
)
def test_bad_lines_are_set_aside_with_their_place(bad, piece_bytes):
    good = [row["text"] for row in documents(60)]
    everything: list = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in good]
    for place, line_and_reason in bad:
        everything.insert(place, line_and_reason)
    content = b"\n".join(line if isinstance(line, bytes) else line[0] for line in everything)
    with file_of(content) as path:
        texts, aside = read(path, piece_bytes)
    assert texts == good
    reasons = [item[1] for item in everything if not isinstance(item, bytes)]
    assert aside.counts == Counter((str(path), reason) for reason in reasons)
    by_line = content.split(b"\n")
    for example in aside.examples:
        offset = example.get("offset")
        assert (offset is None) != (example["row"] is None)
        line = by_line[example["row"] - 1] if offset is None else content[offset:].split(b"\n")[0]
        assert (line, example["reason"]) in BAD_LINES


def test_what_other_readers_refuse_is_accepted():
    odd = [
        '{"text": "t\tab"}',
        '{"text": "nul\0", "x": NaN}',
        '{"text": "甲", "x": -Infinity}',
        '{"text": "大", "x": 1e999}',
    ]
    with file_of("\n".join(odd * 10).encode()) as path:
        texts, aside = read(path, 100)
    assert texts == ["t\tab", "nul\0", "甲", "大"] * 10 and not aside


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=40), st.integers(1, 300), st.sampled_from(CONTAINERS)
)
def test_batches_are_bounded(lengths, limit, container):
    rows = [{"text": "字" * length or " "} for length in lengths]
    with pytest.MonkeyPatch.context() as patch, file_of(contain(rows, container)) as path:
        patch.setattr(batches, "BATCH_BYTES", limit)
        patch.setattr(batches, "BATCH_ROWS", 5)
        [piece] = split_into_pieces(path)
        found = list(read_batches(piece, SetAside()))
    for batch in found:
        data = sum(len(text.encode()) for text in batch.texts.to_pylist())
        assert len(batch.texts) == 1 or (data <= limit and len(batch.texts) <= 5)
    assert [text for batch in found for text in batch.texts.to_pylist()] == ["字" * n for n in lengths if n]


def test_small_files_are_worked_on_together(tmp_path):
    for number in range(300):
        (tmp_path / f"{number:03d}.txt").write_text(f"第{number}篇\n又一篇\n", encoding="utf-8")
    (tmp_path / "zz.txt").write_text("长" * 100_000, encoding="utf-8")
    pieces = split_into_pieces(tmp_path)
    small, large = grouped(pieces, 250_000)
    [batch], aside = list(read_together(small, SetAside())), SetAside()
    one_by_one = [text for piece in small for b in read_batches(piece, aside) for text in b.texts.to_pylist()]
    assert [*small, *large] == pieces and len(large) == 1
    assert batch.texts.to_pylist() == one_by_one and len(one_by_one) == 600
    assert batch.sources.to_pylist()[:3] == ["000", "000", "001"]
    for number in range(300, 2000):
        (tmp_path / f"{number:03d}.txt").write_text("一篇\n" * 30, encoding="utf-8")
    assert 100 < len(clear.extract_jobs(clear.Config(data=tmp_path))) <= 512


def test_merged_reports_are_as_one(tmp_path):
    rng = random.Random(1)
    whole, merged = SetAside(max_examples=3), SetAside(max_examples=3)
    for _ in range(10):
        part = SetAside(max_examples=3)
        for _ in range(rng.randrange(8)):
            entry = (tmp_path / rng.choice("ab"), rng.randrange(99), rng.choice("xyz"), "例", "办法")
            part.add(*entry)
            whole.add(*entry)
        merged.merge(json.loads(json.dumps(part.report())))
    assert merged.report() == whole.report() and len(merged) == len(whole) > 20


def test_positions_are_shown(capsys):
    aside = SetAside()
    aside.add(Path("甲.jsonl"), None, "不是有效的 JSON", "x", offset=123456)
    aside.add(Path("乙.jsonl"), 1234, "不是有效的 JSON", "x")
    aside.add(Path("丙.gz"), None, "损坏")
    aside.show()
    shown = capsys.readouterr().out
    assert "字节 123,456" in shown and "第 1,234 行" in shown


def test_kinds_of_rows_are_bounded():
    aside = SetAside()
    for number in range(20_000):
        aside.add(Path("a"), number, f"没有已知的正文字段（现有字段：{number}）", {})
    assert len(aside) == 20_000 and len(aside.counts) < 6000


def test_nothing_deep_breaks_the_report():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    aside = SetAside()
    aside.add(Path("a"), 1, "x", deep)
    assert len(aside) == 1


@pytest.mark.skipif(os.name != "posix", reason="names of files are text there")
def test_names_of_files_need_not_be_unicode(tmp_path):
    """Archives from Chinese Windows, unpacked on Linux, leave names in GBK."""
    folder = os.fsencode(tmp_path) + "/语料".encode("gbk")
    os.mkdir(folder)
    for name, content in ((b"/a.jsonl", '{"text": "甲"}\n{}\n'), (b"/b.txt", "乙")):
        with open(folder + name, "w", encoding="utf-8") as file:
            file.write(content)
    aside = SetAside()
    found = list(read_documents(tmp_path, aside))
    assert [text for text, _ in found] == ["甲", "乙"] and len(aside) == 1
    json.dumps([*found, aside.report()], ensure_ascii=False).encode()
