"""The key/value cache: one fixed block of memory, in which every running request has a row.

Shapes: B rows of one forward pass, T new tokens, S positions attended to, K key/value heads, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model import ModelArgs


class KVCache:
    """Keys and values of `rows` requests for every layer, each with room for the model's whole context.

    Its size never changes: 2 * layers * rows * (max_seq_len + 1) * K * D numbers of the type that the model
    computes in. The one position more than the context is where padding is written; nobody ever looks there.
    """

    def __init__(self, args: ModelArgs, rows: int, device: torch.device | str = "cpu"):
        self.args, self.rows, self.device = args, rows, torch.device(device)
        self.padding = args.max_seq_len  # the position of padding
        self.length = args.max_seq_len + 1
        self.layers: dict[int, Tensor] = {}  # layer -> (2, rows * length, K, D), made when its type is known

    def layer(self, layer: int, like: Tensor) -> Tensor:
        """The block of a layer, (2, rows * length, K, D); `like` gives K, D and the type at first."""
        if layer not in self.layers:
            block = like.new_zeros(2, self.rows * self.length, *like.shape[-2:])
            torch._dynamo.mark_static_address(block)  # a CUDA graph may write to it in place
            self.layers[layer] = block
        return self.layers[layer]

    def nbytes(self) -> int:
        """Bytes that the cache holds; 0 before the first pass."""
        return sum(block.numel() * block.element_size() for block in self.layers.values())

    @torch.inference_mode()
    def move(self, source: int, target: int, used: int) -> None:
        """Copy the first `used` positions of one row to another."""
        for block in self.layers.values():
            rows = block.unflatten(1, (self.rows, self.length))
            rows[:, target, :used] = rows[:, source, :used]

    def window(self, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> "Window":
        """Room for `counts[i]` new tokens of row `rows[i]`, behind the `starts[i]` that it holds.

        A forward pass takes tokens (B, max(counts)), filled up on the right. ValueError beyond the context.
        """
        if max(s + c for s, c in zip(starts, counts, strict=True)) > self.args.max_seq_len:
            raise ValueError(f"more tokens than max_seq_len={self.args.max_seq_len}")
        return Window(self, rows, starts, counts)


class Window:
    """What one forward pass reads and writes of a cache: `model(tokens, cache=window)`.

    positions: (B, T) of the new tokens in their rows. mask: (B, 1, T, S), what each may attend to; None: everything.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], starts: Sequence[int], counts: Sequence[int]):
        self.cache = cache
        most = max(counts)
        self.span = max(s + c for s, c in zip(starts, counts, strict=True))  # S
        start = torch.tensor(starts, device=cache.device)[:, None]  # (B, 1)
        positions = start + torch.arange(most, device=cache.device)  # (B, T)
        if min(counts) < most:
            positions = positions.where(positions < start + start.new_tensor(counts)[:, None], cache.padding)
        contiguous = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        # A slice is a view of the block; any other choice of rows is a copy of them.
        self.rows = slice(rows[0], rows[0] + len(rows)) if contiguous else start.new_tensor(rows)
        self.places = (positions + cache.length * start.new_tensor(rows)[:, None]).flatten()  # (B * T,)
        self.mask = None
        if most > 1 or min(starts) < max(starts):
            keys = torch.arange(self.span, device=cache.device)
            self.mask = (keys <= positions[:, :, None])[:, None]  # (B, 1, T, S)
        self.positions = positions.clamp(max=cache.args.max_seq_len - 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) and return what their rows hold, (B, S, K, D) each."""
        block = self.cache.layer(layer, k)
        block[0].index_copy_(0, self.places, k.flatten(0, 1))
        block[1].index_copy_(0, self.places, v.flatten(0, 1))
        both = block.unflatten(1, (self.cache.rows, self.cache.length))[:, self.rows, : self.span]
        return both[0], both[1]
