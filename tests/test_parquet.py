"""Texts from the columns of parquet files."""

import io

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from corpus_files import (
    PIECE_BYTES,
    TEXT,
    documents,
    file_of,
    parquet,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.aside import SetAside
from sources.json_rows import BAD_TEXT
from sources.pieces import read_batches, split_into_pieces


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
    assert texts == ["一\n甲", "三\n乙"]
    assert [(e["row"], e["reason"]) for e in aside.examples] == [(2, BAD_TEXT)]


def test_a_source_that_is_no_text_is_replaced():
    raw = pa.array([b"C4", b"\xff"], pa.large_binary()).view(pa.large_string())
    with file_of(parquet(pa.table({"text": ["甲", "乙"], "source": raw}))) as path:
        [piece] = split_into_pieces(path)
        [batch] = read_batches(piece, SetAside())
    assert batch.sources.to_pylist() == ["C4", "file.xyz"]


def test_trimming_is_that_of_python():
    texts = [chr(code) + "字" + chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    array = pc.utf8_trim_whitespace(pa.array(texts, pa.large_string()))
    assert array.to_pylist() == [text.strip() for text in texts]


def test_links_in_the_column_source_are_no_data_sets():
    """A corpus whose `source` is a link has one in every row: more names than a report can list."""
    texts, links = [f"第{i}篇" for i in range(3000)], [f"https://a.cn/{i}" for i in range(3000)]
    few = ["甲", "乙", "丙"] * 1000
    for names, found in ((links, {"file.xyz"}), (few, set(few))):
        with file_of(parquet(pa.table({"text": texts, "source": names}), row_group_size=1100)) as path:
            pieces = split_into_pieces(path, piece_bytes=1)
            batches = [batch for piece in pieces for batch in read_batches(piece, SetAside())]
        assert len(pieces) == 3 and sum(len(batch.texts) for batch in batches) == 3000
        assert {name for batch in batches for name in batch.sources.to_pylist()} == found
