"""Named tensors in safetensors files: one file, or one of each process's rows, read back as if they were one.

A shard's header says where its rows begin, under the key and in the form that torch.distributed.checkpoint uses
(`DCP_SHARDING_INFO`), so that its HuggingFaceStorageReader reads these files too.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage import UserError
from training.state import Piece
from training.step_folder import Damaged

SHARDING = "DCP_SHARDING_INFO"


def file_name(kind: str, index: int, count: int) -> str:
    """The name of the file of process `index` of `count`, in the Hub's manner."""
    return f"{kind}.safetensors" if count == 1 else f"{kind}-{index + 1:05d}-of-{count:05d}.safetensors"


def write(path: Path, pieces: dict[str, Piece]) -> None:
    """Write pieces (CPU tensors); straight from their memory, which safetensors does without the GIL."""
    starts = {name: [p.start, *[0] * len(p.shape)][: len(p.shape)] for name, p in pieces.items()}
    is_sharded = any(tuple(p.rows.shape) != p.shape for p in pieces.values())
    offsets = json.dumps({name: {"saved_offsets": start} for name, start in starts.items()})
    metadata = {"format": "pt"} | ({SHARDING: offsets} if is_sharded else {})
    save_file({name: piece.rows.contiguous() for name, piece in pieces.items()}, path, metadata)


class TensorFiles:
    """The tensors of one or several safetensors files, read a slice at a time."""

    def __init__(self, paths: Sequence[Path]):
        """Damaged if a file cannot be read, or rows are missing because a file is."""
        self.parts: dict[str, list[tuple[int, int, Path]]] = {}  # name -> (first row, rows, file)
        self.open = {}
        for path in paths:
            try:
                self.open[path] = file = safe_open(path, "pt")
                starts = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    shape = file.get_slice(name).get_shape()
                    start = starts[name]["saved_offsets"][0] if name in starts and shape else 0
                    self.parts.setdefault(name, []).append((start, shape[0] if shape else 1, path))
            except (SafetensorError, OSError, ValueError, KeyError) as error:
                raise Damaged(f"{path} 已损坏或不完整（{error}）；请用更早的检查点。") from error
        for name, parts in self.parts.items():
            parts.sort(key=lambda part: part[0])
            end = 0
            for start, rows, path in parts:
                if start != end:
                    raise Damaged(f"{path.parent} 缺少 {name} 的第 {end} 到 {start} 行；请用更早的检查点。")
                end += rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start to stop (None: to the end) of a tensor."""
        if name not in self.parts:
            folder = next(iter(self.open)).parent
            raise UserError(f"{folder} 里没有 {name}：权重与模型形状不符。")
        found = []
        for first, rows, path in self.parts[name]:
            low = max(0, start - first)
            high = rows if stop is None else min(rows, stop - first)
            if low < high or (start == stop and not found):
                part = self.open[path].get_slice(name)
                found.append(
                    part[low : max(low, high)] if part.get_shape() else self.open[path].get_tensor(name)
                )
        return found[0] if len(found) == 1 else torch.cat(found)
