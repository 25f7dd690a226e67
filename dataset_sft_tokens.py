"""sft_data.csv as tokens: made once, kept beside the file, and read through the memory map after that.

The cache is a hidden folder of flat arrays, `.sft_data.csv.tokens-KEY`. The key is made of everything that the
tokens depend on (content of the csv, vocabulary, chat template, length, this code), so it is never out of date;
one that nothing can need any more is removed. A folder that cannot be written is no obstacle: then the tokens
live in memory alone.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from glob import escape
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from chatglm_tokenizer import chat, chat_template, hf_tokenizer, messages, templated
from chatglm_tokenizer.base import Tokenizer
from sources import sft_csv
from sources.aside import SetAside
from stage import UserError, atomic_path
from training.step_folder import checksum

BLOCK = 4096  # rows that are tokenised together
# A change here makes other tokens.
MODULES = (chat, messages, templated, chat_template, hf_tokenizer, sft_csv)
CODE = [Path(__file__), *(Path(module.__file__) for module in MODULES)]
FILES = {
    "ids": np.dtype("<i4"),  # of all samples, one behind the other
    "bears_loss": np.dtype("?"),  # of each id: whether it is to be predicted
    "lengths": np.dtype("<i4"),  # ids of each sample
    "labels": np.dtype("<i4"),  # those of them that are to be predicted
    "digests": np.dtype("<u8"),  # of each sample, from its ids
}


class Sample(NamedTuple):
    ids: np.ndarray  # (T,) int32
    bears_loss: np.ndarray  # (T,) bool: whether the id itself is to be predicted


class Samples(Sequence[Sample]):
    """Samples one behind the other in flat arrays; a selection of them shares the arrays."""

    def __init__(self, arrays: dict[str, np.ndarray], cut: int, starts: np.ndarray | None = None):
        """arrays: see FILES. cut: samples that lost turns, or the end of an answer. starts: by default, no gaps."""
        self.arrays, self.cut = arrays, cut
        self.lengths = arrays["lengths"].astype(np.int64)  # (n,)
        self.labels, self.digests = arrays["labels"], arrays["digests"]  # (n,) each
        self.starts = np.cumsum(self.lengths) - self.lengths if starts is None else starts  # (n,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int | slice) -> "Sample | Samples":
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        place = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return Sample(self.arrays["ids"][place], self.arrays["bears_loss"][place])

    def select(self, chosen: np.ndarray) -> "Samples":
        """These samples, in this order; chosen: indices or one bool for each."""
        of_each = {name: self.arrays[name][chosen] for name in ("lengths", "labels", "digests")}
        return Samples({**self.arrays, **of_each}, self.cut, self.starts[chosen])


def load_samples(
    path: Path,
    tokenizer: Tokenizer,
    max_len: int,
    aside: SetAside,
    main_first: Callable[[Callable[[], object]], None] = lambda function: function(),
) -> Samples:
    """The samples of a csv, from its cache; the main process makes that first if it is missing or damaged.

    Rows that leave no answer token within max_len are set aside. main_first: Runtime.main_first, of several
    processes. UserError for a csv that is missing or has other columns.
    """
    about = describe(path, tokenizer, max_len)
    folder = cache_path(path, about)
    main_first(lambda: make_cache(folder, about, path, tokenizer, max_len))
    cached = open_cache(folder, about, aside)
    return read_samples(path, tokenizer, max_len, aside) if cached is None else cached


def read_samples(path: Path, tokenizer: Tokenizer, max_len: int, aside: SetAside) -> Samples:
    """Tokenise every usable row; rows that leave no answer token within max_len are set aside."""
    parts = list(tokenise(path, tokenizer, max_len, aside))
    arrays = {
        name: np.concatenate([np.empty(0, dtype), *(arrays[name] for arrays, _ in parts)])
        for name, dtype in FILES.items()
    }
    return Samples(arrays, sum(cut for _, cut in parts))


def tokenise(
    path: Path, tokenizer: Tokenizer, max_len: int, aside: SetAside
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Some rows at a time: the arrays of FILES, and how many of these samples were cut."""
    ends = tokenizer.stop_ids
    rows = iter(tqdm(sft_csv.read_sft_csv(path, aside), "分词", unit="条", disable=None))
    while block := list(islice(rows, BLOCK)):
        encoded, turns = [], []
        dialogues = [to_messages(row) for row in block]
        for row, sample in zip(block, chat.encode_chats(dialogues, tokenizer, max_len), strict=True):
            if sample is None:
                aside.add(path, row["row"], f"问题太长：{max_len} 个 token 里放不下答案", row["prompt"])
            elif isinstance(sample, ValueError):
                aside.add(path, row["row"], f"无法分词：{sample}", row["prompt"])
            else:
                encoded.append(sample)
                turns.append(1 + len(row["history"]))
        if encoded:
            arrays = flat(encoded)
            yield arrays, int((~are_whole(arrays, np.array(turns), max_len, ends)).sum())


def flat(samples: Sequence[tuple[list[int], list[bool]]]) -> dict[str, np.ndarray]:
    """The arrays of FILES of samples as encode_chat gives them."""
    lengths = np.array([len(ids) for ids, _ in samples])
    starts = np.cumsum(lengths) - lengths
    ids = np.fromiter(chain.from_iterable(ids for ids, _ in samples), FILES["ids"])
    bears_loss = np.fromiter(chain.from_iterable(bears_loss for _, bears_loss in samples), bool)
    digests = [digest(part) for part in np.split(ids, starts[1:])]
    arrays = {
        "ids": ids,
        "bears_loss": bears_loss,
        "lengths": lengths,
        "labels": np.add.reduceat(bears_loss, starts, dtype=np.int64),
        "digests": np.array(digests, np.uint64),
    }
    return {name: arrays[name].astype(dtype, copy=False) for name, dtype in FILES.items()}


