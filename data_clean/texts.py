"""Many texts in one buffer, the form in which compiled code, Arrow and files on disk take them."""

from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


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

    def take(self, indices: np.ndarray) -> "Texts":
        """The texts at these positions, in this order, copied into a new buffer."""
        return from_arrow(self.to_arrow().take(pa.array(indices, pa.int64())))

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
    starts = np.frombuffer(starts, np.int64)[array.offset : array.offset + len(array) + 1]
    data = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return Texts(data[starts[0] : starts[-1]], starts - starts[0])


def concatenate(parts: list[Texts]) -> Texts:
    """All the texts of all parts, in order."""
    sizes = [part.sizes for part in parts]
    starts = np.concatenate([np.zeros(1, np.int64), *sizes]).cumsum()
    return frozen(np.concatenate([np.empty(0, np.uint8), *(part.data for part in parts)]), starts)


def frozen(data: np.ndarray, starts: np.ndarray) -> Texts:
    """Texts of a new buffer, read-only as Arrow's are: compiled code would otherwise exist twice."""
    data.flags.writeable = False
    return Texts(data, starts)
