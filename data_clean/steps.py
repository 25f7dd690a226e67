"""The steps of cleaning that work on one piece, shard or part at a time, in any process.

`extract`: a piece of raw corpus -> shards of clean texts with their signatures. `strip_lines` (optional): a
shard -> the same without the lines that many documents share. `write_part`: the documents of all shards that
were drawn for one part of the output and are kept -> shuffled parquet. What needs the whole corpus at once lies
between them, in duplicates.py and boilerplate.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_clean.benchmarks import Benchmarks
from data_clean.boilerplate import line_hashes, without_lines
from data_clean.features import COLUMN, FEATURES
from data_clean.keys import keys_of
from data_clean.mask import mask_private
from data_clean.normalise import normalise_batch
from data_clean.perplexity import bits_per_byte, outside
from data_clean.rules import RuleSet, preset_of
from data_clean.shards import SLOTS, Documents, Shard, write_shard
from data_clean.signatures import Settings, Signatures, sign
from data_clean.tally import CONTAMINATED, SHARES, Tally
from data_clean.texts import Texts, concatenate, from_arrow
from sources.aside import SetAside
from sources.pieces import Piece, read_batches

SHARD_BYTES = 64 << 20  # text of a shard; a worker holds it twice while it is written
Judge = Callable[[RuleSet, Texts], tuple[np.ndarray, list[str]]]  # -> rules broken or -1, their names
ROW_GROUP = 5000  # rows: readers stream parquet and hold one group
PART, KEEP = "part.parquet", "keep.npy"
SCORED = 1000  # documents that a model judges at a time
BITS = [n / 10 for n in range(81)]  # edges of a histogram
SHOWN = (
    "chinese",
    "punctuation",
    "digits",
    "ended_lines",
    "repeated_8gram",
)  # features with a histogram in the report


@dataclass(frozen=True)
class Recipe:
    """What is done with every text; the same in all processes."""

    text_column: str | None
    presets: tuple[tuple[str, str], ...]  # (pattern of data sets, preset)
    limits: tuple[tuple[str, float], ...]  # (rule, limit) in place of the preset's
    block_words: tuple[str, ...]
    mask_private: bool
    to_simplified: bool
    half_width: bool
    benchmarks: tuple[Path, ...]
    benchmark_ngram: int
    boilerplate: int  # documents that must share a line for it to go; 0: lines are left alone
    duplicates: Settings
    seed: int


class ExtractJob(NamedTuple):
    number: int
    piece: Piece
    recipe: Recipe
    is_reference: bool  # already clean; new documents are compared with it


class StripJob(NamedTuple):
    shard: Shard
    recipe: Recipe
    lines: Path  # hashes of the lines to remove
    number: int = 0  # of the new shard in its folder


class ScoreJob(NamedTuple):
    shard: Shard
    first: int  # number of the shard's first document
    keep: Path  # (documents of all shards,) bool
    model: Path
    low: float  # bits per byte
    high: float


class PartJob(NamedTuple):
    number: int
    parts: int
    shards: Sequence[Shard]
    keep: Path  # (documents of all shards,) bool
    seed: int


def extract(job: ExtractJob, folder: Path) -> dict[str, Any]:
    """Read a piece of the corpus, clean its documents, and write them as shards."""
    aside, cleaner = SetAside(), Cleaner(job.recipe)
    writer = ShardWriter(folder, job.recipe, job.number)
    for documents in read(job, aside, cleaner.tally):
        if not job.is_reference:
            documents = cleaner.clean(documents)
        # Where lines are still to be removed, only reference documents can be signed already.
        is_final = job.is_reference or not job.recipe.boilerplate
        writer.add(documents, cleaner.sign(documents) if is_final else ())
    writer.flush()
    return {"tally": cleaner.tally.to_json(), "aside": aside.report(), "shards": writer.sources}


def strip_lines(job: StripJob, folder: Path) -> dict[str, Any]:
    """Write a shard again without the lines that many documents share, and with signatures."""
    shard, cleaner = job.shard, Cleaner(job.recipe)
    before = Documents(shard.texts(), shard.source_names(), shard.column("order"))
    documents = cleaner.strip(before, np.load(job.lines))
    if not documents.texts.count:
        return {"tally": cleaner.tally.to_json(), "shards": []}
    slot_of = shard.slot_of()[np.isin(before.order, documents.order)]
    sources = write_shard(folder / f"{job.number:03d}", documents, cleaner.sign(documents), slot_of)
    return {"tally": cleaner.tally.to_json(), "shards": [sources]}


def score(job: ScoreJob, folder: Path) -> dict[str, Any]:
    """Judge the kept documents of a shard by a model; writes which of the shard's documents stay."""
    shard, tally = job.shard, Tally()
    keep = np.load(job.keep, mmap_mode="r")[job.first : job.first + shard.count].copy()
    for numbers in np.array_split(np.flatnonzero(keep), keep.sum() // SCORED + 1):
        start = time.process_time()
        texts, sources = shard.texts().take(numbers), shard.source_names()[numbers]
        values = bits_per_byte(texts.texts(), job.model)
        tally.histogram("每字节比特数", values, BITS)
        for rule, dropped in outside(values, job.low, job.high).items():
            tally.drop(rule, texts, sources, dropped)
            keep[numbers[dropped]] = False
        characters, stays = texts.characters, keep[numbers]
        counts = (len(numbers), int(stays.sum()), int(characters.sum()), int(characters[stays].sum()))
        tally.step("困惑度", *counts, time.process_time() - start)
    np.save(folder / KEEP, keep)
    return {"tally": tally.to_json()}


def write_part(job: PartJob, folder: Path) -> dict[str, Any]:
    """Write one part of the output: its kept documents of every shard, shuffled."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keep, first = np.load(job.keep, mmap_mode="r"), 0
    texts, sources = [], [np.empty(0, object)]
    for shard in job.shards:
        here = shard.part(job.number, job.parts)
        kept = here.start + np.flatnonzero(keep[first + here.start : first + here.stop])
        first += shard.count
        if len(kept):
            texts.append(shard.texts().take(kept))
            sources.append(shard.source_names()[kept])
    order = np.random.default_rng([job.seed, job.number]).permutation(sum(part.count for part in texts))
    shuffled, names = concatenate(texts).take(order), np.concatenate(sources)[order]
    table = pa.table({"text": shuffled.to_arrow(), "source": pa.array(names, pa.string())})
    pq.write_table(
        table, folder / PART, compression="zstd", row_group_size=ROW_GROUP, use_dictionary=["source"],
        write_statistics=["source"],
    )  # fmt: skip
    tally = Tally()
    tally.count_kept(shuffled, names)
    return {"tally": tally.to_json()}


def read(job: ExtractJob, aside: SetAside, tally: Tally) -> Iterator[Documents]:
    """The documents of a piece, batch by batch, counted."""
    position, start = job.number << 40, time.process_time()
    for batch in read_batches(job.piece, aside, job.recipe.text_column):
        texts, sources = from_arrow(batch.texts), np.array(batch.sources.to_pylist(), object)
        order = np.arange(position, position + texts.count, dtype=np.uint64)
        position += texts.count
        if not job.is_reference:
            characters = tally.count_read(texts, sources)
            seconds = time.process_time() - start
            tally.step("读取", texts.count, texts.count, characters, characters, seconds)
        yield Documents(texts, sources, order)
        start = time.process_time()


class Cleaner:
    """Normalises, filters and signs documents, and keeps account of it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.tally = recipe, Tally()
        self.reasons: dict[int, str] | None = (
            None  # if a dict: why which document (by its `order`) was dropped
        )

    def clean(self, documents: Documents) -> Documents:
        """All that a single text needs."""
        documents = self._timed("剔除乱码", documents, self._drop_broken)
        documents = self._timed("规范化", documents, self._normalise)
        documents = self._timed("过滤", documents, self._filter)
        if self.recipe.benchmarks:
            documents = self._timed("剔除评测题", documents, self._decontaminate)
        return documents

    def strip(self, documents: Documents, lines: np.ndarray) -> Documents:
        """Without these lines (sorted hashes), and without the texts that are too poor then."""
        return self._timed("剔除公共行", documents, lambda d: self._strip(d, lines))

    def sign(self, documents: Documents) -> Signatures:
        """What duplicates are found by."""
        start = time.process_time()
        signatures = sign(keys_of(documents.texts), self.recipe.duplicates)
        self.tally.add_seconds("近似去重", time.process_time() - start)
        return signatures

    def _timed(self, name: str, documents: Documents, step: Callable[[Documents], Documents]) -> Documents:
        start = time.process_time()
        result = step(documents)
        seconds = time.process_time() - start
        characters = [int(d.texts.characters.sum()) for d in (documents, result)]
        self.tally.step(name, documents.texts.count, result.texts.count, *characters, seconds)
        return result

    def _normalise(self, documents: Documents) -> Documents:
        texts = normalise_batch(documents.texts, self.recipe.half_width, self.recipe.to_simplified)
        if self.recipe.mask_private:
            texts, counts = mask_private(texts)
            self.tally.count("隐私", counts)
        return documents._replace(texts=texts)

    def _drop_broken(self, documents: Documents) -> Documents:
        """Rules for the raw text: normalising removes what they look for."""
        return self._drop(documents, lambda rules, texts: (rules.raw_verdicts(texts), rules.raw_names))

    def _filter(self, documents: Documents) -> Documents:
        return self._drop(documents, self._judge)

    def _judge(self, rules: RuleSet, texts: Texts) -> tuple[np.ndarray, list[str]]:
        features = rules.measure(texts)
        for name in SHOWN:
            self.tally.histogram(FEATURES[name], features[:, COLUMN[name]], SHARES)
        return rules.verdicts(texts, features), rules.names

    def _strip(self, documents: Documents, lines: np.ndarray) -> Documents:
        texts, lost = without_lines(documents.texts, lines)
        self.tally.count("公共行", {"行": int(lost.sum()), "文档": int((lost > 0).sum())})
        return self._filter(documents._replace(texts=texts))  # what is left may be too little

    def _drop(self, documents: Documents, judge: Judge) -> Documents:
        """Without the documents that a rule of their data set's preset drops."""
        keep = np.ones(len(documents.sources), bool)
        presets = {name: preset_of(name, dict(self.recipe.presets)) for name in set(documents.sources)}
        preset = np.array([presets[name] for name in documents.sources], object)
        for name in sorted(set(presets.values())):
            here = documents.where(preset == name)
            verdicts, rules = judge(rule_set(name, self.recipe), here.texts)
            for rule in np.unique(verdicts[verdicts >= 0]).tolist():
                self.tally.drop(rules[rule], here.texts, here.sources, np.flatnonzero(verdicts == rule))
                self._note(here.order[verdicts == rule], rules[rule])
            keep[np.flatnonzero(preset == name)[verdicts >= 0]] = False
        return documents.where(keep)

    def _decontaminate(self, documents: Documents) -> Documents:
        benchmarks = read_benchmarks(self.recipe.benchmarks, self.recipe.benchmark_ngram)
        hits = benchmarks.hits(*keys_of(documents.texts))
        self.tally.drop_contaminated(documents.texts, documents.sources, hits, benchmarks)
        self._note(documents.order[hits >= 0], CONTAMINATED)
        return documents.where(hits < 0)

    def _note(self, order: np.ndarray, reason: str) -> None:
        if self.reasons is not None:
            self.reasons.update(dict.fromkeys(order.tolist(), reason))


@lru_cache(maxsize=8)
def rule_set(preset: str, recipe: Recipe) -> RuleSet:
    """The rules of a preset with the user's thresholds; made once per process."""
    return RuleSet(preset, dict(recipe.limits), recipe.block_words)


@lru_cache(maxsize=1)
def read_benchmarks(paths: tuple[Path, ...], ngram: int) -> Benchmarks:
    """Once per process."""
    return Benchmarks.read(paths, SetAside(), ngram)


class ShardWriter:
    """Collects documents and writes a shard whenever there are enough."""

    def __init__(self, folder: Path, recipe: Recipe, number: int) -> None:
        self.folder, self.recipe, self.number = folder, recipe, number
        self.documents: list[Documents] = []
        self.signatures: list[Sequence[np.ndarray]] = []
        self.sources: list[list[str]] = []  # of every shard written, the data sets behind its codes
        self.bytes = 0

    def add(self, documents: Documents, signatures: Sequence[np.ndarray]) -> None:
        self.documents.append(documents)
        self.signatures.append(signatures)
        self.bytes += len(documents.texts.data)
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if not self.bytes:
            return
        texts, sources, order = zip(*self.documents, strict=True)
        documents = Documents(concatenate(texts), np.concatenate(sources), np.concatenate(order))
        signatures = [np.concatenate(parts) for parts in zip(*self.signatures, strict=True)]
        number = len(self.sources)
        rng = np.random.default_rng([self.recipe.seed, self.number, number])
        slot_of = rng.integers(0, SLOTS, documents.texts.count)
        folder = self.folder / f"{number:03d}"
        self.sources.append(write_shard(folder, documents, signatures, slot_of))
        if self.recipe.boilerplate:
            np.save(folder / "lines.npy", line_hashes(documents.texts))
        self.documents, self.signatures, self.bytes = [], [], 0
