"""The normal form of a text that is stored; the rough key that only comparison uses is in keys.py.

`normalise` defines it. `normalise_batch` gives the same for many texts: a compiled pass finds those
that are normal already, which most are, and only the others go through Python.
"""

import re
import unicodedata
from functools import cache

import numpy as np
from numba import njit

from data_clean.characters import decode
from data_clean.keys import TABLE_SIZE, composing, simplified
from data_clean.texts import Texts

# Line separators of every kind become \n before other control characters go.
NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters, and marks that are invisible and carry nothing: zero-width spaces, direction marks.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)
# Joiners matter in Persian, in Hindi and in emoji; beside Chinese characters they are rubbish.
STRAY_JOINERS = re.compile("[\u200c\u200d]+(?=[\u3000-\u9fff])|(?<=[\u3000-\u9fff])[\u200c\u200d]+")
LINE_ENDS = re.compile(r"[ \t\u00a0\u3000]+(?=\n)")
BLANK_LINES = re.compile(r"\n{3,}")


def normalise(text: str) -> str:
    """The text as it is stored: the same to a reader, without what only a machine would see.

    Full-width forms and Chinese punctuation stay as they are.
    """
    text = NEWLINES.sub("\n", unicodedata.normalize("NFC", text))
    text = STRAY_JOINERS.sub("", INVISIBLE.sub("", text)).replace("\u00a0", " ")
    text = unicodedata.normalize("NFC", text)  # what an invisible character kept apart may combine now
    return BLANK_LINES.sub("\n\n", LINE_ENDS.sub("", text)).strip()


# Full-width letters and digits; punctuation stays, full width is its proper form in Chinese.
HALF_WIDTH = {
    code: code - 0xFEE0
    for first, last in ("０９", "ＡＺ", "ａｚ")
    for code in range(ord(first), ord(last) + 1)
}
# What a character is to the compiled passes, as bits.
SLOW, REMOVED, REPLACED, NEWLINE, TRAILING, SPACE = 1, 2, 4, 8, 16, 32
NORMAL, FAST = 0, 2  # texts that need nothing, and those that do but not Python; the others are SLOW


def normalise_batch(texts: Texts, half_width: bool = False, to_simplified: bool = False) -> Texts:
    """`normalise` of every text; the same object if all are normal already.

    half_width: full-width letters and digits become ASCII, Chinese punctuation stays. to_simplified: lines with
    traditional characters are converted by OpenCC, phrase by phrase; lines without are left as they are, since the
    phrases meant for traditional text would spoil simplified text (打坏 would become 打坯).
    """
    table = signs(half_width, to_simplified)
    states = _judge(*texts, table)
    if not states.any():
        return texts
    slow = states == SLOW
    changed = []
    for index in np.flatnonzero(slow).tolist():
        text = texts.text(index)
        text = normalise(text.translate(HALF_WIDTH) if half_width else text)
        changed.append(simplify(text) if to_simplified else text)
    texts = Texts(*_rewrite(*texts, states, table))
    return texts.replace(slow, changed) if changed else texts


def simplify(text: str) -> str:
    """Traditional to simplified characters, in the lines that have traditional ones."""
    traditional, convert = simplified().keys(), _converter().convert
    lines = text.split("\n")
    return "\n".join(line if traditional.isdisjoint(map(ord, line)) else convert(line) for line in lines)


@cache
def _converter():
    from opencc import OpenCC

    return OpenCC("t2s")


@cache
def signs(half_width: bool, to_simplified: bool) -> np.ndarray:
    """What every character is to the compiled passes, (0x110000,) uint8; 0 for most."""
    table = np.full(0x110000, SLOW, np.uint8)  # beyond the planes in use: rare, better look
    for code in range(TABLE_SIZE):
        char = chr(code)
        is_slow = char in composing() or not unicodedata.is_normalized("NFC", char)
        table[code] = SLOW * is_slow | SPACE * char.isspace()
    everything = "".join(map(chr, range(0x10000)))
    for pattern, sign in ((INVISIBLE, REMOVED), (NEWLINES, NEWLINE | SPACE | REPLACED)):
        table[list(map(ord, pattern.findall(everything)))] = sign
    table[0x0A] = NEWLINE | SPACE
    table[list(map(ord, " \t\u00a0\u3000"))] |= TRAILING
    table[0xA0] |= REPLACED
    table[[0x200C, 0x200D]] = SLOW
    if half_width:
        table[list(HALF_WIDTH)] |= REPLACED
    if to_simplified:
        table[list(simplified())] |= SLOW
    return table


@njit(cache=True, nogil=True)
def _judge(data, starts, table):
    """Which texts are NORMAL, FAST or SLOW, (n,) uint8."""
    states = np.zeros(len(starts) - 1, np.uint8)
    for text in range(len(starts) - 1):
        start, stop = np.uint64(starts[text]), np.uint64(starts[text + 1])
        sign, newlines, seen, is_fast = np.uint8(0), 0, np.uint8(0), False
        i, newline_end, space_end = start, start, stop
        while i < stop:
            begin = i
            code, i = decode(data, i)
            sign = table[code]
            if sign == 0:
                continue
            seen |= sign
            is_fast |= begin == start and sign & SPACE != 0
            if sign & TRAILING:
                space_end = i
            if sign & NEWLINE:
                newlines = newlines + 1 if begin == newline_end else 1
                newline_end = i
                is_fast |= newlines == 3 or begin == space_end
        is_fast |= seen & (REMOVED | REPLACED) != 0 or sign & SPACE != 0
        states[text] = SLOW if seen & SLOW else FAST if is_fast else NORMAL
    return states


@njit(cache=True, nogil=True)
def _rewrite(data, starts, states, table):
    """The FAST texts normalised, the others as they are: UTF-8 and the starts of texts."""
    result, new_starts = np.empty(len(data), np.uint8), np.zeros(len(starts), np.int64)
    out = 0
    for text in range(len(states)):
        part = data[starts[text] : starts[text + 1]]
        if states[text] == FAST:
            out += _normalise(part, table, result[out:])
        else:
            result[out : out + len(part)] = part
            out += len(part)
        new_starts[text + 1] = out
    return result[:out], new_starts


@njit(cache=True, nogil=True)
def _normalise(data, table, result):
    """Normalise a text that needs nothing SLOW into result; returns how many bytes it has."""
    i, out = np.uint64(0), 0
    line_end, text_end, newlines = 0, 0, 0  # behind the last character that is not stripped, of line and text
    while i < len(data):
        begin = i
        code, i = decode(data, i)
        sign = table[code]
        if sign & NEWLINE:
            if code == 0x0D and i < len(data) and data[i] == 0x0A:
                i += np.uint64(1)
            out = line_end
            newlines += 1
            if text_end and newlines <= 2:
                result[out] = 0x0A
                out += 1
            line_end = out
        elif sign & REMOVED == 0 and (text_end or sign & SPACE == 0):
            if sign & REPLACED:
                result[out] = 0x20 if code == 0xA0 else code - 0xFEE0
                out += 1
            else:
                for k in range(begin, i):
                    result[out] = data[k]
                    out += 1
            if sign & TRAILING == 0:
                line_end, newlines = out, 0
            if sign & SPACE == 0:
                text_end = out
    return text_end
