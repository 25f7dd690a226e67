"""The values of a JSON array, or JSON values that simply follow each other, in a stream of any length.

Machines write what stands between two objects always in the same way: once that is known, it is searched for.
A piece between two places so found that decodes is an object (none is the beginning of another); one that does
not sends the reader to the brackets, quotes and backslashes of the window. What is unusual (a number or a string
between the objects, an object longer than the window, damage) goes through Python's own decoder.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator

import numpy as np

from sources.detect import DECODER
from sources.streams import DAMAGED, LONGEST

WINDOW = 1 << 18  # bytes searched at a time; more where a value is longer
BLOCK = 1 << 17  # bytes that stay in a processor's cache together with what is computed of them
FIRST_TRY = 1 << 12  # bytes given to Python's decoder at first
# A value that is cut by the end of the text fails within this many characters of it (`-Infinity`, `\u12`,
# `1e+`): a failure further back is a real error.
CUT = 16
SPACE = re.compile(rb"[ \t\r\n]*")
FIRST_KEY = re.compile(rb'\{[ \t\r\n]*"(?:[^"\\]|\\.)*"')
QUOTE, BACKSLASH = 0x22, 0x5C
# "[" and "{" differ in one bit, and so do "]" and "}".
CASE, OPENING, CLOSING = 0x20, 0x7B, 0x7D
MAX_WRONG = 20  # wrong guesses in a file, after which brackets are searched at once
Span = tuple[int, int]


class JsonWindow:
    """A window over a long JSON text that grows only as far as the current value needs."""

    def __init__(self, handle: io.BufferedReader) -> None:
        self.handle = handle
        self.data, self.position, self.ended = b"", 0, False
        self.objects: list[Span] | None = None  # those that are whole in this window, once it was searched
        self.next_object = 0  # the first of them that was not given out
        self.marker = b""  # the end of an object, what stands between, and the first key of the next
        self.marker_object = 0  # where in it that one begins
        self.wrong_guesses, self.may_guess, self.is_guess = 0, True, False
        self.grow()
        self.position = len(self.data) - len(self.data.removeprefix(codecs.BOM_UTF8))

    def grow(self) -> None:
        """Drop what was consumed and at least double the rest, so that a long value costs linear time."""
        rest = self.data[self.position :]
        if len(rest) > LONGEST:
            raise ValueError("no end of the value in sight")
        pieces, wanted = [rest], max(WINDOW, len(rest))
        while wanted > 0 and not self.ended:
            try:
                piece = self.handle.read1(wanted)
            except (OSError, *DAMAGED):
                if len(pieces) == 1:
                    raise
                break  # first what was read before; the next call meets the error again
            self.ended = not piece
            pieces.append(piece)
            wanted -= len(piece)
        self.data, self.position, self.objects = b"".join(pieces), 0, None

    def skip_space(self) -> None:
        while True:
            self.position = SPACE.match(self.data, self.position).end()
            if self.position < len(self.data) or self.ended:
                return
            self.grow()

    def at_end(self, closing: bytes) -> bool:
        """Whether the closing bracket, or without one the end of the file, comes next."""
        self.skip_space()
        if closing:
            return self.data.startswith(closing, self.position)
        return self.position == len(self.data)

    def take(self, char: bytes) -> None:
        self.skip_space()
        if not self.data.startswith(char, self.position):
            raise ValueError(f"expected {char!r}")
        self.position += 1

    def spans(self, separator: bytes, closing: bytes) -> Iterator[Span]:
        """Where in `data` each value is, from `position` to the end; ValueError, RecursionError at damage.

        A span holds until the next is asked for: the window moves on.
        """
        while not self.at_end(closing):
            for span in self._next_objects(separator) or [self._next_value()]:
                self.position = span[1]
                yield span
            self.may_guess = self.wrong_guesses < MAX_WRONG
            if separator and not self.at_end(closing):
                self.take(separator)

    def _next_objects(self, separator: bytes) -> list[Span]:
        """The objects (or arrays) from here on that are whole in the window with only separators between."""
        if not self.data.startswith((b"{", b"["), self.position):
            return []
        found = self._guess() or self._search(separator)
        if not found and not self.ended:
            self.grow()
            found = self._guess() or self._search(separator)
        return found

    def _guess(self) -> list[Span]:
        """What lies between markers, from here to the last one in the window."""
        found, start = [], self.position
        if self.marker and self.may_guess:
            end = self.data.find(b"}", start)  # one byte is found ten times as fast as several
            while end >= 0:
                behind = end + 1
                if self.data.startswith(self.marker, end):
                    found.append((start, behind))
                    start = behind = end + self.marker_object
                end = self.data.find(b"}", behind)
        self.is_guess = bool(found)
        return found

    def guessed_wrong(self, start: int) -> None:
        """Go back to the value at `start`, whose end is then told by brackets; `spans` has to be called again."""
        self.wrong_guesses += 1
        self.may_guess, self.position = False, start

    def _search(self, separator: bytes) -> list[Span]:
        """What brackets enclose, as long as there are only separators between."""
        if not self._is_found():
            return []
        found = [self.objects[self.next_object]]
        for span in self.objects[self.next_object + 1 :]:
            if self.data[found[-1][1] : span[0]].strip(b" \t\r\n") != separator:
                break
            found.append(span)
        self.next_object += len(found)
        if len(found) > 1 and not self.marker:
            self._set_marker(found[0][1] - 1, found[1][0])
        return found

    def _is_found(self) -> bool:
        """Whether the object that begins at `position` is known to be whole."""
        if self.objects is None:
            self.objects, self.next_object = object_spans(self.data, self.position), 0
        while self.next_object < len(self.objects) and self.objects[self.next_object][0] < self.position:
            self.next_object += 1
        return self.next_object < len(self.objects) and self.objects[self.next_object][0] == self.position

    def _next_value(self) -> Span:
        """The next JSON value, whatever it is."""
        size = FIRST_TRY
        while True:
            part = self.data[self.position : self.position + size]
            is_rest = self.ended and self.position + size >= len(self.data)
            text = part.decode("utf-8", "surrogateescape")
            try:
                _, end = DECODER.raw_decode(text)
                if is_rest or end < len(text) - CUT:
                    used = len(text[:end].encode("utf-8", "surrogateescape"))
                    return self.position, self.position + used
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - CUT
                if is_rest or not is_cut:
                    raise
            if self.position + size >= len(self.data):
                self.grow()
            size *= 4

    def _set_marker(self, start: int, second: int) -> None:
        """Remember how the second object follows the first, whose closing bracket is at `start`."""
        key = FIRST_KEY.match(self.data, second)
        if key:
            self.marker, self.marker_object = self.data[start : key.end()], second - start

    def resume(self) -> bool:
        """Go to the next place that looks like the beginning of another object; False if there is none."""
        while self.marker:
            found = self.data.find(self.marker, max(0, self.position + 1 - self.marker_object))
            if found >= 0:
                self.position = found + self.marker_object
                return True
            if self.ended:
                return False
            self.position = max(self.position, len(self.data) - len(self.marker))
            self.grow()
        return False


def object_spans(data: bytes, start: int) -> list[Span]:
    """The outermost objects and arrays of `data` from `start` on that are whole."""
    window = np.frombuffer(data, np.uint8)[start:]  # (n,)
    blocks = range(0, len(window), BLOCK)
    places = np.concatenate([_token_places(window[at : at + BLOCK]) + at for at in blocks])  # (t,)
    tokens = window[places]
    is_quote = (tokens == QUOTE) & ~_is_escaped(places, tokens == BACKSLASH)
    is_bracket = (tokens != QUOTE) & (tokens != BACKSLASH) & (np.cumsum(is_quote) % 2 == 0)
    places = places[is_bracket]  # (b,)
    is_opening = tokens[is_bracket] | CASE == OPENING
    depth = np.cumsum(np.where(is_opening, 1, -1))
    begins = places[is_opening & (depth == 1)] + start
    ends = places[~is_opening & (depth == 0)] + start + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=False))


def _token_places(block: np.ndarray) -> np.ndarray:
    """Where the brackets, quotes and backslashes of a block are, (t,) int64."""
    folded = block | CASE
    is_token = folded == OPENING
    is_token |= folded == CLOSING
    is_token |= block == QUOTE
    is_token |= block == BACKSLASH
    return np.flatnonzero(is_token)


def _is_escaped(places: np.ndarray, is_backslash: np.ndarray) -> np.ndarray:
    """Which tokens, at `places` (t,), stand right behind an odd number of backslashes."""
    follows = np.zeros(len(places), bool)  # right behind a backslash
    follows[1:] = is_backslash[:-1] & (np.diff(places) == 1)
    index = np.arange(len(places))
    run_start = np.maximum.accumulate(np.where(follows, 0, index))  # where the backslashes before it begin
    return follows & ((index - run_start) % 2 == 1)
