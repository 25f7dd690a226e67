"""Token files: flat ids without a header, `<eos>` after every document, a JSON sidecar beside them."""

import hashlib
import heapq
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sources.files import is_sidecar, stem, walk
from sources.pretrain_text import Document
from stage import DEMO_DIR, UserError, atomic_path

if TYPE_CHECKING:
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

MERGE_TOKENS = 1 << 24  # tokens copied at a time when merging


class Encoded(NamedTuple):
    """A tokenised document; ordered by the hash of its text, which decides about validation."""

    rank: int
    ids: np.ndarray
    source: str
    characters: int
    bytes: int


class TokenFile:
    """A token file while it is being written, and the counts for its sidecar."""

    def __init__(self, path: Path, temporary: Path, stack: ExitStack, tokenizer: "ChatGLMTokenizer") -> None:
        self.path = path
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
        self.eos = tokenizer.special_tokens["<eos>"]
        self.handle = stack.enter_context(open(temporary, "wb"))  # noqa: SIM115 (the stack closes it)
        self.tokens = self.documents = self.characters = self.bytes = self.text_tokens = 0
        self.sources: dict[str, dict[str, int]] = {}

    def encoded(self, document: Document, ids: list[int]) -> Encoded:
        """A document's ids with `<eos>` behind them, in the type of this file."""
        data = document.text.encode()
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        array = np.array([*ids, self.eos], dtype=self.dtype)
        return Encoded(rank, array, document.source, len(document.text), len(data))

    def write(self, document: Encoded) -> None:
        self.append(document.ids, 1, document.source)
        self.characters += document.characters
        self.bytes += document.bytes
        self.text_tokens += len(document.ids)

    def append(self, ids: np.ndarray, documents: int, source: str) -> None:
        """Append ids that hold so many whole documents."""
        self.handle.write(ids.astype(self.dtype, copy=False).tobytes())
        self.tokens += len(ids)
        self.documents += documents
        counts = self.sources.setdefault(source, {"documents": 0, "tokens": 0})
        counts["documents"] += documents
        counts["tokens"] += len(ids)

    def sidecar(self, tokenizer: "ChatGLMTokenizer") -> dict[str, Any]:
        """What the JSON beside the file says; characters and bytes cover `text_tokens` of the tokens."""
        return {
            "dtype": self.dtype.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "characters": self.characters,
            "bytes": self.bytes,
            "text_tokens": self.text_tokens,
            "tokenizer": {
                "path": str(tokenizer.vocab_file.resolve()),
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
            },
            "sources": self.sources,
        }


