"""Our cleaning steps as blocks of datatrove, whose executors run them on many machines (see on_datatrove.py).

The blocks hand documents on as datatrove's own do, so that any filter of datatrove fits between them; what they
compute, they compute in batches with the functions of the single machine, on the same files (shards.py). The
result is therefore the same. datatrove's MinHash blocks are not used: they take words for n-grams, join what
only shares a bucket, keep whatever comes first, and take a Python step for every document and bucket.

A folder that all machines share holds what the blocks hand each other:

    shards/000000/    the documents of a piece that the rules let pass, with their signatures
    aside/000000.json rows of the piece that could not be read
    alive.npy         (n,) whether a document is still to be compared: no equal one comes before it
    joined/           (m, 2) numbers of documents that are duplicates, found by one task
    clusters.npz      members and kept of duplicates.Clusters
    dropped/          dropped documents with the reason
"""

import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.batching import batched

from data_clean.duplicates import (
    apart,
    choose,
    flatten,
    join_by_minhash,
    join_by_simhash,
    join_equal,
    unite,
)
from data_clean.filters import RAW_RULES, broken_rule, clean_rules
from data_clean.keys import keys_of
from data_clean.normalise import normalise
from data_clean.shards import Corpus, Documents, Shard, write_shard
from data_clean.signatures import Settings, sign
from data_clean.texts import concatenate, from_strings
from sources.aside import SetAside
from sources.pieces import Piece, read_batches
from sources.report import write_json
from stage import atomic_path, swap, sync_tree

BATCH = 256  # documents that go through rules and signatures at a time; also bounds the memory for long books
SCHEMA = pa.schema([("text", pa.large_string()), ("source", pa.string())])


class PieceReader(BaseReader):
    """The documents of every world_size-th piece; any format of sources/."""

    name = "📖 语料"

    def __init__(self, pieces: list[Piece], text_column: str | None, work: Path) -> None:
        super().__init__()
        self.pieces, self.text_column, self.work = pieces, text_column, work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for number in range(rank, len(self.pieces), world_size):
            aside, position = SetAside(), number << 40
            for batch in read_batches(self.pieces[number], aside, self.text_column):
                sources = batch.sources.to_pylist()
                count_sources(self, Counter(sources), "读入")
                for text, source in zip(batch.texts.to_pylist(), sources, strict=True):
                    yield Document(text, str(position), metadata={"source": source, "piece": number})
                    position += 1
            write_json(self.work / "aside" / f"{number:06d}.json", aside.report())


class RulesFilter(BaseFilter):
    """Normalises texts and drops those that break a rule."""

    name = "🧹 规则"

    def __init__(self, min_chars: int, work: Path) -> None:
        super().__init__(exclusion_writer(work / "dropped" / "rules"), batch_size=BATCH)
        self.min_chars = min_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        rules = clean_rules(self.min_chars)
        results: list[bool | tuple[bool, str]] = []
        for document in batch:
            rule = broken_rule(document.text, RAW_RULES)
            if not rule:
                document.text = normalise(document.text)
                rule = broken_rule(document.text, rules)
            if rule:
                self.stat_update(f"{document.metadata['source']}/{rule}", unit="source")
            results.append((False, rule) if rule else True)
        return results


