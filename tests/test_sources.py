"""Readers of public data sets: whatever a file holds, rows come back or are set aside with a reason."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.aside import SetAside
from sources.containers import read_rows
from sources.detect import HEAD
from sources.files import list_files, source_name, stem
from sources.pretrain_text import read_documents
from sources.report import table
from sources.text_formats import Unusable, row_text
from stage import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, VALUE, min_size=1, max_size=4), min_size=1, max_size=8)


def rows_of(content: bytes, as_csv: bool = False) -> tuple[list, SetAside]:
    """Rows and what was set aside when a file (of a meaningless name) has this content."""
    aside = SetAside()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.xyz"
        path.write_bytes(content)
        return list(read_rows(path, aside, as_csv)), aside


def reasons(aside: SetAside) -> list[str]:
    return [example["reason"] for example in aside.examples]


@settings(max_examples=60, deadline=None)
@given(
    ROWS, st.booleans(), st.booleans(), st.sampled_from([None, 1, 4]), st.sampled_from(["", "\n", " \r\n"])
)
def test_json_array_in_any_layout(rows, is_gzip, ascii_only, indent, space):
    text = space + json.dumps(rows, ensure_ascii=ascii_only, indent=indent) + space
    content = text.encode("utf-8-sig" if indent else "utf-8")
    read, aside = rows_of(gzip.compress(content) if is_gzip else content)
    assert [row for _, row in read] == rows and not aside
    assert [number for number, _ in read] == list(range(1, len(rows) + 1))


@settings(max_examples=60, deadline=None)
@given(ROWS, st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_json_lines_in_any_layout(rows, is_gzip, ascii_only, newline):
    content = newline.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode()
    read, aside = rows_of(gzip.compress(content) if is_gzip else content)
    assert [row for _, row in read] == rows and not aside


@settings(max_examples=20, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=10), st.booleans())
def test_parquet(texts, is_gzip):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    content = gzip.compress(buffer.getvalue()) if is_gzip else buffer.getvalue()
    read, aside = rows_of(content)
    assert [row["text"] for _, row in read] == texts and not aside


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(
        [b"", b"[", b"{", b'{"text":', b"PAR1", b"\x1f\x8b\x08\x00", b"PK\x03\x04", b"\xff\xfe", b"[1"]
    ),
    st.binary(max_size=300) | st.text(alphabet='[]{},":\\u01aé中\n ', max_size=120).map(str.encode),
)
def test_garbage_never_raises(head, tail):
    for as_csv in (False, True):
        rows, aside = rows_of(head + tail, as_csv)
        assert rows or aside


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(['{"text": "好"}', "[1]", '"x"', "7", "{bad", "{", '{"text": "\\ud800"}', "null"]),
        min_size=1,
    )
)
def test_json_lines_counts_add_up(lines):
    lines = ['{"text": "首行"}'] * (len(lines) + 1) + lines
    rows, aside = rows_of("\n".join(lines).encode())
    assert len(rows) + len(aside) == len(lines)
    assert [number for number, _ in rows] == [
        n for n, line in enumerate(lines, 1) if line.startswith('{"text": "') and "ud" not in line
    ]


def test_invalid_line_is_named_and_skipped():
    rows, aside = rows_of(b'{"text": "a"}\n{"text": oops}\n{"text": "\xff"}\n["x"]\n{"text": "b"}\n')
    assert [row["text"] for _, row in rows] == ["a", "b"]
    assert [(e["row"], e["reason"]) for e in aside.examples] == [
        (2, "不是有效的 JSON"),
        (3, "含非 UTF-8 字节或残缺的 Unicode 字符"),
        (4, "不是 JSON 对象"),
    ]


@pytest.mark.parametrize("end", ["", '{"a": 3', "oops]", '{"a": 3}', '{"a": "unclosed'])
def test_broken_array_keeps_what_comes_before(end):
    rows, aside = rows_of(('[{"a": 1}, {"a": 2}, ' + end).encode())
    assert [row["a"] for _, row in rows][:2] == [1, 2]
    assert len(aside) == 1 and "读不到" in reasons(aside)[0] and aside.examples[0]["row"] in (3, 4)


def test_content_after_an_array_is_reported():
    rows, aside = rows_of(b'[{"a": 1}\n] [{"a": 2}]')
    assert len(rows) == 1 and "还有内容" in reasons(aside)[0]


def test_array_elements_across_buffer_ends():
    rows = [{"text": "字" * (HEAD // 7), "n": n} for n in range(40)]
    read, aside = rows_of(json.dumps(rows, ensure_ascii=False).encode())
    assert [row for _, row in read] == rows and not aside


def test_single_object_pretty_printed_or_not():
    for indent in (None, 2):
        rows, aside = rows_of(json.dumps({"text": "好", "more": {"a": [1]}}, indent=indent).encode())
        assert rows == [(1, {"text": "好", "more": {"a": [1]}})] and not aside


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "空文件"),
        (b"\xef\xbb\xbf \r\n", "空文件"),
        ("床前明月光\n疑是地上霜\n".encode("gbk"), "像是 GBK"),
        (json.dumps([{"text": "春眠不觉晓"}] * 3, ensure_ascii=False).encode("gbk"), "像是 GBK"),
        ("\n".join(['{"text": "处处闻啼鸟"}'] * 2000).encode("gbk"), "像是 GBK"),
        ("夜来风雨声".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04rest", "zip"),
        (bytes(range(256)) * 20, "二进制"),
    ],
)
def test_unreadable_files_take_one_clear_entry(content, reason):
    rows, aside = rows_of(content)
    assert rows == [] and len(aside) == 1 and reason in reasons(aside)[0]
    assert aside.remedies


def test_archives_of_other_kinds_are_explained():
    buffer, arrow_stream = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    table = pa.table({"text": ["春眠不觉晓"]})
    with pa.ipc.new_stream(arrow_stream, table.schema) as writer:  # what Dataset.save_to_disk writes
        writer.write_table(table)
    for content, name in [
        (buffer.getvalue(), "tar"),
        (gzip.compress(buffer.getvalue()), "tar"),
        (bz2.compress(b"{}"), "bzip2"),
        (lzma.compress(b"{}"), "xz"),
        (b"<?xml version='1.0'?><a/>", "XML"),
        (arrow_stream.getvalue(), "Arrow"),
        (gzip.compress("春眠不觉晓".encode("utf-16")), "UTF-16"),
    ]:
        rows, aside = rows_of(content)
        assert rows == [] and len(aside) == 1 and name in reasons(aside)[0] and aside.remedies


def test_truncated_gzip_keeps_what_comes_before():
    import random

    random.seed(0)
    lines = [json.dumps({"text": str(random.random())}) for _ in range(5000)]
    rows, aside = rows_of(gzip.compress("\n".join(lines).encode())[:-20_000])
    assert len(rows) > 1000 and len(aside) == 1 and "压缩文件" in reasons(aside)[0]


def test_strange_but_valid_json():
    deep = '{"text": ' + "[" * 200_000 + "]" * 200_000 + "}"
    many = [
        '{"text": "a", "text": "b"}',
        '{"text": "n", "x": NaN, "y": -Infinity}',
        '{"text": "t\tab\x00"}',
        deep,
    ]
    many.append('{"text": "h", "x": ' + "9" * 10_000 + "}")
    rows, aside = rows_of("\n".join(many).encode())
    assert [row["text"] for _, row in rows] == ["b", "n", "t\tab\x00"]
    assert reasons(aside) == ["JSON 嵌套过深", "不是有效的 JSON"]
    rows, aside = rows_of(("[" + ",".join(many) + "]").encode())
    assert len(rows) == 3 and reasons(aside) == ["JSON 嵌套过深", "不是有效的 JSON"]


def test_a_document_of_50_mb_takes_linear_time():
    text = "一二三四五六七八九十" * 1_700_000
    for content in (
        json.dumps({"text": text}, ensure_ascii=False),
        json.dumps([{"text": text}], ensure_ascii=False),
    ):
        start = time.perf_counter()
        rows, aside = rows_of(content.encode())
        assert rows[0][1]["text"] == text and not aside
        assert time.perf_counter() - start < 10


def test_plain_text_is_one_document_per_line():
    rows, aside = rows_of("﻿第一篇\r\n\r\n[1] 参考文献\n{}\n第四".encode())
    assert rows == [(1, "第一篇"), (3, "[1] 参考文献"), (4, "{}"), (5, "第四")] and not aside
    rows, _ = rows_of("[1] 参考文献\n第二".encode())
    assert rows == [(1, "[1] 参考文献"), (2, "第二")]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"completion": " 正文 ", "source": "wikipedia.zh2307"}, "正文"),
        ({"title": "甲", "summary": "乙", "sections": [{"title": "丙", "content": "丁"}]}, "甲：乙\n丙：丁"),
        (
            {
                "title": "甲",
                "summary": None,
                "sections": [{"title": "", "content": "丁"}, 3, {"title": "空"}],
            },
            "甲：\n丁",
        ),
        ({"title": "甲", "summary": "乙", "sections": None}, "甲：乙"),
        ({"title": "甲", "summary": "乙", "sections": "错"}, "甲：乙"),
        ({"title": "甲", "content": "乙", "id": 1}, "甲\n乙"),
        ({"title": "甲", "text": "甲是乙"}, "甲是乙"),
        ({"title": None, "text": "乙"}, "乙"),
        ({"text": "甲", "url": "x"}, "甲"),
        ({"response": "甲"}, "甲"),
        ({"content": "甲", "dataType": "新闻"}, "甲"),
    ],
)
def test_pretraining_formats(row, text):
    assert row_text(row) == text


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "为空"),
        ({"text": ["甲"]}, "不是文字"),
        ({"text": " "}, "为空"),
        ({"title": "甲", "sections": []}, "只有标题"),
        ({"title": "甲", "sections": None, "tags": []}, "只有标题"),
        ({"instruction": "甲", "output": "乙"}, "instruction、output"),
        ({}, "没有已知的正文字段"),
    ],
)
def test_rows_without_text(row, reason):
    with pytest.raises(Unusable, match=reason):
        row_text(row)


def test_text_column():
    assert row_text({"text": "甲", "body": "乙"}, "body") == "乙"
    with pytest.raises(Unusable, match="没有字段 body"):
        row_text({"text": "甲"}, "body")


def test_read_documents_names_the_sources(tmp_path):
    (tmp_path / "C4_zh").mkdir()
    (tmp_path / "C4_zh" / "part-1.jsonl").write_text('{"text": "甲"}\n{"txt": "乙"}\n', encoding="utf-8")
    (tmp_path / "wiki.v2.json").write_text('[{"completion": "丙"}]', encoding="utf-8")
    (tmp_path / "README.md").write_text("说明", encoding="utf-8")
    (tmp_path / ".hidden").write_text("隐藏", encoding="utf-8")
    (tmp_path / "tokens.bin").write_bytes(b"\0\0")
    (tmp_path / "tokens.json").write_text('{"dtype": "uint16", "tokens": 1}', encoding="utf-8")
    aside = SetAside()
    documents = list(read_documents(tmp_path, aside))
    assert documents == [("甲", "C4_zh"), ("丙", "wiki.v2")]
    assert len(aside) == 1 and aside.examples[0]["row"] == 2 and "txt" in aside.examples[0]["reason"]


@pytest.mark.parametrize(
    "first", ["{{消歧义}}本条目介绍一座城", "[[中国]]是一个国家", "{1，2}是集合", "[1] 书目"]
)
def test_brackets_of_plain_text_are_no_json(first):
    """One such line at the beginning must not cost the whole file."""
    rows, aside = rows_of(f"{first}\n第二行\n第三行\n".encode())
    assert [row for _, row in rows] == [first, "第二行", "第三行"] and not aside


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_cells_of_csv_files_are_texts(tmp_path, name):
    content = 'label,text\n1,"一段，有""引号""\n和换行"\n2,\n3,第二段\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    aside = SetAside()
    documents = list(read_documents(tmp_path, aside))
    assert [d.text for d in documents] == ['一段，有"引号"\n和换行', "第二段"]
    assert [(e["row"], e["reason"]) for e in aside.examples] == [(2, "字段 text 为空")]


def test_list_files_explains_itself(tmp_path):
    with pytest.raises(UserError, match="找不到"):
        list_files(tmp_path / "missing")
    with pytest.raises(UserError, match="没有数据文件"):
        list_files(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.txt").touch()
    with pytest.raises(UserError):
        list_files(tmp_path, skip=[tmp_path / "out"])
    assert list_files(tmp_path / "out", skip=[tmp_path / "out"]) == [tmp_path / "out" / "x.txt"]
    for name in ("report.json", "report.html", "report.jsonl", "README.txt"):
        (tmp_path / "out" / name).touch()
    assert [file.name for file in list_files(tmp_path / "out")] == ["report.jsonl", "x.txt"]
    assert stem(Path("a.b.jsonl.gz")) == "a.b" and source_name(Path("x/y.json"), Path("x/y.json")) == "y"


def test_aside_shows_a_short_table(capsys):
    aside = SetAside(max_examples=3)
    for row in range(100):
        aside.add(Path("a.json"), row + 7, "字段 text 为空", "x" * 1000, "补上")
    aside.show()
    printed = capsys.readouterr().out
    assert "100" in printed and "补上" in printed and len(printed) < 500
    assert len(aside) == 100 and len(aside.report()["examples"]) == 3
    assert table(["名", "n"], [["中文", 1], ["ab", 12345]]).splitlines()[2].endswith("12,345")


@pytest.mark.skipif(not SHARED.exists(), reason="the shared development data is not here")
@pytest.mark.parametrize(("name", "count"), [("tang_poems", 57607), ("modern_chapters", 7304)])
def test_real_corpora_are_read_whole(name, count):
    aside = SetAside()
    rows = sum(1 for _ in read_documents(SHARED / "pretrain" / f"{name}.jsonl.gz", aside))
    assert rows + len(aside) == count and rows > count * 0.99
