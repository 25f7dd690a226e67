"""The steps of cleaning as blocks of datatrove, whose executors run them on many machines (see on_datatrove.py).

The first pipeline is made of datatrove's own kinds of blocks: `PieceReader`, `CleaningFilter` and `ShardBlock` hand
on documents, and any filter of datatrove fits between them. What they compute they compute in batches, by the
functions of steps.py, and they leave it in a work folder (workers.py) where clear.py would. So do the functions at
the end of this file, each of which a `Task` runs as a pipeline of its own. The result is therefore that of clear.py.

datatrove's own MinHash blocks are not used: their n-grams are made of words, they join documents that merely lie
beside each other in a bucket, they verify nothing, and of duplicates they keep any one.
"""

import json
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseReader
from datatrove.pipeline.writers.jsonl import JsonlWriter
from datatrove.utils.stats import PipelineStats

from data_clean import clear
from data_clean.boilerplate import frequent_lines
from data_clean.duplicates import apart, flatten, join_by_minhash, join_by_simhash, join_equal, unite
from data_clean.shards import Corpus, Documents, Shard
from data_clean.signatures import Settings
from data_clean.steps import KEEP, PART, Cleaner, PartJob, ScoreJob, ShardWriter, StripJob, read, strip_lines
from data_clean.tally import Tally
from data_clean.texts import from_strings
from sources.aside import SetAside
from workers import KEY, RESULT, WorkFolder, finish

BATCH = 1000  # documents that are cleaned at a time