class ShardWriter(PipelineStep):
    """Signs documents and writes them as one shard for every piece."""

    type, name = "🫂 - DEDUP", "✍️ 签名"

    def __init__(self, settings: Settings, parts: int, seed: int, work: Path) -> None:
        super().__init__()
        self.settings, self.parts, self.seed, self.work = settings, parts, seed, work

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        for piece, documents in groupby(data, key=lambda document: document.metadata["piece"]):
            batches = []
            for batch in batched(documents, BATCH):
                with self.track_time("batch"):
                    texts = from_strings([document.text for document in batch])
                    sources = np.array([document.metadata["source"] for document in batch], object)
                    order = np.array([int(document.id) for document in batch], np.uint64)
                    batches.append((texts, sources, order, sign(keys_of(texts), self.settings)))
            with self.track_time("batch"):
                self._write(piece, batches)

    def _write(self, piece: int, batches: list[tuple]) -> None:
        texts, sources, order, signatures = zip(*batches, strict=True)
        documents = Documents(concatenate(texts), np.concatenate(sources), np.concatenate(order))
        columns = [np.concatenate(parts) for parts in zip(*signatures, strict=True)]
        part_of = np.random.default_rng([self.seed, piece]).integers(0, self.parts, documents.texts.count)
        with atomic_path(self.work / "shards" / f"{piece:06d}") as folder:
            names = write_shard(folder, documents, columns, part_of, self.parts)
            (folder / "sources.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


class EqualDocuments(PipelineStep):
    """Finds the documents with equal keys; one task."""

    type, name = "🫂 - DEDUP", "🟰 完全重复"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time("task"):
            corpus = open_corpus(self.work)
            parent = apart(corpus)
            alive = join_equal(corpus, parent)
            save_joined(self.work, "equal", parent)
            save(self.work / "alive.npy", alive)


class SimilarDocuments(PipelineStep):
    """Finds near duplicates and verifies them: with MinHash, task k looks at band k % bands and a share of its keys.

    With another method there is one task.
    """

    type, name = "🫂 - DEDUP", "🔍 近似重复"

    def __init__(self, settings: Settings, work: Path) -> None:
        super().__init__()
        self.settings, self.work = settings, work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time("task"):
            corpus, alive = open_corpus(self.work), np.load(self.work / "alive.npy")
            parent = apart(corpus)
            if self.settings.method == "minhash":
                band, shares = rank % self.settings.bands, world_size // self.settings.bands
                keep_share(corpus, alive, band, rank // self.settings.bands, shares)
                join_by_minhash(corpus, parent, alive, self.settings, [band])
            elif self.settings.method == "simhash":
                join_by_simhash(corpus, parent, alive, self.settings)
            save_joined(self.work, f"{rank:05d}", parent)


class ChosenDocuments(PipelineStep):
    """Joins what all tasks found to clusters and chooses the document of each that stays; one task."""

    type, name = "🫂 - DEDUP", "🧩 重复簇"

    def __init__(self, work: Path) -> None:
        super().__init__()
        self.work = work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time("task"):
            corpus = open_corpus(self.work)
            parent = apart(corpus)
            for file in sorted((self.work / "joined").glob("*.npy")):
                unite(parent, *np.load(file))
            members, kept, is_exact = choose(corpus, parent, lambda source: 0)
            for what, dropped in (("完全重复", is_exact), ("近似重复", ~is_exact)):
                sources = corpus.source_names(members[dropped & (members != kept)])
                count_sources(self, Counter(sources.tolist()), what)
            keep = np.ones(len(corpus), bool)
            keep[members[members != kept]] = False
            save(self.work / "keep.npy", keep)


class PartWriter(PipelineStep):
    """Writes the documents that stay, shuffled; task k writes part k of the output."""

    type, name = "💽 - WRITER", "📒 parquet"

    def __init__(self, seed: int, work: Path) -> None:
        super().__init__()
        self.seed, self.work = seed, work

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time("task"):
            keep, corpus = np.load(self.work / "keep.npy"), open_corpus(self.work)
            numbers = part_numbers(corpus, rank)
            numbers = numbers[keep[numbers]]
            order = np.random.default_rng([self.seed, rank]).permutation(len(numbers))
            texts, sources = corpus.texts(numbers).take(order), corpus.source_names(numbers)[order]
            count_sources(self, Counter(sources.tolist()), "保留")
            table = pa.table({"text": texts.to_arrow(), "source": pa.array(sources, pa.string())})
            with atomic_path(self.work / "clean" / f"part-{rank:05d}.parquet") as path:
                pq.write_table(table, path, compression="zstd", row_group_size=5000)


class Finish(PipelineStep):
    """Writes report.json and gives the result its final name; one task."""

    type, name = "💽 - WRITER", "🏁 完成"

    def __init__(self, work: Path, out: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.work, self.out, self.settings = work, out, settings

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        result = self.work / "clean"
        if not result.is_dir():  # nothing was kept; or this task was stopped right behind the last line
            return
        aside = SetAside()
        for file in sorted((self.work / "aside").glob("*.json")):
            aside.merge(json.loads(file.read_text(encoding="utf-8")))
        counts = source_counts(self.work)
        write_json(
            result / "report.json",
            {"sources": counts, "set_aside": aside.report(), "settings": self.settings},
        )
        sync_tree(result)
        swap(result, self.out)


def exclusion_writer(folder: Path) -> JsonlWriter:
    return JsonlWriter(str(folder), "${rank}.jsonl.zst", compression="zstd")


def open_corpus(work: Path) -> Corpus:
    """All shards, in the order of their pieces."""
    folders = sorted((work / "shards").glob("[0-9]*"))
    return Corpus([Shard(f, json.loads((f / "sources.json").read_text(encoding="utf-8"))) for f in folders])


def keep_share(corpus: Corpus, alive: np.ndarray, band: int, share: int, shares: int) -> None:
    """Of the documents leave only those whose key of this band falls to one of several equal tasks."""
    for shard, first in zip(corpus.shards, corpus.firsts, strict=False):
        keys = shard.column("bands")[band] >> np.uint64(32)  # `buckets` divides by the low bits
        alive[first : first + shard.count] &= keys % np.uint64(shares) == share


def save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def save_joined(work: Path, name: str, parent: np.ndarray) -> None:
    """What a union-find has joined: every document that is not a root, and its root, (2, m)."""
    root = flatten(parent)
    joined = np.flatnonzero(root != np.arange(len(root)))
    save(work / "joined" / f"{name}.npy", np.stack([joined, root[joined]]))


def part_numbers(corpus: Corpus, part: int) -> np.ndarray:
    """Numbers of the documents that were drawn for a part of the output."""
    slices = [(first, shard.part(part)) for first, shard in zip(corpus.firsts, corpus.shards, strict=False)]
    return np.concatenate([np.arange(first + s.start, first + s.stop) for first, s in slices])


def count_sources(step: PipelineStep, sources: Counter[str], what: str) -> None:
    """Count documents by data set in the statistics of a block."""
    for source, count in sources.items():
        step.stat_update(f"{source}/{what}", value=count, unit="batch")


def source_counts(work: Path) -> dict[str, dict[str, int]]:
    """What `count_sources` counted in all tasks of all steps, by data set."""
    counts: dict[str, dict[str, int]] = {}
    for file in sorted(work.glob("logs/*/stats/*.json")):
        for block in json.loads(file.read_text(encoding="utf-8")):
            for label, value in block["stats"].items():
                source, slash, what = label.rpartition("/")
                if slash:
                    entry = counts.setdefault(source, Counter())
                    entry[what] += int(value["total"] if isinstance(value, dict) else value)
    return counts
