"""Bytes of a file as they were before compression: gzip, zstandard and the members of zip archives.

Everything streams: memory holds a megabyte or two, whatever a small compressed file unpacks to.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from sources.detect import HEAD
from sources.files import is_data_name

LINE_BLOCK = 1 << 18
PACKED_BLOCK = 1 << 17
# What an error of Arrow's takes with it is at most this much; zstandard itself works in blocks of 128 KB.
ZSTD_STEP = 1 << 14
LONGEST = 1 << 27  # bytes of one line or JSON value; nothing that anybody trains on comes near it
MAX_LAYERS = 4  # a.jsonl.gz.zst
DAMAGED = (EOFError, zlib.error, zipfile.BadZipFile)
ENCRYPTED = 0x1  # flag bits of a zip member
UTF8_NAME = 0x800
# zipfile unpacks bzip2 and LZMA without a limit on the output, which a small file could use to fill the memory.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


class Member(NamedTuple):
    """A data file inside a zip archive."""

    path: Path  # archive.zip/folder/file.jsonl: for messages and the source name, not to be opened
    info: zipfile.ZipInfo

    @property
    def obstacle(self) -> str:
        """Why it cannot be read; empty if it can."""
        if self.info.flag_bits & ENCRYPTED:
            return "zip 里的文件加了密"
        return "" if self.info.compress_type in METHODS else "zip 里的文件用了少见的压缩方法"


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive does (an empty archive is nothing but its end)."""
    with open(path, "rb") as handle:
        return handle.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive; raises OSError, BadZipFile, the latter for whatever zipfile makes of a damaged directory."""
    try:
        archive = zipfile.ZipFile(path)
    except (NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise zipfile.BadZipFile(str(error)) from error
    with archive:
        yield archive


def zip_members(archive: zipfile.ZipFile) -> list[Member]:
    """The data files of an archive, in its order."""
    path = Path(archive.filename)
    members = [Member(Path(f"{path}/{_name(i)}"), i) for i in archive.infolist() if not i.is_dir()]
    return [member for member in members if is_data_name(member.path, path)]


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name; without the flag of UTF-8 it is read as cp437, but macOS writes UTF-8 and Windows GBK."""
    if not info.flag_bits & UTF8_NAME:
        for encoding in ("utf-8", "gbk"):
            try:
                return info.filename.encode("cp437").decode(encoding)
            except UnicodeError:
                pass
    return info.filename


def open_file(path: Path) -> io.BufferedReader:
    """The unpacked bytes of a file; reading raises OSError or one of DAMAGED behind the last good byte."""
    return unpacked(open(path, "rb", buffering=HEAD))


def open_member(archive: zipfile.ZipFile, member: Member) -> io.BufferedReader:
    """The unpacked bytes of a zip member that has no obstacle; raises OSError, BadZipFile."""
    try:
        handle = archive.open(member.info)
        return unpacked(_buffered(handle.read1, handle))
    except (NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from error


def unpacked(handle: io.BufferedReader) -> io.BufferedReader:
    """The bytes below all layers of compression; `peek` shows their first HEAD."""
    try:
        for _ in range(MAX_LAYERS):
            magic = handle.peek(4)[:4]
            if magic[:2] == b"\x1f\x8b":
                handle = _buffered(_Gzip(handle).read, handle)
            elif magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
                handle = _buffered(_Zstandard(handle).read, handle)
            else:
                break
    except (OSError, *DAMAGED):
        handle.close()
        raise
    return handle


def is_plain(handle: io.BufferedReader) -> bool:
    """Whether the bytes are those on the disk, so that a reader may begin in the middle."""
    return isinstance(handle.raw, io.FileIO)


def line_blocks(
    handle: io.BufferedReader, start: int = 0, end: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in the bytes [start, end), many at a time: (byte where they begin, lines).

    None stands for one line of more than LONGEST bytes.
    """
    position = start + _skip_to_line(handle, start, end) if start else 0
    pieces: list[bytes] = []  # of a line whose end was not read yet
    size = 0  # their bytes
    while end is None or position < end:
        block = handle.read1(LINE_BLOCK)
        cut = block.rfind(b"\n") + 1 if block else 0
        if block and not cut:
            pieces.append(block)
            size += len(block)
            if size > LONGEST:
                yield position, None
                position += size + _skip_line(handle)
                pieces, size = [], 0
            continue
        lines = b"".join([*pieces, block[:cut]])
        if end is not None and position + len(lines) > end:
            lines = lines[: lines.find(b"\n", end - 1 - position) + 1 or None]
        if lines:
            yield position, lines
        if not block:
            return
        position += len(lines)
        pieces, size = [block[cut:]], len(block) - cut


def _skip_to_line(handle: io.BufferedReader, start: int, end: int | None) -> int:
    """Go to the first line that begins at `start` or behind, at most to `end`; returns how far behind."""
    handle.seek(start - 1)
    skipped = handle.readline(-1 if end is None else end - start)
    return len(skipped) - skipped.endswith(b"\n")


def _skip_line(handle: io.BufferedReader) -> int:
    """Read to the end of the line; returns how many bytes that were."""
    size = 0
    while rest := handle.readline(LINE_BLOCK):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return size


def _buffered(read: Callable[[int], bytes], packed: IO[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Stream(read, packed), HEAD)


class _Stream(io.RawIOBase):
    """A function that reads up to n bytes, as a raw file; an error comes after all that was read before it."""

    def __init__(self, read: Callable[[int], bytes], packed: IO[bytes]) -> None:
        self.source, self.packed = read, packed  # `packed` is closed with it
        self.error: Exception | None = None

    def close(self) -> None:
        super().close()
        self.packed.close()

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:
        filled = 0
        while filled < len(target) and not self.error:
            try:
                data = self.source(len(target) - filled)
            except (OSError, *DAMAGED) as error:
                self.error = error
                break
            if not data:
                break
            target[filled : filled + len(data)] = data
            filled += len(data)
        if self.error and not filled:
            raise self.error
        return filled


class _Gzip:
    """The members of a gzip file, one after the other."""

    def __init__(self, handle: io.BufferedReader) -> None:
        self.handle = handle
        self.member: Any = None  # the decompressor of the member that is being read
        self.packed = b""

    def read(self, size: int) -> bytes:
        """Up to so many bytes, b"" at the end; raises EOFError, zlib.error."""
        data = b""
        while not data:
            self.packed = self.packed or self.handle.read1(PACKED_BLOCK)
            if self.member is None:
                if not self.packed:
                    return b""
                self.packed = self.packed.lstrip(b"\0")  # padding behind a member
                self.member = zlib.decompressobj(wbits=31) if self.packed else None
                continue
            data = self.member.decompress(self.packed, size)
            if not (data or self.packed or self.member.eof):
                raise EOFError("the last gzip member has no end")
            self.packed = self.member.unconsumed_tail
            if self.member.eof:
                self.member, self.packed = None, self.member.unused_data
        return data


class _Zstandard:
    """The frames of a zstandard file, one after the other."""

    def __init__(self, handle: io.BufferedReader) -> None:
        self.stream = pa.CompressedInputStream(pa.PythonFile(handle, mode="r"), "zstd")

    def read(self, size: int) -> bytes:
        """Up to so many bytes, b"" at the end; raises EOFError for what zstandard cannot read."""
        try:
            return self.stream.read(min(size, ZSTD_STEP))
        except OSError as error:
            if error.errno is None:  # Arrow's own, not that of a disk
                raise EOFError(str(error)) from error
            raise