def are_whole(arrays: dict[str, np.ndarray], turns: np.ndarray, max_len: int, ends: list[int]) -> np.ndarray:
    """Whether each sample has an answer for each of its turns, (n,), and its last one to the end."""
    lengths, bears_loss = arrays["lengths"].astype(np.int64), arrays["bears_loss"]
    starts = np.cumsum(lengths) - lengths
    before = np.concatenate(([False], bears_loss[:-1]))
    before[starts] = False
    answers = np.add.reduceat(bears_loss & ~before, starts, dtype=np.int64)
    last = arrays["ids"][starts + lengths - 1]
    return (answers == turns) & ((lengths < max_len) | np.isin(last, ends))


def digest(ids: np.ndarray) -> int:
    """64 bits of a sample's content."""
    return int.from_bytes(hashlib.sha256(ids.tobytes()).digest()[:8], "little")


def to_messages(row: dict) -> list[chat.Message]:
    """A row of sft_data.csv as messages."""
    messages = [{"role": "system", "content": row["system"]}] if row["system"] else []
    for question, answer in [*row["history"], (row["prompt"], row["answer"])]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def split_validation(samples: Samples, fraction: float) -> tuple[Samples, Samples]:
    """Training and validation samples; a sample's own content decides, so added data moves none."""
    is_held_out = samples.digests < np.uint64(math.ceil(fraction * 2**64))
    validation, training = samples.select(is_held_out), samples.select(~is_held_out)
    return training if len(training) else validation, validation


# The cache.


def describe(path: Path, tokenizer: Tokenizer, max_len: int) -> dict[str, object]:
    """Everything that the tokens of a csv depend on."""
    if not path.is_file():
        found = "是文件夹，不是 csv" if path.is_dir() else "找不到"
        raise UserError(f"{path}：{found}；请先运行 python sft_data_process.py，或用参数指定别的路径。")
    return {
        "csv": checksum(path),
        "code": [checksum(file) for file in CODE],
        "tokenizer": tokenizer.sha256,
        "chat_template": tokenizer.chat_template,
        "template_names": tokenizer.template_names,
        "special_tokens": tokenizer.special_tokens,
        "stop_ids": tokenizer.stop_ids,
        "max_len": max_len,
    }


def cache_path(path: Path, about: dict[str, object]) -> Path:
    """A hidden folder, which no stage takes for data; atomic_path removes it when the csv is replaced."""
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    return path.with_name(f".{path.name}.tokens-{key[:16]}")


def make_cache(
    folder: Path, about: dict[str, object], path: Path, tokenizer: Tokenizer, max_len: int
) -> None:
    """Tokenise a csv into its folder, unless that is there and whole; a disk that refuses is only reported."""
    content = read_about(folder)
    if content and all(checksum(folder / name) == content["checksums"].get(name) for name in FILES):
        return
    try:
        with atomic_path(folder) as temporary:
            write_cache(temporary, about, path, tokenizer, max_len)
        remove_stale(path, about)
    except OSError as error:
        print(f"提示：{path.parent} 里存不了分词结果（{error.strerror}），下次还要重新分词。", flush=True)


def write_cache(
    folder: Path, about: dict[str, object], path: Path, tokenizer: Tokenizer, max_len: int
) -> None:
    """Tokenise a csv into a folder, a block of rows at a time."""
    folder.mkdir()
    for name in FILES:
        (folder / name).touch()
    aside, cut = SetAside(), 0
    for arrays, cut_here in tokenise(path, tokenizer, max_len, aside):
        cut += cut_here
        for name, values in arrays.items():
            with open(folder / name, "ab") as handle:
                values.tofile(handle)
    checksums = {name: checksum(folder / name) for name in FILES}
    content = {"about": about, "cut": cut, "set_aside": aside.report(), "checksums": checksums}
    (folder / "about.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read_about(folder: Path) -> dict | None:
    """What is written in a cache about it; None if there is none, or not all of it."""
    try:
        content = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        is_whole = {"about", "cut", "set_aside", "checksums"} <= content.keys()
        return content if is_whole and all((folder / name).is_file() for name in FILES) else None
    except (OSError, ValueError, AttributeError):
        return None


def open_cache(folder: Path, about: dict[str, object], aside: SetAside) -> Samples | None:
    """Memory-map the samples of a cache, and report what was set aside then; None if it is not there."""
    content = read_about(folder)
    if content is None or content["about"] != about:
        return None
    aside.merge(content["set_aside"])
    arrays = {
        name: np.memmap(folder / name, dtype, "r") if (folder / name).stat().st_size else np.empty(0, dtype)
        for name, dtype in FILES.items()
    }
    return Samples(arrays, content["cut"])


def remove_stale(path: Path, about: dict[str, object]) -> None:
    """Delete caches of a csv of other content, or of other code; those for other vocabularies stay."""
    for folder in path.parent.glob(f".{escape(path.name)}.tokens-*"):
        theirs = (read_about(folder) or {"about": {}})["about"]
        if any(theirs.get(name) != about[name] for name in ("csv", "code")):
            shutil.rmtree(folder, ignore_errors=True)