class Plan:
    """What all blocks know; in one object without a JSON form, as datatrove logs the attributes of blocks."""

    def __init__(self, cfg: clear.Config, jobs: list[clear.ExtractJob], work: WorkFolder) -> None:
        self.cfg, self.jobs, self.work = cfg, jobs, work
        self.opened: dict[
            int, tuple[SetAside, Cleaner]
        ] = {}  # the accounts of the pieces that are being read

    def accounts(self, piece: int) -> tuple[SetAside, Cleaner]:
        """What could not be read of a piece, and what cleans it and counts; shared by the blocks of a pipeline."""
        if piece not in self.opened:
            self.opened[piece] = (SetAside(), Cleaner(self.jobs[piece].recipe))
            self.opened[piece][1].reasons = {}
        return self.opened[piece]

    def results(self, step: str) -> list[dict[str, Any]]:
        """What the tasks of a step have returned."""
        files = sorted(self.work.path.glob(f"{step}/*/{RESULT}"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def keep(self) -> tuple[Path, int]:
        """Which documents are written, and how many files they go to."""
        step = "keep" if self.cfg.model else "choose"
        return self.work.folder(step, 0) / KEEP, self.results(step)[0]["parts"]

    def corpus(self) -> Corpus:
        """All documents, in the order in which clear.py numbers them."""
        step = "strip" if self.cfg.boilerplate else "extract"
        return Corpus([shard for number in range(len(self.jobs)) for shard in self.shards(step, number)])

    def shards(self, step: str, number: int) -> list[Shard]:
        """The shards that a task has written; reference documents are not stripped."""
        is_reference = self.jobs[number].is_reference
        folder = self.work.folder("extract" if is_reference else step, number)
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return [Shard(folder / f"{i:03d}", names, is_reference) for i, names in enumerate(result["shards"])]


class PieceReader(BaseReader):
    """The documents of every world_size-th piece, in any format of sources/."""

    name = "📖 语料"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for job in self.plan.jobs[rank::world_size]:
            aside, cleaner = self.plan.accounts(job.number)
            for batch, documents in enumerate(read(job, aside, cleaner.tally)):
                self.stat_update("documents", value=documents.texts.count, unit="batch")
                columns = documents.texts.texts(), documents.sources.tolist(), documents.order.tolist()
                for text, source, order in zip(*columns, strict=True):
                    where = {"source": source, "piece": job.number, "batch": batch}
                    yield Document(text, str(order), metadata=where)


class CleaningFilter(BaseFilter):
    """Normalises texts and drops those that break a rule or hold a benchmark's question."""

    name = "🧹 清洗"

    def __init__(self, plan: Plan) -> None:
        dropped = JsonlWriter(str(plan.work.path / "dropped"), "${rank}.jsonl.zst", compression="zstd")
        super().__init__(dropped, batch_size=BATCH)
        self.plan = plan

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return self.filter_batch([doc])[0]

    def filter_batch(self, batch: list[Document]) -> list[bool | tuple[bool, str]]:
        results = []
        for piece, documents in groupby(batch, key=lambda document: document.metadata["piece"]):
            if self.plan.jobs[piece].is_reference:
                results += [True for _ in documents]
            else:
                results += self._clean(list(documents), self.plan.accounts(piece)[1])
        return results

    def _clean(self, batch: list[Document], cleaner: Cleaner) -> list[bool | tuple[bool, str]]:
        kept = cleaner.clean(to_columns(batch))
        texts = dict(zip(kept.order.tolist(), kept.texts.texts(), strict=True))
        results: list[bool | tuple[bool, str]] = []
        for document in batch:
            text = texts.get(int(document.id))
            if text is None:
                results.append((False, cleaner.reasons.pop(int(document.id), "清洗")))
            else:
                document.text = text
                results.append(True)
        return results


class ShardBlock(PipelineStep):
    """Signs the documents of each piece and writes them as shards."""

    type, name = "💽 - WRITER", "✍️ 签名"

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        written = set()
        for piece, documents in groupby(data, key=lambda document: document.metadata["piece"]):
            finish(self._write, (piece, documents), self.plan.work.folder("extract", piece))
            written.add(piece)
        for job in self.plan.jobs[rank::world_size]:
            if job.number not in written:  # no document of it is left
                finish(self._write, (job.number, []), self.plan.work.folder("extract", job.number))

    def _write(self, task: tuple[int, Any], folder: Path) -> dict[str, Any]:
        piece, documents = task
        job, (aside, cleaner) = self.plan.jobs[piece], self.plan.accounts(piece)
        writer = ShardWriter(folder, job.recipe, piece, cleaner.tally)
        # The batches of the reader again: where a shard ends must not depend on how the filters batch.
        for _, batch in groupby(documents, key=lambda document: document.metadata["batch"]):
            columns = to_columns(list(batch))
            with self.track_time("batch"):
                is_final = job.is_reference or not job.recipe.boilerplate
                writer.add(columns, cleaner.sign(columns) if is_final else ())
        writer.flush()
        del self.plan.opened[piece]
        return {"tally": cleaner.tally.to_json(), "aside": aside.report(), "shards": writer.sources}


def to_columns(batch: list[Document]) -> Documents:
    """Documents of datatrove as ours."""
    sources = np.array([document.metadata["source"] for document in batch], object)
    order = np.array([int(document.id) for document in batch], np.uint64)
    return Documents(from_strings([document.text for document in batch]), sources, order)


class Work(NamedTuple):
    """One of `tasks` equal tasks of a step."""

    plan: Plan
    number: int
    tasks: int


class Task(PipelineStep):
    """Runs a function (work, folder) -> result that leaves its files in a folder of its own."""

    type = "🧱 - TASK"

    def __init__(self, plan: Plan, step: str, function: Callable[[Work, Path], dict[str, Any]]) -> None:
        self.name = step
        super().__init__()
        self.plan, self.step, self.function = plan, step, function

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time("task"):
            finish(self.function, Work(self.plan, rank, world_size), self.plan.work.folder(self.step, rank))


class Share(PipelineStep):
    """Does every world_size-th of some jobs, whose number is only known when it runs, as clear.py would."""

    type = "🧱 - TASK"

    def __init__(
        self, plan: Plan, step: str, jobs: Callable[[Plan], list[Any]], function: Callable[[Any, Path], Any]
    ) -> None:
        self.name = step
        super().__init__()
        self.plan, self.step, self.jobs, self.function = plan, step, jobs, function

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        for number, job in list(enumerate(self.jobs(self.plan)))[rank::world_size]:
            with self.track_time("job"):
                finish(self.function, job, self.plan.work.folder(self.step, number))


def find_lines(work: Work, folder: Path) -> dict[str, Any]:
    """The lines that many documents share; one task."""
    plan = work.plan
    own = [number for number, job in enumerate(plan.jobs) if not job.is_reference]
    shards = [shard for number in own for shard in plan.shards("extract", number)]
    lines = frequent_lines(shards, plan.cfg.boilerplate)
    np.save(folder / "lines.npy", lines)
    return {"lines": len(lines)}


def strip_piece(work: Work, folder: Path) -> dict[str, Any]:
    """Take these lines out of the documents of a piece; a task for every piece."""
    plan, names, tally = work.plan, [], Tally()
    if plan.jobs[work.number].is_reference:
        return {"tally": tally.to_json(), "shards": []}
    for number, shard in enumerate(plan.shards("extract", work.number)):
        lines = plan.work.folder("lines", 0) / "lines.npy"
        result = strip_lines(StripJob(shard, plan.jobs[work.number].recipe, lines, number), folder)
        names += result["shards"]
        tally.merge(result["tally"])
    return {"tally": tally.to_json(), "shards": names}


def find_equal(work: Work, folder: Path) -> dict[str, Any]:
    """Which documents are still to be compared, as no equal one comes before them; one task."""
    corpus = work.plan.corpus()
    alive = join_equal(corpus, apart(corpus))
    np.save(folder / "alive.npy", alive)
    return {"documents": len(corpus), "different": int(alive.sum())}


def find_similar(work: Work, folder: Path) -> dict[str, Any]:
    """Verified near duplicates: MinHash task k looks at band k % bands and one share of its keys.

    SimHash takes one task.
    """
    corpus, settings = work.plan.corpus(), work.plan.cfg.duplicates
    alive, parent = np.load(work.plan.work.folder("equal", 0) / "alive.npy"), apart(corpus)
    if settings.method == "minhash":
        share, band = divmod(work.number, settings.bands)
        keep_share(corpus, alive, band, share, work.tasks // settings.bands)
        join_by_minhash(corpus, parent, alive, settings, [band])
    elif settings.method == "simhash":
        join_by_simhash(corpus, parent, alive, settings)
    root = flatten(parent)
    joined = np.flatnonzero(root != np.arange(len(root)))
    np.save(folder / "joined.npy", np.stack([joined, root[joined]]))
    return {"joined": len(joined)}


def keep_share(corpus: Corpus, alive: np.ndarray, band: int, share: int, shares: int) -> None:
    """Of the documents leave only those whose key of this band falls to one of several equal shares."""
    for shard, first in zip(corpus.shards, corpus.firsts, strict=False):
        keys = shard.column("bands")[band] >> np.uint64(32)  # `buckets` divides by the low bits
        alive[first : first + shard.count] &= keys % np.uint64(shares) == share


def choose_kept(work: Work, folder: Path) -> dict[str, Any]:
    """Join to clusters what all tasks have found, and choose of each what stays; one task."""
    plan, tally = work.plan, Tally()

    def join(corpus: Corpus, parent: np.ndarray, alive: np.ndarray, settings: Settings) -> None:
        for file in sorted(plan.work.path.glob("similar/*/joined.npy")):
            unite(parent, *np.load(file))

    corpus = plan.corpus()
    keep = clear.without_duplicates(plan.cfg, corpus, tally, join)
    return {"tally": tally.to_json(), "parts": save_keep(plan, corpus, keep, folder)}


def save_keep(plan: Plan, corpus: Corpus, keep: np.ndarray, folder: Path) -> int:
    """Write which documents stay, and return how many files they go to."""
    np.save(folder / KEEP, keep)
    return clear.count_parts(plan.cfg, corpus, keep)[1] if keep.any() else 0


def score_jobs(plan: Plan) -> list[ScoreJob]:
    return clear.score_jobs(plan.cfg, plan.corpus(), plan.work.folder("choose", 0) / KEEP)


def join_keep(work: Work, folder: Path) -> dict[str, Any]:
    """Bring together what the model lets pass; one task."""
    plan, corpus = work.plan, work.plan.corpus()
    parts = [np.load(plan.work.folder("score", number) / KEEP) for number in range(len(corpus.shards))]
    keep = np.concatenate([np.empty(0, bool), *parts])
    return {"tally": Tally().to_json(), "parts": save_keep(plan, corpus, keep, folder)}


def part_jobs(plan: Plan) -> list[PartJob]:
    keep, parts = plan.keep()
    shards = plan.corpus().shards
    return [PartJob(number, parts, shards, keep, plan.cfg.seed) for number in range(parts)]


def publish(work: Work, folder: Path) -> dict[str, Any]:
    """Write the report, and give everything its final name; one task."""
    plan, tally, aside = work.plan, Tally(), SetAside()
    report = clear.begin_report(plan.cfg, aside)
    for result in plan.results("extract"):
        tally.merge(result["tally"])
        aside.merge(result["aside"])
    tally.step("读取", len(aside), 0, 0, 0, 0)  # rows that could not be used
    for step in ("strip", "choose", "score", "write"):
        for result in plan.results(step):
            tally.merge(result["tally"])
    parts = [plan.work.folder("write", number) / PART for number in range(plan.keep()[1])]
    seconds = time.time() - (plan.work.path / KEY).stat().st_mtime  # since the work began
    clear.finish_report(plan.cfg, report, parts, tally, aside, seconds)
    return {"rows": tally.kept_rows}


class LocalExecutor(LocalPipelineExecutor):
    """Keeps the log of tasks in files; on the screen are only errors, and what is done."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        return super()._run_for_rank(rank, local_rank + 1, node_rank)  # datatrove shows that of local rank 0
