"""What a worker process does in stage 1: read pieces of the corpus, tokenise them, write sorted runs."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from chatglm_tokenizer.batch_encoder import BatchEncoder
from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from data_clean.texts import Texts, from_arrow
from sources.aside import SetAside
from sources.pieces import PIECE_BYTES, Piece, grouped, read_batches
from sources.published_tokens import PublishedReader, TokenPiece
from sources.token_runs import ENTRY, RunWriter, gather, starts_of
from sources.validation import text_hashes
from sources.weights import draw_copies


class Options(NamedTuple):
    """All settings that the runs depend on."""

    tokenizer: Path
    text_column: str | None
    weights: dict[str, float]  # how often documents of a source are trained on, where that is not once
    seed: int | None  # of the shuffle; None to keep the order of the corpus
    validation: int  # documents with a lower hash are written even if their source is sampled without them


class Task(NamedTuple):
    """Neighbouring pieces of the corpus, about PIECE_BYTES together."""

    number: int
    pieces: list[Piece | TokenPiece]
    options: Options
    compiled: bool  # whether the compiled encoder is used; its result is the same

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


class Documents(NamedTuple):
    """Some documents of a task, one behind the other."""

    texts: Texts
    sources: np.ndarray  # (n,) positions in the task's list of names
    ids: np.ndarray | None = None  # of published documents
    counts: np.ndarray | None = None  # (n,) ids of each


class SourceTally:
    """The names of a task's sources and what was read of each, before any is sampled or repeated."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}  # name -> code
        self.counts = np.zeros((0, 2), np.int64)  # documents and characters by code

    def codes(self, names: pa.Array) -> np.ndarray:
        """The codes of names, (n,) int64; a new name gets the next code."""
        names = names.dictionary_encode()
        codes = [self.names.setdefault(name, len(self.names)) for name in names.dictionary.to_pylist()]
        return np.array(codes, np.int64)[names.indices.to_numpy()]

    def count(self, entries: np.ndarray) -> None:
        before, self.counts = self.counts, np.zeros((len(self.names), 2), np.int64)
        self.counts[: len(before)] = before
        np.add.at(self.counts[:, 0], entries["source"], 1)
        np.add.at(self.counts[:, 1], entries["source"], entries["characters"])

    def report(self) -> dict[str, dict[str, int]]:
        """What was read by name, in the order of the codes."""
        rows = zip(self.names, self.counts.tolist(), strict=True)
        return {
            name: {"documents": documents, "characters": characters} for name, (documents, characters) in rows
        }


def make_tasks(pieces: Sequence[Piece | TokenPiece], options: Options, compiled: bool) -> list[Task]:
    """A task for every group of pieces."""
    groups = grouped(pieces, PIECE_BYTES)
    return [Task(number, group, options, compiled) for number, group in enumerate(groups)]


def tokenise(task: Task, folder: Path) -> dict[str, Any]:
    """Write the documents of a task in sorted runs; returns how many runs, what was read, what was set aside."""
    options, encoder = task.options, load_encoder(task.options.tokenizer, task.compiled)
    writer = RunWriter(folder, task.number, options.seed)
    aside, sources, before = SetAside(), SourceTally(), 0
    for documents in read_documents(task, aside, sources):
        entries = describe(documents)
        sources.count(entries)
        weights = np.array([options.weights.get(name, 1.0) for name in sources.names])[documents.sources]
        copies = draw_copies(entries["hash"], weights)
        wanted = np.flatnonzero((copies > 0) | (entries["hash"] < options.validation))
        ids, counts = ids_of(documents, wanted, encoder)
        entries["tokens"][wanted] = counts
        writer.add(entries[wanted], before + wanted, copies[wanted], ids)
        before += len(entries)
    return {"runs": writer.close(), "sources": sources.report(), "set_aside": aside.report()}


def read_documents(task: Task, aside: SetAside, sources: SourceTally) -> Iterator[Documents]:
    """The documents of a task, in order; what has no usable text goes to `aside`."""
    for piece in task.pieces:
        if isinstance(piece, TokenPiece):
            for texts, ids, counts in load_published_reader(task.options.tokenizer).read(piece):
                codes = sources.codes(pa.array([piece.source]))
                yield Documents(texts, np.repeat(codes, texts.count), ids, counts)
        else:
            for batch in read_batches(piece, aside, task.options.text_column):
                yield Documents(from_arrow(batch.texts), sources.codes(batch.sources))


def describe(documents: Documents) -> np.ndarray:
    """What is known of documents before they are tokenised, (n,) ENTRY."""
    entries = np.zeros(documents.texts.count, ENTRY)
    entries["hash"] = text_hashes(documents.texts)
    entries["characters"] = pc.utf8_length(documents.texts.to_arrow()).to_numpy()
    entries["bytes"] = documents.texts.sizes
    entries["source"] = documents.sources
    return entries


def ids_of(documents: Documents, wanted: np.ndarray, encoder: BatchEncoder) -> tuple[np.ndarray, np.ndarray]:
    """The ids of the documents at these positions, one behind the other, and how many each has."""
    if documents.ids is None:
        all_wanted = len(wanted) == documents.texts.count
        return encoder.encode(documents.texts if all_wanted else documents.texts.take(wanted))
    ids = gather(documents.ids, starts_of(documents.counts), wanted)
    return ids.astype(encoder.dtype), documents.counts[wanted]


@lru_cache(maxsize=1)
def load_encoder(tokenizer: Path, compiled: bool) -> BatchEncoder:
    """The vocabulary of this process. Without compiled code the corpus is small, and this the only process."""
    return BatchEncoder(load_tokenizer(tokenizer), compiled, threads=1 if compiled else -1)


@lru_cache(maxsize=1)
def load_published_reader(tokenizer: Path) -> PublishedReader:
    return PublishedReader(ChatGLMTokenizer(tokenizer))
