"""Pretraining data: windows of tokens over one or several .bin files, memory-mapped and never concatenated."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chatglm_tokenizer.base import Tokenizer
from stage import UserError
from training.loader import MicroBatch
from training.mixture import Mixture, Phase, whole_weights

# https://arxiv.org/abs/2305.16264: up to four epochs, repeated data are almost as good as new ones.
TOO_OFTEN = "：重复超过 4 遍的收益很小，建议减小它的份额或增加语料"


class TokenWindows:
    """Windows of seq_len + 1 tokens, one after the other through every file; the last, shorter one is left out.

    Neighbouring windows share one token, so that every token but a file's first is a target once.
    """

    def __init__(
        self, paths: Sequence[Path], seq_len: int, tokenizer: Tokenizer, document_mask: bool = False
    ):
        """document_mask: number the documents of a row, for a model in which they do not see each other."""
        self.seq_len, self.vocab_size, self.paths = seq_len, tokenizer.vocab_size, list(paths)
        self.eos = tokenizer.special_tokens["<eos>"] if document_mask else None
        self.files = [open_tokens(path, tokenizer) for path in paths]
        self.counts = [(len(tokens) - 1) // seq_len for tokens in self.files]
        self.ends = np.cumsum(self.counts)  # index after the last window of each file
        if not len(self):
            raise UserError(
                f"{', '.join(map(str, paths))} 一共只有 {sum(map(len, self.files))} 个 token，"
                f"不足一个 {seq_len} token 的窗口；请增加语料或减小 --max_seq_len。"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The file of each of these windows, and its number within that file, (n,) each."""
        files = np.searchsorted(self.ends, indices, side="right")
        return files, indices - (self.ends - self.counts)[files]

    def read(self, indices: np.ndarray) -> MicroBatch:
        """These windows, (n, seq_len)."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        files, numbers = self.locate(indices)
        for file in np.unique(files):
            here = files == file
            rows[here] = found = overlapping(self.files[file], self.seq_len)[numbers[here]]
            self.check_ids(file, found.max())
        # Copied by numpy: torch would start threads of its own for it in the thread that reads ahead.
        tokens, targets = np.ascontiguousarray(rows[:, :-1]), np.ascontiguousarray(rows[:, 1:])
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(targets), self.number_documents(tokens))

    def places(self, file: int, number: int) -> list[tuple[int, int]]:
        """First and last + 1 of the tokens of a window in its file, without its last target."""
        return [(number * self.seq_len, (number + 1) * self.seq_len)]

    def check_ids(self, file: int, largest: int) -> None:
        """Raise UserError for tokens of a file that the vocabulary does not have."""
        if largest >= self.vocab_size:
            raise UserError(
                f"{self.paths[file]} 里有 id {largest}，超出词表（{self.vocab_size} 个条目）；"
                "请用生成它的词表（--tokenizer），或重新运行 data_process.py。"
            )

    def number_documents(self, tokens: np.ndarray) -> Tensor | None:
        """The document of each token, (n, seq_len) int32; None if no row has two, so that nothing is masked.

        An <eos> opens the document behind it, whose first token is predicted from it alone.
        """
        if self.eos is None or not (tokens[:, 1:] == self.eos).any():
            return None
        return torch.from_numpy((tokens == self.eos).cumsum(axis=1, dtype=np.int32))


def overlapping(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """The windows of a file as rows that share one token, (n, seq_len + 1); a view, nothing is read."""
    shape, size = ((len(tokens) - 1) // seq_len, seq_len + 1), tokens.itemsize
    return np.lib.stride_tricks.as_strided(tokens, shape, (seq_len * size, size), writeable=False)


def open_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
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
    """Batches of windows, each file in a new random order each time through; disjoint across processes.

    A step depends on the seed, the batch and the phases alone: any number of processes sees the same global
    batches, and a resumed run needs nothing but the number of its step.
    """

    def __init__(
        self,
        windows: TokenWindows,
        batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        seed: int,
        phases: Sequence[Phase] | None = None,
    ):
        """batch: windows of a step, over all processes. micro_batch: windows of one forward of a process.

        phases: by default one, in which every file has a share in proportion to its size.
        """
        self.windows, self.batch, self.micro_batch = windows, batch, micro_batch
        self.rank, self.world = rank, world
        phases = phases or [Phase(0, whole_weights(windows.counts))]
        in_draws = [Phase(phase.begin * batch, phase.weights) for phase in phases]
        self.mixture = Mixture(windows.counts, in_draws, seed)
        # As many tokens as all the files hold, whatever their shares.
        self.steps_per_epoch = len(windows) / batch
        self.signature = {
            "batch_tokens": batch * windows.seq_len,
            "windows": len(windows),
            "file_tokens": [len(tokens) for tokens in windows.files],
            "max_seq_len": windows.seq_len,
            "seed": seed,
            "window_kind": type(windows).__name__,
            "document_mask": windows.eos is not None,
            "phases": [[phase.begin, list(phase.weights)] for phase in phases],
        }

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        mine = self.drawn(step)
        cuts = range(0, len(mine), self.micro_batch)
        return [self.windows.read(mine[i : i + self.micro_batch]) for i in cuts]

    def drawn(self, step: int) -> np.ndarray:
        """The windows of this process in a step, (n,)."""
        return self.mixture.draw(step * self.batch, (step + 1) * self.batch)[self.rank :: self.world]

    def describe(self, step: int) -> str:
        """Where this process's rows of a step come from: files, and the positions of their tokens there."""
        files, numbers = self.windows.locate(self.drawn(step))
        texts = []
        for file in np.unique(files).tolist():
            places = [self.windows.places(file, number) for number in numbers[files == file].tolist()]
            rows = ("+".join(f"{start}–{end}" for start, end in row) for row in places)
            texts.append(f"{self.windows.paths[file].name} 的 token {'、'.join(rows)}")
        return "；".join(texts)

    def plan(self, steps: int) -> str:
        """A line for each file: its tokens, its share of those trained on in so many steps, and its epochs."""
        drawn, lines = self.mixture.counts(steps * self.batch), []
        for path, tokens, size, n in zip(
            self.windows.paths, self.windows.files, self.windows.counts, drawn, strict=True
        ):
            passes = n / max(1, size)
            lines.append(
                f"{path.name}：{len(tokens) / 1e6:.2f}M token，训练 {n * self.windows.seq_len / 1e6:.2f}M"
                f"（占 {n / max(1, sum(drawn)):.1%}，{passes:.2f} 遍）{TOO_OFTEN if passes > 4 else ''}"
            )
        return "\n".join(lines)
