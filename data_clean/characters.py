"""What kind of character every code point is, and the UTF-8 decoder, for compiled passes over texts."""

import unicodedata
from functools import cache

import numpy as np
from numba import njit

from data_clean.keys import IDEOGRAPHS, TABLE_SIZE

# Groups of characters: the low bits of a kind.
LETTER, DIGIT, PUNCTUATION, SYMBOL, SPACE, HAN = range(6)  # marks are letters; what is nothing else, a symbol
GROUP = 0b111
SENTENCE_END = 1 << 3  # ends a sentence
LINE_END = 1 << 4  # a complete line may end with it
BULLET = 1 << 5  # an item of a list begins with it
BRACKET = 1 << 6  # 【 or 】

SENTENCE_ENDS = "。！？!?"
# Closing quotes and brackets count: much prose ends its paragraphs with them.
LINE_ENDS = "。！？!?…⋯；;：:．.｡～~”’\"'」』）)】》〉］]"
BULLETS = "•‣●○◦■□▪▫◆◇▶◀※·➢–-*+"  # MAP-CC's (presets.py) and Markdown's
U1, U2, U3, U4, U6, U7, U12, U18, UF, U1F = map(np.uint64, (1, 2, 3, 4, 6, 7, 12, 18, 0xF, 0x1F))
GROUPS = {"L": LETTER, "M": LETTER, "N": DIGIT, "P": PUNCTUATION, "S": SYMBOL}


@cache
def kinds() -> np.ndarray:
    """Group and flags of every code point, (0x110000,) uint32; bits from 8 on are left to keyword classes."""
    table = np.full(0x110000, SYMBOL, np.uint32)
    categories = map(unicodedata.category, map(chr, range(TABLE_SIZE)))
    table[:TABLE_SIZE] = [GROUPS.get(category[0], SYMBOL) for category in categories]
    for first, end in (*IDEOGRAPHS, (0x3005, 0x3006), (0x3007, 0x3008)):  # and 々〇
        table[first:end] = HAN
    table[[code for code in range(0x3001) if chr(code).isspace()]] = SPACE
    table[0xFE00:0xFE10] = SYMBOL  # variation selectors carry nothing
    flags = ((SENTENCE_ENDS, SENTENCE_END), (LINE_ENDS, LINE_END), (BULLETS, BULLET), ("【】", BRACKET))
    for chars, flag in flags:
        table[list(map(ord, chars))] |= np.uint32(flag)
    return table


@njit(cache=True, nogil=True)
def decode(data, i):
    """The code point of the valid UTF-8 at data[i], and where the next one begins; all uint64.

    Unsigned, because numba spares them the test whether an index counts from the end.
    """
    lead = np.uint64(data[i])
    if lead < 0x80:
        return lead, i + U1
    second = np.uint64(data[i + U1] & 0x3F)
    if lead < 0xE0:
        return (lead & U1F) << U6 | second, i + U2
    third = second << U6 | np.uint64(data[i + U2] & 0x3F)
    if lead < 0xF0:
        return (lead & UF) << U12 | third, i + U3
    return (lead & U7) << U18 | third << U6 | np.uint64(data[i + U3] & 0x3F), i + U4
