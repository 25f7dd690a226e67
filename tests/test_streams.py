"""Compressed files, zip archives, damage, and what would fill the memory."""

import gzip
import json
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pytest
from corpus_files import (
    COMPRESSIONS,
    CONTAINERS,
    compress,
    contain,
    documents,
    file_of,
    read,
    zstd,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import json_values, streams
from sources.aside import SetAside
from sources.containers import read_rows
from sources.pieces import read_batches, split_into_pieces
from sources.pretrain_text import read_documents


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from(CONTAINERS),
    st.sampled_from(COMPRESSIONS),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([200, 1 << 30]),
)
def test_damage_never_raises(container, compression, is_zipped, damage, is_cut, piece_bytes):
    content = compress(contain(documents(40), container), compression)
    with file_of(content, is_zipped) as path:
        data = bytearray(path.read_bytes())
        for place, byte in damage:
            data[int(place * (len(data) - 1))] = byte
        path.write_bytes(data[: int(damage[0][0] * len(data))] if is_cut else data)
        texts, aside = read(path, piece_bytes)
        assert texts or aside
        for as_csv in (False, True):
            list(read_rows(path, SetAside(), as_csv))


def test_zip_members_are_files_of_their_own(tmp_path):
    path = tmp_path / "corpus" / "moss.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/one.jsonl", '{"text": "甲"}\n{"text": }\n')
        archive.writestr("__MACOSX/a/one.jsonl", "junk")
        archive.writestr("a/.DS_Store", "junk")
        archive.writestr("README.md", "说明")
        archive.writestr("two.json.gz", gzip.compress('[{"text": "乙"}]'.encode()))
        archive.writestr("inner.zip", path.read_bytes()[:0] + b"PK\x03\x04")
        archive.writestr("docx", "<?xml version='1.0'?>\n<a/>")
        archive.writestr("XXXX.txt", "丙\n丁")
        archive.writestr("YYYYYY.txt", "戊")
    content = path.read_bytes()  # as Windows and macOS write names: without the flag that tells UTF-8
    path.write_bytes(content.replace(b"XXXX", "中文".encode("gbk")).replace(b"YYYYYY", "中文".encode()))
    aside = SetAside()
    named = [(d.text, d.source) for d in read_documents(path.parent, aside)]
    assert named == [("甲", "moss"), ("乙", "moss"), ("丙", "moss"), ("丁", "moss"), ("戊", "moss")]
    assert [source for _, source in read_documents(path, SetAside())] == ["a", "two", *["中文"] * 3]
    places = [(Path(e["file"]).relative_to(path).as_posix(), e["row"]) for e in aside.examples]
    assert places == [("a/one.jsonl", 2), ("inner.zip", None), ("docx", None)]
    assert [number for number, _ in read_rows(path, SetAside())] == [1, 2, 3, 4, 5]
    pieces = split_into_pieces(path.parent, piece_bytes=1)
    assert [(piece.start, piece.end) for piece in pieces] == [(n, n + 1) for n in range(6)]
    assert [t for p in pieces for b in read_batches(p, SetAside()) for t in b.texts.to_pylist()] == [
        t for t, _ in named
    ]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_zip_methods_without_bounds_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("a.jsonl", '{"text": "甲"}')
        archive.writestr(zipfile.ZipInfo("b.jsonl"), '{"text": "乙"}')
    texts, aside = read(tmp_path / "a.zip")
    assert texts == ["乙"] and "压缩方法" in aside.examples[0]["reason"] and aside.remedies


def test_encrypted_empty_and_truncated_zips_are_explained(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", '{"text": "甲"}')
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02")
    path.write_bytes(content[:6] + b"\1" + content[7 : entry + 8] + b"\1" + content[entry + 9 :])
    assert "加了密" in read(path)[1].examples[0]["reason"] and read(path)[1].remedies
    path.write_bytes(content[:-30])
    assert "zip 文件损坏" in read(path)[1].examples[0]["reason"]
    with zipfile.ZipFile(path, "w"):
        pass
    assert "没有数据文件" in read(path)[1].examples[0]["reason"]


@pytest.mark.parametrize("container", ["lines", "array", "indented"])
def test_truncated_streams_keep_what_comes_before(container):
    content = contain(documents(30_000), container)
    for pack, lost in ((gzip.compress, 0), (zstd, streams.ZSTD_STEP)):
        packed = pack(content)[:-20_000]
        if pack is gzip.compress:
            readable = zlib.decompressobj(wbits=31).decompress(packed)
        else:
            readable = b""
            with pa.CompressedInputStream(pa.BufferReader(packed), "zstd") as stream, suppress(OSError):
                while byte := stream.read(64):
                    readable += byte
        whole = readable.count({"lines": b"}\n", "array": b"}, ", "indented": b"},\n"}[container])
        with file_of(packed) as path:
            texts, aside = read(path)
        assert whole - lost / 20 <= len(texts) <= whole + 1 and whole > 1000
        assert texts == [row["text"] for row in documents(30_000)[: len(texts)]]
        assert "压缩文件损坏" in aside.examples[-1]["reason"]
        assert aside.examples[-1]["row"] == len(texts) + 1


def test_padding_and_skippable_frames_are_no_damage():
    content = contain(documents(10), "lines")
    skippable = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    for packed in (
        gzip.compress(content) + bytes(1000),
        gzip.compress(content[:99]) + bytes(3) + gzip.compress(content[99:]),
        skippable + zstd(content[:99]) + skippable + zstd(content[99:]),
    ):
        with file_of(packed) as path:
            texts, aside = read(path)
        assert texts == [row["text"] for row in documents(10)] and not aside


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """Python's own memory, in which the readers hold all that they read."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < megabytes << 20


@pytest.mark.parametrize("is_zip", [False, True])
def test_bombs_do_not_fill_the_memory(tmp_path, monkeypatch, is_zip):
    monkeypatch.setattr(streams, "LONGEST", 4 << 20)
    monkeypatch.setattr(json_values, "LONGEST", 4 << 20)
    long = b'{"text": "' + b"0" * (60 << 20)
    short = (b'{"text": "' + b"0" * 3500 + b'"}\n') * 15_000
    for content in (long, b"[" + long, short, b"[" + short.replace(b"\n", b",")[:-1] + b"]"):
        with file_of(content if is_zip else gzip.compress(content, 1), is_zip) as path, at_most(40):
            [piece] = split_into_pieces(path)
            aside = SetAside()
            count = sum(len(batch.texts) for batch in read_batches(piece, aside))
            assert (count, len(aside)) == ((0, 1) if long in content else (15_000, 0))


def test_a_line_too_long_is_passed_over(monkeypatch):
    monkeypatch.setattr(streams, "LONGEST", 1 << 20)
    text = "字" * (1 << 19)
    lines_ = [json.dumps({"text": t}, ensure_ascii=False) for t in ("甲", text, "乙")]
    with file_of("\n".join(lines_).encode()) as path:
        texts, aside = read(path)
        assert texts == ["甲", "乙"] and aside.examples[0]["row"] == 2
        texts, aside = read(path, 1 << 19)
        assert texts == ["甲", "乙"] and len(aside) == 1
