"""Corpora in any container and compression, and how tests read them back."""

import gzip
import io
import json
import random
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from sources import batches
from sources.aside import SetAside
from sources.pieces import Batch, read_batches, split_into_pieces

CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from('中文{}[]",:\\ \t\u3000\u2028\r')
TEXT = st.text(CHARACTERS, max_size=25)
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


def documents(count: int, seed: int = 0) -> list[dict]:
    """Rows with an id, so that what was lost can be told."""
    rng = random.Random(seed)
    return [{"text": f"第{n}篇" + "字" * rng.randrange(60), "id": n} for n in range(count)]


def parquet(table: pa.Table, **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()