class Validation:
    """Chooses the validation documents as a stream passes: those with the least hashes.

    Chosen are the documents whose hash falls in the given fraction, but at least `least` (though never
    more than a tenth of all), and at most `most_tokens`. Because only the hash of the content counts, a
    document that once was trained on does not become a validation document when the corpus grows (the
    tenth is the one exception: it only holds from ten times `least` documents on).
    """

    def __init__(self, fraction: float, least: int, most_tokens: int) -> None:
        self.limit = int(fraction * 2**64)
        self.least, self.most_tokens = least, most_tokens
        self.heap: list[tuple[int, int, Encoded]] = []  # the greatest hash on top
        self.seen = self.tokens = 0

    def offer(self, document: Encoded) -> list[Encoded]:
        """Consider a document; returns those that are now certainly for training."""
        self.seen += 1
        heapq.heappush(self.heap, (-document.rank, -self.seen, document))
        self.tokens += len(document.ids)
        leftover = []
        while self._has_too_many():
            leftover.append(heapq.heappop(self.heap)[2])
            self.tokens -= len(leftover[-1].ids)
        return leftover

    def settle(self) -> tuple[list[Encoded], list[Encoded]]:
        """The validation documents, and the held-back ones that go to training after all."""
        documents = [
            document for _, _, document in sorted(self.heap, key=lambda entry: (-entry[0], -entry[1]))
        ]
        # A single document trains; of a handful at least one validates.
        least = min(self.least, max(self.seen // 10, 1)) if self.seen > 1 else 0
        count = max(least, sum(document.rank < self.limit for document in documents))
        count = min(count, self.seen - 1)
        return documents[:count], documents[count:]

    def _has_too_many(self) -> bool:
        too_long = self.tokens > self.most_tokens and len(self.heap) > 1
        return too_long or (len(self.heap) > self.least and -self.heap[0][0] >= self.limit)


def open_token_files(
    stack: ExitStack, paths: tuple[Path, ...], tokenizer: "ChatGLMTokenizer"
) -> list[TokenFile]:
    """Open token files that appear under their names only when the stack closes without an error."""
    temporaries = [stack.enter_context(atomic_path(path)) for path in paths]
    return [
        TokenFile(path, temporary, stack, tokenizer)
        for path, temporary in zip(paths, temporaries, strict=True)
    ]


def published_bins(folder: Path, ours: set[Path]) -> list[Path]:
    """Token files brought from elsewhere: any .bin below the folder that this project did not write."""
    return [
        path
        for path in sorted(walk(folder))
        if path.suffix == ".bin"
        and path not in ours
        and not path.is_relative_to(DEMO_DIR)
        and not path.name.startswith(".")
        and not is_sidecar(path.with_suffix(".json"))  # our own have one
    ]


def merge(
    path: Path,
    tokenizer: "ChatGLMTokenizer",
    train: TokenFile,
    valid: TokenFile,
    valid_fraction: float,
    valid_tokens: int,
) -> None:
    """Append a published uint16 token file, its first documents to validation, without tokenising again."""
    ids = _published(path, tokenizer, train)
    source = stem(path)
    wanted = max(min(int(len(ids) * valid_fraction), valid_tokens - valid.tokens), 0)
    # Only whole documents validate: cut behind the last <eos> of the part that was aimed at.
    ends = np.flatnonzero(ids[:wanted] == train.eos)
    cut = int(ends[-1]) + 1 if len(ends) else 0
    for file, part in ((valid, ids[:cut]), (train, ids[cut:])):
        for start in tqdm(range(0, len(part), MERGE_TOKENS), desc=file.path.name, disable=None):
            chunk = part[start : start + MERGE_TOKENS]
            _check_ids(chunk, path, tokenizer)
            file.append(chunk, int(np.count_nonzero(chunk == train.eos)), source)
    if len(ids) and ids[-1] != train.eos:  # the next document must not run on
        train.append(np.array([train.eos]), 1, source)


def _published(path: Path, tokenizer: "ChatGLMTokenizer", train: TokenFile) -> np.ndarray:
    """The ids of a published token file, memory-mapped, after the checks that need no reading."""
    from chatglm_tokenizer.tokenization_chatglm import CHATGLM2_SHA256

    if not path.is_file():
        raise UserError(f"找不到 {path}；请检查 --bin 的路径。")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} 是空文件；请重新下载，或把它移出 data/。")
    if size % 2:
        raise UserError(f"{path} 有 {size:,} 字节，不是偶数，不是完整的 uint16 token 文件；请重新下载。")
    if tokenizer.sha256 != CHATGLM2_SHA256:
        raise UserError(
            f"{path} 是用 ChatGLM2 词表分的词，而 --tokenizer 选的是另一个词表（{tokenizer.vocab_file}），不能混用；"
            "请改用 ChatGLM2 词表（python chatglm_tokenizer/download.py），或加 --no_find_bin 不并入它。"
        )
    free = shutil.disk_usage(train.path.parent).free
    if free < size // 2 * train.dtype.itemsize:
        raise UserError(
            f"磁盘剩余 {free / 1e9:.1f} GB，放不下 {path}（{size / 1e9:.1f} GB）的副本；"
            "请加 --no_find_bin，预训练时直接读它：python pretrain.py --data 甲.bin 乙.bin"
        )
    return np.memmap(path, dtype="<u2", mode="r")


def _check_ids(ids: np.ndarray, path: Path, tokenizer: "ChatGLMTokenizer") -> None:
    highest = int(ids.max(initial=0))
    if highest >= tokenizer.vocab_size:
        raise UserError(
            f"{path} 含 token {highest}，超出词表大小 {tokenizer.vocab_size:,}；"
            "它不是 ChatGLM2 词表的 uint16 token 文件。"
        )
