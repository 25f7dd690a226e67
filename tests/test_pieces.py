"""Pieces and batches: whatever the container, the compression and the size of the pieces, the same texts."""

import gzip
import io
import json
import random
import tempfile
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources import batches, json_rows, json_values, streams
from sources.aside import FileAside, SetAside
from sources.containers import read_rows
from sources.json_rows import BAD_TEXT, lines
from sources.pieces import Batch, read_batches, split_into_pieces
from sources.pretrain_text import read_documents

CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from('中文{}[]",:\\ \t\u3000\u2028\r')
TEXT = st.text(CHARACTERS, max_size=25)
LINE = st.text(CHARACTERS.filter(lambda char: char not in "\r\n"), max_size=25)
META = st.lists(TEXT, max_size=2)
PLAIN = st.fixed_dictionaries({"text": TEXT}, optional={"id": st.integers(0, 9), "meta": META})
TITLED = st.fixed_dictionaries({"title": TEXT | st.none(), "content": TEXT})
ROWS = st.lists(PLAIN, min_size=1, max_size=12) | st.lists(TITLED, min_size=1, max_size=12)
CONTAINERS = ["lines", "crlf", "array", "one a line", "indented", "values", "glued", "parquet"]
COMPRESSIONS = ["", "gzip", "two gzip members", "zstd", "two zstd frames", "zstd of gzip"]
PIECE_BYTES = st.integers(1, 60) | st.just(1 << 30)


