"""Decontamination: which documents contain an item of a benchmark, so that its scores stay worth something.

Others look for one long n-gram: GPT-3 for 13 words (https://arxiv.org/abs/2005.14165, appendix C), GPT-4 for
50 characters (https://arxiv.org/abs/2303.08774, appendix C). Neither suits Chinese examinations, where half
of the questions have 20 characters or fewer and many quote a law or a classic that is good text to train on.
As in later work (Qwen2.5, https://arxiv.org/abs/2412.15115; https://github.com/allenai/decon) a share of the
item has to be found, and here its end as well: that is where a question asks, and no source that it quotes
does. The figures behind the constants are in docs/LOG.md.
"""

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_clean.keys import keys_of
from data_clean.ngram_index import build_index, empty_found, scan
from data_clean.texts import from_strings
from sources.aside import SetAside
from sources.containers import is_csv, read_rows
from sources.files import list_files
from sources.instructions import Unusable, to_messages
from stage import UserError

NGRAM = 8  # characters of the comparison key
EXCERPT = 120  # characters of a document shown around an item
LETTERS = string.ascii_uppercase


class Item(NamedTuple):
    """A question of a benchmark with its options, if it has any. Answers do not count: facts may be learnt."""

    file: Path
    row: int
    question: str
    options: tuple[str, ...] = ()

    def forms(self) -> list[str]:
        """How a document may hold it: the question alone; with options as examinations print them; as a table."""
        if not self.options:
            return [self.question]
        lettered = [f"{letter} {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        return ["\n".join([self.question, *options]) for options in ([], lettered, self.options)]


class Benchmarks:
    """The items of some benchmark files, found in documents by `hits`. Can be pickled."""

    def __init__(self, items: Sequence[Item], ngram: int = NGRAM) -> None:
        """ngram: characters of the comparison key; shorter finds more edited copies, and more laws and classics."""
        self.items = without_repeats(items)
        self.repeated = len(items) - len(self.items)
        forms = [item.forms() for item in self.items]
        owner = np.repeat(np.arange(len(forms)), [len(f) for f in forms])
        codes, starts = keys_of(from_strings([form for item_forms in forms for form in item_forms]))
        sizes = np.diff(starts)
        is_question = np.append(True, owner[1:] != owner[:-1])[: len(owner)]
        self.index = build_index(codes, starts, owner, sizes[is_question][owner], ngram)

    @classmethod
    def read(cls, paths: Sequence[Path], aside: SetAside, ngram: int = NGRAM) -> "Benchmarks":
        """Read files and folders of questions; unusable rows go to `aside`, no usable row is a UserError."""
        items = [item for path in paths for file in list_files(path, ()) for item in read_items(file, aside)]
        if not items:
            names = "、".join(map(str, paths))
            raise UserError(
                f"{names} 里没有可用的题目；应有 question 和选项 A、B、C、D（CSV 或 JSON）等字段。"
            )
        return cls(items, ngram)

    def hits(self, keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """The item that each document contains, (n,) int32; -1 where there is none.

        keys: (characters,) uint32, the key of document i is keys[starts[i] : starts[i + 1]].
        """
        return self._scan(keys, starts)[0]

    def _scan(self, keys: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        items = np.full(len(starts) - 1, -1, np.int32)
        begins = np.zeros(len(starts) - 1, np.int64)
        scan(keys, starts, self.index, empty_found(self.index), items, begins)
        return items, begins

    def describe(self, item: int) -> dict[str, Any]:
        """Where an item comes from, and its question."""
        file, row, question, _ = self.items[item]
        return {"file": str(file), "row": row, "question": question}

    def excerpt(self, text: str) -> str:
        """The part of a document that holds the item it was removed for; its beginning if it holds none."""
        codes, starts = keys_of(from_strings(list(text)))
        items, begins = self._scan(codes, np.array([0, len(codes)]))
        first = int(np.searchsorted(starts, begins[0], side="right")) - 1 if items[0] >= 0 else 0
        return text[max(first, 0) :][:EXCERPT]

    def report(self) -> dict[str, Any]:
        """How many items there are in which file, how many are looked for, and how."""
        is_used = np.zeros(len(self.items), bool)
        is_used[self.index.item[self.index.text]] = True
        return {
            "files": dict(Counter(str(item.file) for item in self.items)),
            "items": len(self.items),
            "repeated": self.repeated,
            "too_short": int(np.count_nonzero(~is_used)),
            "ngram": self.index.ngram,
            "ngrams": len(self.index.hashes),
        }


def without_repeats(items: Sequence[Item]) -> list[Item]:
    """The items that differ: a file may be given twice, and the same n-grams in two items would say less."""
    codes, starts = keys_of(from_strings(["\n".join([item.question, *item.options]) for item in items]))
    first: dict[bytes, Item] = {}
    for item, start, end in zip(items, starts[:-1], starts[1:], strict=True):
        first.setdefault(codes[start:end].tobytes(), item)
    return list(first.values())


def read_items(file: Path, aside: SetAside) -> Iterator[Item]:
    """The questions of a benchmark file: CSV, JSON, JSON lines, parquet, or lines of text."""
    for number, row in read_rows(file, aside, as_csv=is_csv(file)):
        try:
            yield Item(file, number, *question_and_options(row))
        except Unusable as reason:
            aside.add(file, number, f"不是题目：{reason}", row)


def question_and_options(row: dict[str, Any] | str) -> tuple[str, tuple[str, ...]]:
    """The question of a row and its options, in the order printed.

    C-Eval and CMMLU have columns A, B, C, D, CMB `option: {A: …}`, others `options` or `choices` (a list, or
    {text: […]}); our own evaluation and instruction files have question/answer, prompt/answer and so on.
    """
    if isinstance(row, str):
        return row, ()
    fields = {name.lower(): value for name, value in row.items() if isinstance(name, str)}
    if not isinstance(fields.get("question"), str):
        return to_messages(row)["messages"][-2]["content"], ()
    if not fields["question"].strip():
        raise Unusable("字段 question 为空")
    passage = fields.get("passage")
    question = f"{passage}\n{fields['question']}" if isinstance(passage, str) else fields["question"]
    return question, tuple(text for option in options_of(fields) if (text := str(option).strip()))


def options_of(fields: dict[str, Any]) -> list[Any]:
    """The options of a row, none for an open question; names of fields in lower case."""
    options = next((fields[name] for name in ("option", "options", "choices") if fields.get(name)), None)
    if isinstance(options, dict):
        options = options.get("text") or list(options.values())
    if isinstance(options, list):
        return options
    return [fields[letter.lower()] for letter in LETTERS if fields.get(letter.lower()) is not None]
