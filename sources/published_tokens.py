"""Published token files (headerless uint16 ids of ChatGLM2's vocabulary) as pieces of a corpus."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from chatglm_tokenizer.batch_encoder import token_dtype
from data_clean.texts import Texts
from sources.files import is_sidecar, stem, walk
from stage import DEMO_DIR, UserError

if TYPE_CHECKING:
    from chatglm_tokenizer.base import Tokenizer
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

DTYPE = np.dtype("<u2")
PIECE_TOKENS = 32 << 20  # about what a worker reads at a time
BATCH_TOKENS = 2 << 20
LONGEST_DOCUMENT = 256 << 20  # tokens; a file without <eos> for so long holds no documents
SEARCHED = 1 << 20  # tokens looked at together for an <eos>


class TokenPiece(NamedTuple):
    """Whole documents of a published token file."""

    file: Path
    source: str
    start: int  # first token
    end: int  # behind the last one
    size: int  # bytes


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


def split_published(paths: Sequence[Path], tokenizer: "Tokenizer", out: Path) -> list[TokenPiece]:
    """The pieces of published token files, in order; UserError for files that cannot be merged.

    out: the file that they are merged into; its folder exists.
    """
    for path in paths:
        check_published(path, tokenizer)
    # Twice: once shuffled in parts, once in the token file.
    needed = (
        2 * sum(path.stat().st_size for path in paths) // DTYPE.itemsize * token_dtype(tokenizer).itemsize
    )
    free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise UserError(
            f"磁盘剩余 {free / 1e9:.1f} GB，并入 {'、'.join(map(str, paths))} 需要 {needed / 1e9:.1f} GB；"
            "请加 --no_find_bin，预训练时直接读它：python pretrain.py --data 甲.bin 乙.bin"
        )
    return [piece for path in paths for piece in _split(path, tokenizer.special_tokens["<eos>"])]


def check_published(path: Path, tokenizer: "Tokenizer") -> None:
    """Raise UserError for what can be told without reading the ids."""
    from chatglm_tokenizer.tokenization_chatglm import CHATGLM2_SHA256

    if not path.is_file():
        raise UserError(f"找不到 {path}；请检查 --bin 的路径。")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} 是空文件；请重新下载，或把它移出 data/。")
    if size % DTYPE.itemsize:
        raise UserError(f"{path} 有 {size:,} 字节，不是偶数，不是完整的 uint16 token 文件；请重新下载。")
    if tokenizer.sha256 != CHATGLM2_SHA256:
        raise UserError(
            f"{path} 是用 ChatGLM2 词表分的词，而 --tokenizer 选的是另一个词表（{tokenizer.vocab_file}），不能混用；"
            "请改用 ChatGLM2 词表（python chatglm_tokenizer/download.py），或加 --no_find_bin 不并入它。"
        )


def _split(path: Path, eos: int) -> list[TokenPiece]:
    ids = np.memmap(path, DTYPE, "r")
    borders = [0]
    while borders[-1] < len(ids):
        borders.append(_next_document(ids, borders[-1] + PIECE_TOKENS, eos))
        if borders[-1] - borders[-2] > PIECE_TOKENS + LONGEST_DOCUMENT:
            raise UserError(
                f"{path} 有一篇文档超过 {LONGEST_DOCUMENT:,} 个 token：它的文档不是以 <eos>（id {eos}）结尾的，"
                "不是 ChatGLM2 词表的 token 文件。"
            )
    return [
        TokenPiece(path, stem(path), start, end, (end - start) * DTYPE.itemsize)
        for start, end in pairwise(borders)
    ]


def _next_document(ids: np.ndarray, position: int, eos: int) -> int:
    """Where the first document begins at or behind a position; the end of the file if none does."""
    for start in range(position - 1, len(ids), SEARCHED):
        ends = np.flatnonzero(ids[start : start + SEARCHED] == eos)
        if len(ends):
            return start + int(ends[0]) + 1
    return len(ids)


class PublishedReader:
    """Reads pieces of published token files; the texts of their documents come from a table, not the tokenizer."""

    def __init__(self, tokenizer: "ChatGLMTokenizer") -> None:
        self.vocab_size, self.eos = tokenizer.vocab_size, tokenizer.special_tokens["<eos>"]
        pieces = [_piece_bytes(tokenizer, i) for i in range(self.vocab_size)]
        # A second time for the first piece of a text, which has lost the space that precedes every text.
        self.pieces = pa.array(pieces + [piece.removeprefix(b" ") for piece in pieces], pa.large_binary())

    def read(self, piece: TokenPiece) -> Iterator[tuple[Texts, np.ndarray, np.ndarray]]:
        """Some documents at a time: their texts, their ids and how many each has; `<eos>` ends them all."""
        ids = np.fromfile(piece.file, DTYPE, piece.end - piece.start, offset=piece.start * DTYPE.itemsize)
        if (highest := int(ids.max(initial=0))) >= self.vocab_size:
            raise UserError(
                f"{piece.file} 含 token {highest}，超出词表大小 {self.vocab_size:,}；"
                "它不是 ChatGLM2 词表的 uint16 token 文件。"
            )
        if ids[-1] != self.eos:  # the next document must not run on
            ids = np.append(ids, DTYPE.type(self.eos))
        starts = np.concatenate([[0], np.flatnonzero(ids == self.eos) + 1])
        borders = np.searchsorted(starts, np.append(np.arange(0, len(ids), BATCH_TOKENS), len(ids)))
        for first, end in pairwise(np.unique(borders).tolist()):
            documents = starts[first : end + 1]
            batch = ids[documents[0] : documents[-1]]
            yield self.texts(batch, documents - documents[0]), batch, np.diff(documents)

    def texts(self, ids: np.ndarray, starts: np.ndarray) -> Texts:
        """The texts that documents were made from; document i is ids[starts[i] : starts[i + 1]]."""
        rows = ids.astype(np.int32)
        rows[starts[:-1]] += self.vocab_size
        _, offsets, data = self.pieces.take(pa.array(rows)).buffers()
        offsets = np.frombuffer(offsets, np.int64, count=len(rows) + 1)[starts]
        return Texts(np.frombuffer(data or b"", np.uint8, count=int(offsets[-1])), offsets)


def _piece_bytes(tokenizer: "ChatGLMTokenizer", i: int) -> bytes:
    """The text that an id stands for; nothing for control tokens."""
    sp = tokenizer.sp
    if i >= tokenizer.pieces or sp.is_control(i) or sp.is_unknown(i):
        return b""
    piece = sp.id_to_piece(i)
    return bytes([int(piece[1:-1], 16)]) if sp.is_byte(i) else piece.replace("▁", " ").encode()
