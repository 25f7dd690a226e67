"""A large Chinese corpus with planted duplicates, the same for the same seed: `python bench/corpus.py`.

Most documents are unrelated to each other. Among them, at random places, stand groups whose members are
known: copies changed to different degrees, and texts that are alike but not the same. Written are files of
documents and, beside their folder, NAME.truth.jsonl with one group a line; rows count from 0 through all files.
"""

import json
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from bench.background import load_background, random_lengths
from bench.planting import Group, kinds, plan_groups
from sources.report import table
from stage import ROOT, StageConfig, UserError, atomic_path, require, run_stage

BLOCK = 10_000  # documents made at a time
SOURCES = np.array(["网页", "百科", "新闻", "问答"])


@dataclass
class Config(StageConfig):
    """生成去重和清洗基准所用的语料。"""

    out: Path = ROOT / "out" / "bench" / "corpus"  # 输出文件夹；旁边写 名字.truth.jsonl：人工放入的各组
    documents: int = 100_000  # 文档数
    planted: float = 0.15  # 人工放入的重复文档和易混文档所占的比例
    files: int = 4  # 分成几个文件
    format: Literal["parquet", "jsonl"] = "parquet"  # 文件格式
    data: Path | None = None  # 模仿哪份语料的用字（文件或文件夹）；不填则用内置演示语料
    seed: int = 0  # 随机种子

    def check(self) -> None:
        require(1 <= self.documents < 2**31, "documents", self.documents, "在 1 与 2147483647 之间")
        require(0 <= self.planted <= 1, "planted", self.planted, "在 0 与 1 之间")
        require(1 <= self.files <= self.documents, "files", self.files, "在 1 与 --documents 之间")
        require(self.seed >= 0, "seed", self.seed, "不小于 0")
        if self.out.is_file() or (self.out.is_dir() and not list(self.out.glob("part-*"))):
            raise UserError(f"--out {self.out} 已存在，又不是这里生成的语料；请换一个路径。")


class Corpus:
    """Any block of rows can be made by itself; memory holds one block and the originals of copies."""

    def __init__(self, documents: int, planted: float, seed: int = 0, data: Path | None = None) -> None:
        self.documents, self.seed = documents, seed
        self.background = load_background(data)
        random = np.random.default_rng([seed, 0])
        self.groups: list[Group] = plan_groups(documents, planted, random)
        sizes = [len(group.rows) for group in self.groups]
        rows = np.array([row for group in self.groups for row in group.rows], np.int64)
        order = np.argsort(rows)
        self.rows = rows[order]  # (planted,) ascending
        self.group_of = np.repeat(np.arange(len(sizes)), sizes)[order]
        self.member = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])[order]
        lengths = random_lengths(random, sum(group.copies for group in self.groups))
        originals = iter(self.background.documents(random, lengths))
        self.originals = [next(originals) if group.copies else "" for group in self.groups]

    def blocks(self) -> Iterator[list[str]]:
        """All documents in order, some thousand at a time."""
        for start in range(0, self.documents, BLOCK):
            yield self.block(start, min(start + BLOCK, self.documents))

    def block(self, start: int, stop: int) -> list[str]:
        """The documents of rows start to stop."""
        random = np.random.default_rng([self.seed, 1, start])
        first, last = np.searchsorted(self.rows, [start, stop])
        lengths = random_lengths(random, stop - start - (last - first))
        unrelated = iter(self.background.documents(random, lengths))
        planted = dict(zip((self.rows[first:last] - start).tolist(), range(first, last), strict=True))
        return [
            self._planted(planted[place]) if place in planted else next(unrelated)
            for place in range(stop - start)
        ]

    def _planted(self, position: int) -> str:
        number, member = int(self.group_of[position]), int(self.member[position])
        group, original = self.groups[number], self.originals[number]
        if group.copies and member == 0:
            return original
        random = np.random.default_rng([self.seed, 2, number, member])
        return kinds()[group.kind].make(original, group.rate, random, self.background)


