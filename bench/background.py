"""Endless text with the statistics of Chinese: a walk through a real text that leaps between like characters.

From some place the walk copies a few characters, then goes on behind another occurrence of the last one. So
characters and pairs of characters are as frequent as in the source, words and phrases occur again and again,
and yet two documents share hardly anything long.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sources.aside import SetAside
from sources.pretrain_text import read_documents
from stage import UserError

SOURCE_CHARACTERS = 4_000_000  # enough for the walk to find hundreds of ways on from a common character
STREAMS = 4096  # walks that numpy moves on together
# Characters copied before a leap: geometric with mean 4 as a table of 256 equally likely values, at most 16.
RUNS = np.minimum(1 + np.log(1 - (np.arange(256) + 0.5) / 256) // np.log(3 / 4), 16).astype(np.int32)
SHORTEST, LONGEST = 30, 5000  # characters of a document
MEAN, SIGMA = 790, 0.9  # log-normal lengths; cutting at both ends makes the mean about 780


class Background:
    """Makes documents of given lengths, the same ones for the same source and random generator."""

    def __init__(self, source: str) -> None:
        """source: the text to imitate, at least some thousand characters."""
        self.codes = np.frombuffer(source.encode("utf-32-le"), "<u4")  # (characters,)
        # Of the last character of all it is unknown what follows, so the walk never leaps from there.
        _, kinds = np.unique(self.codes[:-1], return_inverse=True)
        self.kinds = kinds.astype(np.int32)  # number of the character at each place
        order = np.argsort(self.kinds, kind="stable")
        self.after = (order + 1).astype(np.int32)  # places behind each occurrence, sorted by character
        self.first = np.searchsorted(self.kinds[order], np.arange(self.kinds.max() + 2)).astype(np.int32)
        self.letters = self.codes[(self.codes >= 0x4E00) & (self.codes < 0xA000)]  # as frequent as in use

    def documents(self, random: np.random.Generator, lengths: np.ndarray) -> list[str]:
        """One text for each length in characters."""
        if not len(lengths):
            return []
        ends = np.cumsum(lengths)
        starts, runs = self._walk(random, int(ends[-1]))
        run_ends = np.cumsum(runs)
        places = np.repeat((starts - (run_ends - runs)).astype(np.int32), runs)
        places += np.arange(len(places), dtype=np.int32)
        text = self.codes[places].tobytes().decode("utf-32-le")
        return [text[end - length : end] for length, end in zip(lengths.tolist(), ends.tolist(), strict=True)]

    def passage(self, random: np.random.Generator, length: int) -> np.ndarray:
        """A piece of the source as code points, shorter than asked only if the source is."""
        start = random.integers(max(len(self.codes) - length, 0) + 1)
        return self.codes[start : start + length]

    def _walk(self, random: np.random.Generator, characters: int) -> tuple[np.ndarray, np.ndarray]:
        """Places and lengths of runs that hold at least so many characters together."""
        streams = min(STREAMS, characters)
        steps = int(characters / streams / (RUNS.mean() * 0.95)) + 8  # runs vary: some to spare
        runs = RUNS[random.integers(256, size=(steps, streams), dtype=np.uint8)]
        dice = random.random((steps, streams), dtype=np.float32)
        starts = np.empty((steps, streams), np.int32)
        last = len(self.kinds) - 1
        place = random.integers(last, size=streams).astype(np.int32)
        for step in range(steps):
            starts[step] = place = np.minimum(place, last - RUNS.max())
            kind = self.kinds[place + runs[step] - 1]
            first = self.first[kind]
            place = self.after[first + (dice[step] * (self.first[kind + 1] - first)).astype(np.int32)]
        return starts.T.ravel(), runs.T.ravel()


def random_lengths(random: np.random.Generator, count: int) -> np.ndarray:
    """Characters of `count` documents: log-normal as web pages and encyclopedia entries are."""
    lengths = random.lognormal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, count)
    return np.clip(lengths, SHORTEST, LONGEST).astype(np.int64)


def load_background(data: Path | None) -> Background:
    """Imitate the corpora under `data`, or without it the demo corpus."""
    texts = demo_texts() if data is None else (d.text for d in read_documents(data, SetAside()))
    parts, room = [], SOURCE_CHARACTERS
    for text in texts:
        parts.append(text[:room])
        room -= len(parts[-1])
        if room <= 0:
            break
    background = Background("\n".join(parts) + "\n" * RUNS.max())
    if len(background.letters) < 10_000:
        raise UserError(f"{data} 里的汉字不足一万，模仿不出像样的语料；请换更大的中文语料，或不填 --data。")
    return background


def demo_texts() -> Iterator[str]:
    """The clean documents of the demo corpus, its kinds in turn."""
    from demo.facts import load_facts, load_tables
    from demo.make import build_documents
    from demo.patterns import Speaker

    speaker = Speaker(load_tables())
    documents = build_documents(load_facts(list(speaker.phrasings)), speaker, seed=0, size_mb=12)
    for kind in documents.values():
        for document in kind:
            yield document.text
