"""Pretraining data: windows of tokens over one or several .bin files, memory-mapped and never concatenated."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from stage import UserError
from training.loader import MicroBatch


class TokenWindows:
    """Windows of seq_len + 1 tokens, one after the other through every file; the last, shorter one is left out.

    Neighbouring windows share one token, so that every token but a file's first is a target once.
    """

    def __init__(self, paths: Sequence[Path], seq_len: int, tokenizer: ChatGLMTokenizer):
        self.seq_len, self.vocab_size, self.paths = seq_len, tokenizer.vocab_size, list(paths)
        self.files = [open_tokens(path, tokenizer) for path in paths]
        counts = [(len(tokens) - 1) // seq_len for tokens in self.files]
        self.ends = np.cumsum(counts)  # index after the last window of each file
        if not len(self):
            raise UserError(
                f"{', '.join(map(str, paths))} 一共只有 {sum(map(len, self.files))} 个 token，"
                f"不足一个 {seq_len} token 的窗口；请增加语料或减小 --max_seq_len。"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: np.ndarray) -> MicroBatch:
        """Tokens and targets of these windows, (n, seq_len) int64 each."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            file = int(np.searchsorted(self.ends, index, side="right"))
            start = (index - (self.ends[file - 1] if file else 0)) * self.seq_len
            row[:] = self.files[file][start : start + self.seq_len + 1]
        if rows.size and rows.max() >= self.vocab_size:
            raise UserError(
                f"{', '.join(map(str, self.paths))} 里有 id {rows.max()}，超出词表（{self.vocab_size} 个条目）；"
                "请用生成它的词表（--tokenizer），或重新运行 data_process.py。"
            )
        windows = torch.from_numpy(rows)
        return MicroBatch(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def open_tokens(path: Path, tokenizer: ChatGLMTokenizer) -> np.ndarray:
    """Memory-map a token file; its JSON says the dtype and the vocabulary, without one it is uint16."""
    if not path.is_file():
        raise UserError(f"找不到 token 文件 {path}；请先运行 python data_process.py。")
    sidecar = read_sidecar(path)
    dtype = np.dtype(sidecar.get("dtype", "uint16")).newbyteorder("<")
    size = path.stat().st_size
    if not size or size % dtype.itemsize:
        raise UserError(
            f"{path} 有 {size} 字节，不是 {dtype.itemsize} 的正整数倍：文件不完整或格式不对，请重新生成。"
        )
    tokens = size // dtype.itemsize
    if sidecar.get("tokens", tokens) != tokens:
        raise UserError(
            f"{path} 有 {tokens} 个 token，而它的说明 {path.with_suffix('.json')} 写的是 {sidecar['tokens']} 个："
            "写入时中断过，或被改动过；请重新运行 data_process.py。"
        )
    made_with = sidecar.get("tokenizer", {}).get("sha256")
    if made_with and made_with != tokenizer.sha256:
        raise UserError(
            f"{path} 是用词表 {sidecar['tokenizer'].get('path')}（sha256 {made_with[:12]}…）生成的，"
            f"与 {tokenizer.vocab_file}（{tokenizer.sha256[:12]}…）不同；"
            "请用 --tokenizer 指定前者，或重新运行 data_process.py。"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def read_sidecar(path: Path) -> dict:
    """What data_process.py wrote beside a .bin; empty for a published file, which has none."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return {}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    is_ours = isinstance(content, dict) and isinstance(content.get("tokenizer", {}), dict)
    if not is_ours or content.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise UserError(
            f"{sidecar} 不是 data_process.py 写的说明；请重新生成，或移走它（没有说明则按 uint16 读）。"
        )
    return content


class PretrainBatches:
    """Batches of windows in a new random order each epoch; disjoint across processes.

    The order depends on the seed and the batch alone, so any number of processes sees the same global batches.
    """

    def __init__(self, windows: TokenWindows, batch: int, micro_batch: int, rank: int, world: int, seed: int):
        """batch: windows of a step, over all processes. micro_batch: windows of one forward of a process."""
        self.windows, self.batch, self.micro_batch = windows, batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        self.steps_per_epoch = len(windows) / batch
        self.signature = {
            "batch_tokens": batch * windows.seq_len,
            "windows": len(windows),
            "file_tokens": [len(tokens) for tokens in windows.files],
            "max_seq_len": windows.seq_len,
            "seed": seed,
        }

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        n = len(self.windows)
        positions = np.arange(step * self.batch, (step + 1) * self.batch)[self.rank :: self.world]
        indices = np.empty_like(positions)
        for epoch in np.unique(positions // n):
            here = positions // n == epoch
            indices[here] = permute(positions[here] % n, n, key=self.seed * 1_000_003 + int(epoch))
        cuts = range(0, len(indices), self.micro_batch)
        return [self.windows.read(indices[i : i + self.micro_batch]) for i in cuts]


def permute(positions: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where these positions of 0 … n-1 go in a random permutation that is never stored.

    A four-round Feistel network on the next even number of bits is a bijection; what lands at n or beyond is
    sent through again until it lands inside ("cycle walking", https://doi.org/10.1007/3-540-45760-7_9).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.default_rng(key).integers(1, 2**63, size=4, dtype=np.uint64)

    def shuffle(x: np.ndarray) -> np.ndarray:
        left, right = x >> np.uint64(half), x & mask
        for k in keys:
            mixed = (right + k) * np.uint64(0x9E3779B97F4A7C15)  # wraps around: a multiplicative hash
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(17) & mask)
        return (left << np.uint64(half)) | right

    out = shuffle(positions.astype(np.uint64))
    while (outside := out >= n).any():
        out[outside] = shuffle(out[outside])
    return out.astype(np.int64)
