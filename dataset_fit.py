"""Windows that cut no document without need: best-fit packing (https://arxiv.org/abs/2404.10830).

A document of up to seq_len tokens is never cut; a longer one fills whole windows, and what is left of it is a
piece like any other. Pieces are packed, the longest first, each into the window with the least room that holds
it, within blocks of the file, so that memory does not grow with it. The result is kept in a folder beside the
file (12 bytes a piece and 8 a window), and read through the memory map like the tokens.
"""

import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numba import njit
from tqdm import tqdm

from chatglm_tokenizer.base import Tokenizer
from dataset import TokenWindows
from model import IGNORE
from stage import UserError, atomic_path
from training.loader import MicroBatch

# Tokens packed together: some ten thousand documents, of which the last windows stay half empty.
BLOCK = 1 << 24
FILES = {"starts": np.dtype("<i8"), "lengths": np.dtype("<i4"), "ends": np.dtype("<i8")}


class FittedWindows(TokenWindows):
    """Windows of whole documents and of pieces of long ones, filled up with padding that bears no loss.

    Every token but a file's first is a target once, as in TokenWindows. A row holds pieces one after the other;
    the first token of a piece is predicted from the one before it in the file, the <eos> before a document.
    """

    def __init__(
        self, paths: Sequence[Path], seq_len: int, tokenizer: Tokenizer, document_mask: bool = False
    ):
        """The indices must be there: build_indices."""
        super().__init__(paths, seq_len, tokenizer, document_mask)
        self.indices = [open_index(path, seq_len) for path in paths]
        self.counts = [len(index["ends"]) for index in self.indices]
        self.ends = np.cumsum(self.counts)

    def places(self, file: int, number: int) -> list[tuple[int, int]]:
        """First and last + 1 token of each piece of a window."""
        starts, lengths, _ = self.pieces(file, np.array([number]))
        return [(int(s) - 1, int(s + n) - 1) for s, n in zip(starts, lengths, strict=True)]

    def pieces(self, file: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First target and length of the pieces of these windows, and how many pieces each window has."""
        index = self.indices[file]
        firsts = np.where(numbers > 0, index["ends"][np.maximum(numbers - 1, 0)], 0)
        counts = index["ends"][numbers] - firsts
        chosen = ranges(firsts, counts)
        return index["starts"][chosen], index["lengths"][chosen].astype(np.int64), counts

    def read(self, indices: np.ndarray) -> MicroBatch:
        """These windows, (n, seq_len); padding is token 0, and a document of its own."""
        shape = (len(indices), self.seq_len)
        tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        documents = np.full(shape, -1, np.int32)
        files, numbers = self.locate(indices)
        for file in np.unique(files):
            (rows,) = np.nonzero(files == file)
            starts, lengths, counts = self.pieces(file, numbers[rows])
            sources = ranges(starts, lengths)  # the targets, piece by piece
            filled = np.add.reduceat(lengths, np.cumsum(counts) - counts)  # of each row
            places = ranges(rows * self.seq_len, filled)
            tokens.ravel()[places] = before = self.files[file][sources - 1]
            targets.ravel()[places] = after = self.files[file][sources]
            self.check_ids(file, max(before.max(), after.max()))
            documents.ravel()[places] = np.repeat(ranges(np.zeros_like(counts), counts), lengths)
        is_masked = self.eos is not None and (documents > 0).any()
        return MicroBatch(
            torch.from_numpy(tokens),
            torch.from_numpy(targets),
            torch.from_numpy(documents) if is_masked else None,
        )


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, … for each start, `length` of each, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - ends + lengths, lengths)


def index_path(path: Path, seq_len: int) -> Path:
    """A hidden folder, which no stage takes for data; atomic_path removes it when the token file is replaced."""
    return path.with_name(f".{path.name}.fit-{seq_len}")


def describe_index(path: Path, seq_len: int) -> dict[str, int]:
    """What an index must have been made from to be of use."""
    status = path.stat()
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "seq_len": seq_len, "block": BLOCK}


def open_index(path: Path, seq_len: int) -> dict[str, np.ndarray]:
    """Memory-map the index of a file: starts and lengths of pieces, and the end of each window among them."""
    folder = index_path(path, seq_len)
    if not is_current(path, seq_len):
        raise UserError(
            f"{folder} 不在，或与 {path} 不符；请先用单个进程运行一次 pretrain.py --windows fit。"
        )
    return {
        name: np.memmap(folder / name, dtype, "r") if (folder / name).stat().st_size else np.empty(0, dtype)
        for name, dtype in FILES.items()
    }


def is_current(path: Path, seq_len: int) -> bool:
    """Whether the index of a file is there and was made from it as it is now."""
    try:
        about = json.loads((index_path(path, seq_len) / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return about == describe_index(path, seq_len)


def build_indices(windows: TokenWindows, eos: int) -> None:
    """Pack the documents of each file into windows, unless that is done already."""
    for path, tokens in zip(windows.paths, windows.files, strict=True):
        if is_current(path, windows.seq_len):
            continue
        try:
            build_index(path, tokens, windows.seq_len, eos)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EROFS):
                raise
            raise UserError(
                f"{path.parent} 不可写，放不下 --windows fit 的索引；请在可写的文件夹里建一个指向 {path.name} 的链接，"
                "用 --data 指定它。"
            ) from error


def build_index(path: Path, tokens: np.ndarray, seq_len: int, eos: int) -> None:
    """Pack the documents of a file into windows."""
    with atomic_path(index_path(path, seq_len)) as folder:
        folder.mkdir()
        for name in FILES:
            (folder / name).touch()
        packed = 0  # pieces so far
        for starts, lengths in pieces_by_block(path.name, tokens, seq_len, eos):
            windows = best_fit(lengths, np.argsort(-lengths, kind="stable"), seq_len)
            order = np.argsort(windows, kind="stable")
            ends = packed + np.cumsum(np.bincount(windows))
            packed += len(starts)
            for name, values in (("starts", starts[order]), ("lengths", lengths[order]), ("ends", ends)):
                with open(folder / name, "ab") as handle:
                    values.astype(FILES[name]).tofile(handle)
        (folder / "about.json").write_text(json.dumps(describe_index(path, seq_len)), encoding="utf-8")


def pieces_by_block(
    name: str, tokens: np.ndarray, seq_len: int, eos: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """First target and length of the pieces of the documents that end in each block of the file."""
    start = 1  # the first token is no target
    for block in tqdm(range(0, len(tokens), BLOCK), f"{name} 装箱", unit="块", disable=None):
        last = min(block + BLOCK, len(tokens))
        ends = np.flatnonzero(tokens[block:last] == eos) + block + 1
        ends = ends[ends > start]
        if last == len(tokens) and last > (ends[-1] if len(ends) else start):
            ends = np.append(ends, last)  # the last document may lack its <eos>
        if not len(ends):
            continue
        begins = np.concatenate(([start], ends[:-1]))
        counts = -(-(ends - begins) // seq_len)  # pieces of each document
        starts = np.repeat(begins, counts) + seq_len * ranges(np.zeros_like(counts), counts)
        yield starts, np.minimum(seq_len, np.repeat(ends, counts) - starts)
        start = int(ends[-1])


@njit(cache=True, nogil=True)
def best_fit(lengths, order, room):
    """The window of each piece, (n,): pieces in this order go where the least room that suffices is left."""
    newest = np.full(room + 1, -1, np.int64)  # the last window to get to so much room
    older = np.empty(len(lengths), np.int64)  # the one that got to the same room before it
    windows, opened = np.empty(len(lengths), np.int64), 0
    for piece in order:
        left = lengths[piece]
        while left < room and newest[left] < 0:
            left += 1
        window = newest[left]
        if window < 0:
            window, opened = opened, opened + 1
        else:
            newest[left] = older[window]
        windows[piece] = window
        left -= lengths[piece]
        older[window] = newest[left]
        newest[left] = window
    return windows