def write_corpus(corpus: Corpus, folder: Path, files: int = 1, file_format: str = "parquet") -> None:
    """Write all documents as part-*.parquet or part-*.jsonl, and the groups beside the folder."""
    ends = np.linspace(0, corpus.documents, files + 1).round().astype(int).tolist()[1:]
    write = write_parquet if file_format == "parquet" else write_lines
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        for number, pieces in groupby(cut(corpus.blocks(), ends), key=lambda piece: piece[0]):
            tables = (as_table(texts, corpus.seed + start) for _, start, texts in pieces)
            write(temporary / f"part-{number:05d}.{file_format}", tables)
    with atomic_path(truth_path(folder)) as temporary:
        lines = (json.dumps(asdict(group), ensure_ascii=False) + "\n" for group in corpus.groups)
        temporary.write_text("".join(lines), encoding="utf-8")


def cut(blocks: Iterator[list[str]], ends: list[int]) -> Iterator[tuple[int, int, list[str]]]:
    """Cut blocks where files end: (number of the file, row of the first text, texts)."""
    row = 0
    for block in blocks:
        while block:
            number = bisect_right(ends, row)
            texts, block = block[: ends[number] - row], block[ends[number] - row :]
            yield number, row, texts
            row += len(texts)


def as_table(texts: list[str], seed: int) -> pa.Table:
    sources = SOURCES[np.random.default_rng(seed).integers(len(SOURCES), size=len(texts))]
    return pa.table({"text": pa.array(texts, pa.large_string()), "source": pa.array(sources.tolist())})


def write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    options = {"compression": "zstd", "use_dictionary": ["source"], "write_statistics": False}
    with pq.ParquetWriter(path, first.schema, **options) as writer:
        for content in chain([first], tables):
            writer.write_table(content, row_group_size=5000)


def write_lines(path: Path, tables: Iterator[pa.Table]) -> None:
    with open(path, "wb") as handle:
        for content in tables:
            handle.write(b"".join(orjson.dumps(row) + b"\n" for row in content.to_pylist()))


def corpus_folder(
    parent: Path, documents: int, planted: float, seed: int, data: Path | None, files: int = 4
) -> Path:
    """A parquet corpus below `parent`, made when it is first needed."""
    name = f"corpus-{documents}-{planted}-{seed}-{files}" + (f"-{data.name}" if data else "")
    if not (parent / name).is_dir():
        print(f"生成 {documents:,} 篇的语料 {parent / name}", flush=True)
        write_corpus(Corpus(documents, planted, seed, data), parent / name, files)
    return parent / name


def truth_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".truth.jsonl")


def read_truth(folder: Path) -> list[Group]:
    """The groups of a corpus that `write_corpus` wrote."""
    with open(truth_path(folder), encoding="utf-8") as lines:
        return [Group(**json.loads(line)) for line in lines]


def read_texts(folder: Path, limit: int | None = None) -> pa.ChunkedArray:
    """The texts of a parquet corpus in order, the first `limit` of them."""
    chunks, room = [], limit
    for file in sorted(folder.glob("part-*.parquet")):
        if room == 0:
            break
        text = pq.read_table(file, columns=["text"])["text"].slice(0, room)
        chunks += text.chunks
        room = None if room is None else room - len(text)
    return pa.chunked_array(chunks, pa.large_string())


def main(cfg: Config) -> None:
    start = time.perf_counter()
    corpus = Corpus(cfg.documents, cfg.planted, cfg.seed, cfg.data)
    write_corpus(corpus, cfg.out, cfg.files, cfg.format)
    seconds = time.perf_counter() - start
    rows = [
        [
            kind,
            sum(g.kind == kind for g in corpus.groups),
            sum(len(g.rows) for g in corpus.groups if g.kind == kind),
        ]
        for kind in kinds()
    ]
    print(table(["放入的种类", "组", "篇"], rows))
    print(
        f"\n已写入 {cfg.out}：{cfg.documents:,} 篇，{seconds:.1f} 秒，每秒 {cfg.documents / seconds:,.0f} 篇"
    )


if __name__ == "__main__":
    run_stage(Config, main)
