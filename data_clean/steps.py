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
from data_clean.shards import SLOTS, Corpus, Documents, Shard, write_shard
from data_clean.signatures import Settings, Signatures, sign
from data_clean.tally import CONTAMINATED, SHARES, Tally
from data_clean.texts import arranged, from_arrow
from sources.aside import SetAside
from sources.pieces import Piece, read_together

SHARD_BYTES = 64 << 20  # text of a shard; a worker holds it twice while it is written
ROW_GROUP = 5000  # rows: readers stream parquet and hold one group
PART, KEEP = "part.parquet", "keep.npy"
SCORED = 1000  # documents that a model judges at a time
BITS = [n / 10 for n in range(81)]  # edges of a histogram
# Features with a histogram in the report.
SHOWN = ("chinese", "punctuation", "digits", "ended_lines", "repeated_8gram")


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
    pieces: Sequence[Piece]  # neighbours
    recipe: Recipe
    is_reference: bool  # already clean; new documents are compared with it

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


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
    """Read pieces of the corpus, clean their documents, and write them as shards."""
    aside, cleaner = SetAside(), Cleaner(job.recipe)
    writer = ShardWriter(folder, job.recipe, job.number, cleaner.tally)
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
    sources = write_shard(folder / f"{job.number:03d}", [documents], [cleaner.sign(documents)], slot_of)
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

    start, tally, keep = time.process_time(), Tally(), np.load(job.keep, mmap_mode="r")
    schema = pa.schema([("text", pa.large_string()), ("source", pa.string())])
    mapped, flags, sources = [], [np.empty(0, bool)], [np.empty(0, object)]
    for shard, kept in Corpus(job.shards).by_shard(keep):
        here = shard.part(job.number, job.parts)
        mapped.append(shard.texts(here))
        flags.append(kept[here])
        sources.append(shard.source_names(here))
    numbers = np.flatnonzero(np.concatenate(flags))
    order = np.random.default_rng([job.seed, job.number]).permutation(numbers)
    texts, names = arranged(mapped, order), np.concatenate(sources)[order]
    options = dict(compression="zstd", use_dictionary=["source"], write_statistics=["source"])
    with pq.ParquetWriter(folder / PART, schema, **options) as writer:
        for first in range(0, max(1, len(order)), ROW_GROUP):
            group, here = texts.slice(first, first + ROW_GROUP), names[first : first + ROW_GROUP]
            tally.count_kept(group, here)
            writer.write_table(pa.table([group.to_arrow(), pa.array(here, pa.string())], schema=schema))
    size = tally.kept_characters
    tally.step("打乱与写出", len(order), len(order), size, size, time.process_time() - start)
    return {"tally": tally.to_json()}


def read(job: ExtractJob, aside: SetAside, tally: Tally) -> Iterator[Documents]:
    """The documents of a job, batch by batch, counted."""
    position, start = job.number << 40, time.process_time()
    for batch in read_together(job.pieces, aside, job.recipe.text_column):
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
        self.reasons: dict[int, str] | None = None  # if a dict: why a document, by its `order`, was dropped

    def clean(self, documents: Documents) -> Documents:
        """All that a single text needs."""
        documents = self._timed("剔除乱码", documents, self._drop_broken)
        documents = self._timed("规范化", documents, self._normalise)
        documents = self._timed("过滤", documents, self._filter)
        if self.recipe.mask_private:
            documents = self._timed("遮盖隐私", documents, self._mask)
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
        return documents._replace(texts=texts)

    def _mask(self, documents: Documents) -> Documents:
        texts, counts = mask_private(documents.texts)
        self.tally.count("隐私", counts)
        return documents._replace(texts=texts)

    def _drop_broken(self, documents: Documents) -> Documents:
        """By rules for the raw text, because normalising removes what they look for; the same for all sources."""
        rules = rule_set("general", self.recipe)
        return self._drop(documents, rules.raw_verdicts(documents.texts), rules.raw_names)

    def _filter(self, documents: Documents) -> Documents:
        """By the rules of each data set's preset."""
        rules, texts = rule_set("general", self.recipe), documents.texts
        features = rules.measure(texts)
        for name in SHOWN:
            self.tally.histogram(FEATURES[name], features[:, COLUMN[name]], SHARES)
        presets = {name: preset_of(name, dict(self.recipe.presets)) for name in set(documents.sources)}
        preset = np.array([presets[name] for name in documents.sources], object)
        verdicts = np.empty(texts.count, np.int8)
        for name in set(presets.values()):
            here = preset == name
            verdicts[here] = rule_set(name, self.recipe).verdicts(texts, features[here])
        return self._drop(documents, verdicts, rules.names)

    def _strip(self, documents: Documents, lines: np.ndarray) -> Documents:
        texts, lost = without_lines(documents.texts, lines)
        self.tally.count("公共行", {"行": int(lost.sum()), "文档": int((lost > 0).sum())})
        return self._filter(documents._replace(texts=texts))  # what is left may be too little

    def _drop(self, documents: Documents, verdicts: np.ndarray, rules: list[str]) -> Documents:
        """Without the documents that a rule drops; verdicts: (n,) index of the rule, or -1."""
        for rule in np.unique(verdicts[verdicts >= 0]).tolist():
            dropped = np.flatnonzero(verdicts == rule)
            self.tally.drop(rules[rule], documents.texts, documents.sources, dropped)
            self._note(documents.order[dropped], rules[rule])
        return documents.where(verdicts < 0)

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

    def __init__(self, folder: Path, recipe: Recipe, number: int, tally: Tally) -> None:
        self.folder, self.recipe, self.number, self.tally = folder, recipe, number, tally
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
        start = time.process_time()
        number = len(self.sources)
        rng = np.random.default_rng([self.recipe.seed, self.number, number])
        slot_of = rng.integers(0, SLOTS, sum(batch.texts.count for batch in self.documents))
        folder = self.folder / f"{number:03d}"
        self.sources.append(write_shard(folder, self.documents, self.signatures, slot_of))
        if self.recipe.boilerplate:
            lines = [line_hashes(batch.texts) for batch in self.documents]
            np.save(folder / "lines.npy", np.concatenate(lines))
        self.documents, self.signatures, self.bytes = [], [], 0
        self.tally.add_seconds("写中间文件", time.process_time() - start)
