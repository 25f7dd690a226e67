"""Many texts in one buffer, the form in which compiled code, Arrow and files on disk take them."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit


class _Buffer(NamedTuple):
    data: np.ndarray  # (bytes,) uint8
    starts: np.ndarray  # (n + 1,) int64


class Texts(_Buffer):
    """UTF-8 bytes of n texts, one behind the other; text i is data[starts[i] : starts[i + 1]]."""

    @property
    def count(self) -> int:
        return len(self.starts) - 1

    @property
    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of each text, (n,) int64."""
        return np.diff(self.starts)

    @cached_property
    def characters(self) -> np.ndarray:
        """Code points of each text, (n,) int64."""
        return pc.utf8_length(self.to_arrow()).to_numpy(zero_copy_only=False).astype(np.int64)

    def text(self, index: int) -> str:
        return self.data[self.starts[index] : self.starts[index + 1]].tobytes().decode()

    def texts(self) -> list[str]:
        return self.to_arrow().to_pylist()

    def to_arrow(self) -> pa.LargeStringArray:
        """The same texts as an Arrow array; nothing is copied."""
        buffers = [pa.py_buffer(np.ascontiguousarray(part)) for part in (self.starts, self.data)]
        return pa.LargeStringArray.from_buffers(self.count, *buffers)

    def slice(self, first: int, end: int) -> "Texts":
        """The texts from one position to before another; nothing is copied."""
        starts = self.starts[first : end + 1]
        return Texts(self.data[starts[0] : starts[-1]], starts - starts[0])

    def take(self, indices: np.ndarray) -> "Texts":
        """The texts at these positions, in this order, copied into a new buffer."""
        taken = from_arrow(self.to_arrow().take(pa.array(indices, pa.int64())))
        if "characters" in self.__dict__:  # counted already
            taken.characters = self.characters[indices]
        return taken

    def replace(self, where: np.ndarray, strings: list[str]) -> "Texts":
        """The same texts but for those at the positions `where`, a mask (n,) bool, in a new buffer."""
        strings = pa.array(strings, pa.large_string())
        return from_arrow(pc.replace_with_mask(self.to_arrow(), pa.array(where), strings))


def from_strings(strings: Iterable[str]) -> Texts:
    """Put Python strings into one buffer; a lone surrogate raises UnicodeEncodeError."""
    return from_arrow(pa.array(strings, pa.large_string()))


def from_arrow(array: pa.Array) -> Texts:
    """View an Arrow string array without nulls; nothing is copied."""
    array = array.cast(pa.large_string())
    _, starts, data = array.buffers()
    data = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return Texts(data, np.frombuffer(starts, np.int64)).slice(array.offset, array.offset + len(array))


def arranged(parts: Sequence[Texts], order: np.ndarray) -> Texts:
    """The texts of all parts in this order, (m,) positions among them; every byte is copied once."""
    firsts = np.cumsum([0, *(part.count for part in parts)])
    sizes = np.concatenate([np.empty(0, np.int64), *(part.sizes for part in parts)])[order]
    starts = np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
    data, by_part = np.empty(starts[-1], np.uint8), np.argsort(order, kind="stable")
    ends = np.searchsorted(order[by_part], firsts)
    for part, first, begin, end in zip(parts, firsts, ends, ends[1:], strict=False):
        places = by_part[begin:end]
        _copy(part.data, part.starts, order[places] - first, data, starts[places])
    return frozen(data, starts)


@njit(cache=True, nogil=True)
def _copy(data, starts, rows, target, places):
    """Put the texts at `rows` (m,) to `places` (m,) in the target."""
    for i in range(len(rows)):
        begin, place = np.uint64(starts[rows[i]]), np.uint64(places[i])
        for j in range(np.uint64(starts[rows[i] + 1]) - begin):  # half the time of assigning a slice
            target[place + j] = data[begin + j]


def frozen(data: np.ndarray, starts: np.ndarray) -> Texts:
    """Texts of a new buffer, read-only as Arrow's are: compiled code would otherwise exist twice."""
    data.flags.writeable = False
    return Texts(data, starts)