@contextmanager
def file_of(content: bytes, is_zipped: bool = False) -> Iterator[Path]:
    """A file of a meaningless name, or a zip archive with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.xyz"
        if is_zipped:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("inside.abc", content)
        else:
            path.write_bytes(content)
        yield path


def read(path: Path, piece_bytes: int = 1 << 30) -> tuple[list[str], SetAside]:
    """All texts by pieces, each in an aside of its own, as workers do it; checks what a batch promises."""
    texts, whole = [], SetAside()
    for piece in split_into_pieces(path, piece_bytes=piece_bytes):
        aside = SetAside()
        for batch in read_batches(piece, aside):
            check(batch)
            texts += batch.texts.to_pylist()
        whole.merge(json.loads(json.dumps(aside.report())))
    return texts, whole


def check(batch: Batch) -> None:
    for column in batch:
        column.validate(full=True)
        assert column.null_count == 0
    assert len(batch.texts) == len(batch.sources) <= batches.BATCH_ROWS
    assert batch.texts.nbytes <= batches.BATCH_BYTES + 8 * batches.BATCH_ROWS + 8 or len(batch.texts) == 1
    assert all(text and text == text.strip() for text in batch.texts.to_pylist())


def as_text(row: dict) -> str:
    title = (row.get("title") or "").strip()
    body = (row["text"] if "text" in row else row["content"]).strip()
    return f"{title}\n{body}" if body and title and body[: len(title)] != title else body


def contain(rows: list[dict], container: str) -> bytes:
    """The rows in a container."""
    if container == "parquet":
        keys = dict.fromkeys(key for row in rows for key in row)
        table = pa.table({key: pa.array([row.get(key) for row in rows]) for key in keys})
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=3)
        return buffer.getvalue()
    indent = 2 if container in ("indented", "values") else None
    texts = [json.dumps(row, ensure_ascii=False, indent=indent) for row in rows]
    between = {"lines": "\n", "crlf": "\r\n \r\n", "array": ", ", "one a line": ",\n", "indented": ",\n  "}
    joined = between.get(container, "").join(texts)
    return (f"[{joined}]\n" if "," in between.get(container, "") else joined).encode()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def compress(content: bytes, compression: str) -> bytes:
    half = len(content) // 2
    pack = zstd if "zstd" in compression else gzip.compress
    if compression.startswith("two"):
        return pack(content[:half]) + pack(content[half:])
    if compression == "zstd of gzip":
        return pack(gzip.compress(content))
    return pack(content) if compression else content


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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["title", "b"]), VALUES, min_size=1) | VALUES, min_size=1, max_size=12
    ),
    st.sampled_from([None, 0, 1]),
    st.sampled_from([(",", ":"), (", ", ": ")]),
    st.booleans(),
    st.sampled_from([1, 3, 10, 50]),
)
def test_windows_of_any_size_find_the_values(values, indent, separators, in_array, size):
    if not in_array:
        values = [value if isinstance(value, dict) else {"v": value} for value in values]
    texts = [
        json.dumps(value, indent=indent, separators=separators, ensure_ascii=size == 3) for value in values
    ]
    content = f"[{separators[0].join(texts)}]" if in_array else "\n".join(texts)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WINDOW", "BLOCK", "FIRST_TRY"):
            patch.setattr(json_values, name, size)
        aside = SetAside()
        with file_of(content.encode()) as path, streams.open_file(path) as handle:
            rows = list(json_rows.json_values(handle, FileAside(aside, path), json_rows.exact_json, in_array))
    assert rows == [(n, value) for n, value in enumerate(values, 1) if isinstance(value, dict)]
    assert len(aside) == sum(not isinstance(value, dict) for value in values)


def documents(count: int, seed: int = 0) -> list[dict]:
    """Rows with an id, so that what was lost can be told."""
    rng = random.Random(seed)
    return [{"text": f"第{n}篇" + "字" * rng.randrange(60), "id": n} for n in range(count)]


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


@pytest.mark.parametrize("layout", ["array", "one a line", "indented", "values"])
@pytest.mark.parametrize("damage", ["quote", "bracket", "value", "byte"])
def test_damage_inside_an_array_costs_few_rows(layout, damage):
    rows = documents(2000)
    content = contain(rows, layout)
    at = content.index("第1000篇".encode())
    changed = {
        "quote": content[:at] + b'"' + content[at:],
        "bracket": content[: at - 1] + content[at:].replace(b"}", b"", 1),
        "value": content[: at - 1] + b"oops" + content[content.index(b'"', at) + 1 :],
        "byte": content[:at] + b"\xff" + content[at + 1 :],
    }[damage]
    with file_of(changed) as path:
        texts, aside = read(path)
    assert set(texts) < {row["text"] for row in rows} and len(texts) >= 1997
    assert len(aside) in (1, 2) and aside.examples[0]["row"] in (1001, 1002)


def test_two_missing_quotes_do_not_join_what_is_between():
    """Up to the second one, strings and what is between them change places."""
    content = contain(documents(2000), "array")
    for number in (1000, 1020):
        content = content.replace(f'"第{number}篇'.encode(), f"第{number}篇".encode())
    with file_of(content) as path:
        texts, aside = read(path)
    assert len(texts) >= 1996 and len(aside) == 2


NESTED = st.recursive(
    st.text(st.sampled_from('\\"{}[],a'), max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from('a\\"{'), inner, max_size=2),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(NESTED, max_size=8), st.sampled_from([1, 7, 1 << 17]))
def test_brackets_enclose_objects(values, block):
    texts = [json.dumps(value) for value in values]
    expected, offset = [], 1
    for text, value in zip(texts, values, strict=True):
        if not isinstance(value, str):
            expected.append((offset, offset + len(text)))
        offset += len(text) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "BLOCK", block)
        assert json_values.object_spans(f"[{','.join(texts)}]".encode(), 1) == expected


def test_values_of_other_kinds_between_objects(monkeypatch):
    monkeypatch.setattr(json_values, "WINDOW", 100)
    values: list = [{"b": number} for number in range(200)]
    for place in (30, 60, 61, 120, 199):
        values[place] = place if place % 2 else {"c": [{"b": 1}, {"b": 2}], "long": "字" * 1000}
    with file_of(json.dumps(values, ensure_ascii=False).encode()) as path:
        aside = SetAside()
        assert [row for _, row in read_rows(path, aside)] == [v for v in values if isinstance(v, dict)]
        assert [example["row"] for example in aside.examples] == [62, 200]


def test_nested_objects_like_the_outer_ones():
    """What stands between the sections of an entry is what stands between the entries."""
    rows = [
        {"title": f"条目{n}", "sections": [{"title": f"{m}", "content": "内容}, {" * m} for m in range(4)]}
        for n in range(3000)
    ]
    for layout in ("array", "glued", "indented"):
        with file_of(contain(rows, layout)) as path:
            texts, aside = read(path)
            assert [row for _, row in read_rows(path, aside)] == rows and not aside
        assert len(texts) == 3000 and texts[7].startswith("条目7：\n1：内容")


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


def parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.none() | TEXT | st.just("\xff"), min_size=1, max_size=30),
    st.sampled_from(
        [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
    ),
    st.integers(1, 7),
    PIECE_BYTES,
)
def test_parquet_columns_as_rows(texts, kind, group, piece_bytes):
    """Columns give what the same rows give as JSON lines; bytes that are no UTF-8 cost their row."""
    raw = [None if text is None else text.encode("latin-1" if text == "\xff" else "utf-8") for text in texts]
    column = pa.array(raw, pa.large_binary()).view(pa.large_string())
    if kind == pa.large_string() or None in texts or "\xff" not in texts:
        column = column.cast(kind) if "\xff" not in texts else column
    content = parquet(pa.table({"text": column, "other": range(len(texts))}), row_group_size=group)
    good = [text.strip() for text in texts if text and text != "\xff" and text.strip()]
    with file_of(content) as path:
        found, aside = read(path, piece_bytes)
    assert found == good
    assert sum(n for (_, reason), n in aside.counts.items() if reason == BAD_TEXT) == texts.count("\xff")
    assert len(aside) == len(texts) - len(good)
    for example in aside.examples:
        text = texts[example["row"] - 1]
        assert text == "\xff" if example["reason"] == BAD_TEXT else not (text or "").strip()


def test_parquet_without_text_is_counted():
    table = pa.table({"a": range(10), "text": range(10)})
    with file_of(parquet(table)) as path:
        assert read(path)[1].report()["counts"] == [
            {"file": str(path), "reason": "字段 text 不是文字", "rows": 10}
        ]
    with file_of(parquet(table.select(["a"]), row_group_size=2)) as path:
        _, aside = read(path, 1)
        assert len(aside) == 10 and "现有字段：a" in aside.examples[0]["reason"] and aside.remedies


def test_a_damaged_row_group_costs_its_own_rows():
    rows = documents(300)
    content = bytearray(parquet(pa.Table.from_pylist(rows), row_group_size=50, compression="zstd"))
    start = pq.ParquetFile(io.BytesIO(content)).metadata.row_group(2).column(0).data_page_offset
    content[start : start + 60] = bytes(60)
    with file_of(bytes(content)) as path:
        for piece_bytes in (1, 1 << 30):
            texts, aside = read(path, piece_bytes)
            assert texts == [row["text"] for row in rows[:100] + rows[150:]]
            assert len(aside) == 50 and aside.examples[0]["row"] == 101


def test_clean_parquet_keeps_the_source_of_each_row():
    table = pa.table({"text": ["甲", " ", "乙", "丙"], "source": ["C4", "x", None, "wiki"]})
    with file_of(parquet(table)) as path:
        [piece] = split_into_pieces(path)
        [batch] = read_batches(piece, SetAside())
        [other] = read_batches(piece, SetAside(), text_column="source")
    assert batch.texts.to_pylist() == ["甲", "乙", "丙"]
    assert batch.sources.to_pylist() == ["C4", "file.xyz", "wiki"]
    assert other.texts.to_pylist() == ["C4", "x", "wiki"] and set(other.sources.to_pylist()) == {"file.xyz"}


def test_titles_beside_bytes_that_are_no_text():
    raw = pa.array(["甲".encode(), b"\xff", "乙".encode()], pa.large_binary()).view(pa.large_string())
    with file_of(parquet(pa.table({"title": ["一", "二", "三"], "text": raw}))) as path:
        texts, aside = read(path)
    assert texts == ["一\n甲", "三\n乙"] and aside.examples[0]["row"] == 2


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


def test_trimming_is_that_of_python():
    texts = [chr(code) + "字" + chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    array = pc.utf8_trim_whitespace(pa.array(texts, pa.large_string()))
    assert array.to_pylist() == [text.strip() for text in texts]
