"""The comparison key of a text: what is left of it when only content counts.

Letters, marks and digits of every script, in one width (NFKC), one case, and simplified characters; no
punctuation, no space. Two texts with equal keys say the same; near duplicates are measured on n-grams of keys.
`comparison_key` defines it, `keys_of` computes the same for a batch in compiled code: a table gives the key of
nearly every code point, and the few texts with characters that depend on their neighbours (combining marks)
take the slow way.
"""

import unicodedata
from functools import cache
from typing import NamedTuple

import numpy as np
from numba import njit

from data_clean.texts import Texts

TABLE_SIZE = 0x34000  # beyond lie no letters, only tags, variation selectors and private use
SLOW = np.uint32(1 << 31)  # in the table: this character needs comparison_key
LONG = np.uint32(1 << 30)  # in the table: index of an expansion
IDEOGRAPHS = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0x20000, 0x2A6E0), (0x2A700, 0x2EBE1), (0x30000, 0x323B0))
HANGUL_SYLLABLES = (0xAC00, 0xD7A4)


class Keys(NamedTuple):
    """Keys of n texts, one behind the other; key i is codes[starts[i] : starts[i + 1]]."""

    codes: np.ndarray  # (characters,) uint32 code points
    starts: np.ndarray  # (n + 1,) int64


def comparison_key(text: str) -> str:
    """Only letters, marks and digits of every script, in one width, case and Chinese script."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return unicodedata.normalize("NFC", "".join(filter(_is_content, text)).translate(simplified()))


def keys_of(texts: Texts) -> Keys:
    """`comparison_key` of every text, as code points."""
    table, expansions = key_table()
    codes, starts, slow = _map(texts.data, texts.starts, table, expansions)
    if slow.any():
        codes, starts = _replace(texts, codes, starts, slow)
    return Keys(codes, starts)


@cache
def _is_content(char: str) -> bool:
    """Letters and numbers, and marks: vowel signs and accents carry meaning, variation selectors do not."""
    if char.isalnum() or any(first <= ord(char) < end for first, end in IDEOGRAPHS):  # also of newer Unicodes
        return True
    is_selector = "\ufe00" <= char <= "\ufe0f" or char >= "\U000e0000"
    return unicodedata.category(char)[0] == "M" and not is_selector


@cache
def simplified() -> dict[int, str]:
    """Traditional -> simplified characters, one by one (OpenCC's table without its phrases)."""
    from opencc import OpenCC

    ideographs = [chr(code) for first, end in IDEOGRAPHS[:3] for code in range(first, end)]
    converted = OpenCC("t2s").convert("\n".join(ideographs)).split("\n")
    simple = {a: b for a, b in zip(ideographs, converted, strict=True) if a != b}
    return {ord(a): simple.get(b, b) for a, b in simple.items()}  # a few take two steps


@cache
def key_table() -> tuple[np.ndarray, np.ndarray]:
    """For every code point the code point of its key, 0 for none, or a flag; and rows of longer keys.

    Returns (TABLE_SIZE,) uint32 and (m, 3) uint32. An expansion that is longer than the UTF-8 bytes of its
    character is left to the slow way, so that a buffer of as many codes as there are bytes always suffices.
    """
    table = np.zeros(TABLE_SIZE, np.uint32)
    for first, end in (*IDEOGRAPHS, HANGUL_SYLLABLES):
        table[first:end] = np.arange(first, end)
    for code, char in simplified().items():
        table[code] = ord(char)
    is_simple = table > 0
    merging = composing()
    expansions = [(0, 0, 0)]
    for code in np.flatnonzero(~is_simple).tolist():
        char = chr(code)
        if unicodedata.category(char) in ("Cn", "Cs", "Co"):
            continue
        if merging.intersection(unicodedata.normalize("NFKD", char)):
            table[code] = SLOW
            continue
        key = comparison_key(char)
        if len(key) <= 1:
            table[code] = ord(key) if key else 0
        elif len(key) <= min(3, len(char.encode())):
            table[code] = LONG | np.uint32(len(expansions))
            expansions.append((*map(ord, key), *[0] * (3 - len(key))))
        else:
            table[code] = SLOW
    return table, np.array(expansions, np.uint32)


@cache
def composing() -> set[str]:
    """Characters that normalisation may merge with, or sort among, those before them."""
    jamo = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    found = set(jamo)
    for code in range(TABLE_SIZE):
        char = chr(code)
        if unicodedata.combining(char):
            found.add(char)
        parts = unicodedata.decomposition(char).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return found


@njit(cache=True, nogil=True)
def decode(data, i):
    """The code point at byte i of UTF-8 text, and its number of bytes.

    i and both results are uint64: a signed index would be checked for being negative, here a fifth of the time.
    """
    lead = np.uint64(data[i])
    if lead < 0x80:
        return lead, np.uint64(1)
    second = np.uint64(data[i + np.uint64(1)] & 0x3F)
    if lead < 0xE0:
        return (lead & np.uint64(0x1F)) << np.uint64(6) | second, np.uint64(2)
    third = np.uint64(data[i + np.uint64(2)] & 0x3F)
    code = (lead & np.uint64(0x0F)) << np.uint64(12) | second << np.uint64(6) | third
    if lead < 0xF0:
        return code, np.uint64(3)
    fourth = np.uint64(data[i + np.uint64(3)] & 0x3F)
    return (code << np.uint64(6) | fourth) & np.uint64(0x1FFFFF), np.uint64(4)


@njit(cache=True, nogil=True)
def _map(data, starts, table, expansions):
    """Look every code point up; returns codes, their starts, and which texts need care."""
    codes = np.empty(len(data), np.uint32)
    new_starts = np.zeros(len(starts), np.int64)
    slow = np.zeros(len(starts) - 1, np.bool_)
    out = np.uint64(0)
    for text in range(len(starts) - 1):
        i, end = np.uint64(starts[text]), np.uint64(starts[text + 1])
        while i < end:
            code, width = decode(data, i)
            i += width
            key = table[code] if code < np.uint64(TABLE_SIZE) else np.uint32(0)
            if key < LONG:
                codes[out] = key
                out += np.uint64(key != 0)
            elif key >= SLOW:
                slow[text] = True
            else:
                for part in expansions[key - LONG]:
                    codes[out] = part
                    out += np.uint64(part != 0)
        new_starts[text + 1] = out
    return codes[:out], new_starts, slow


def _replace(
    texts: Texts, codes: np.ndarray, starts: np.ndarray, slow: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Put in the keys of the texts that need the slow way."""
    parts, sizes, last = [], np.diff(starts), 0
    for index in np.flatnonzero(slow).tolist():
        key = np.frombuffer(comparison_key(texts.text(index)).encode("utf-32-le"), np.uint32)
        parts += [codes[starts[last] : starts[index]], key]
        sizes[index] = len(key)
        last = index + 1
    parts.append(codes[starts[last] :])
    return np.concatenate(parts), np.concatenate([np.zeros(1, np.int64), sizes.cumsum()])
