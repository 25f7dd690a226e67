"""Traces of damage, measured on the raw text because normalising removes them: control characters, mojibake."""

from functools import cache

import numpy as np
from numba import njit

from data_clean.characters import decode
from data_clean.texts import Texts

# name of a column -> what it measures, in the words of the report
RAW_FEATURES = {"controls": "控制字符占比", "mojibake": "乱码字符占比"}
CONTROL, TRACE, LATIN, WINDOWS, FILLER = 1, 2, 4, 8, 16
# Hardly used in Chinese, but in every text that was decoded as the wrong one: the replacement character; what UTF-8
# becomes when read as GBK (鐨 is 的, 锛 and 銆 begin every comma and full stop), or as Big5; 锟斤拷 is the
# replacement character itself read as GBK. Found by decoding real text wrongly and counting.
TRACES = "\ufffd锟锛銆鐨鏄紝鍚鍙鍏鏈浠嚗銝鈭隞憭摰"
FILLERS = "烫屯"  # uninitialised memory of C programs read as GBK: three or more in a row
# What bytes 0x80 to 0x9f are in Windows-1252, beside 0xa0 to 0xff.
WINDOWS_1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
RUN = 4  # Latin-1 characters in a row: more than any language writes, fewer than any wrongly decoded sentence has


def measure_raw(texts: Texts) -> np.ndarray:
    """Shares of all characters: (n, len(RAW_FEATURES)) float32, columns in the order of RAW_FEATURES.

    A Latin-1 or Windows-1252 character is mojibake in a run of at least four, not all the same, half of them at
    least Latin letters or signs: ä½ å¥½ is one such word (你好), while the accents of French stand alone.
    """
    return _measure_raw(*texts, traces())


@cache
def traces() -> np.ndarray:
    """What a character may be a sign of, (0x110000,) uint8."""
    table = np.zeros(0x110000, np.uint8)
    table[[*range(0x09), *range(0x0E, 0x20), *range(0x7F, 0xA0)]] = CONTROL
    table[0x80:0x100] |= LATIN
    table[[0xB7, 0xD7]] = 0  # · and × often stand in rows in Chinese text
    table[list(map(ord, WINDOWS_1252))] = WINDOWS
    table[list(map(ord, TRACES))] = TRACE
    table[list(map(ord, FILLERS))] = FILLER
    return table


@njit(cache=True, nogil=True)
def _measure_raw(data, starts, table):
    result = np.zeros((len(starts) - 1, 2), np.float32)
    for text in range(len(starts) - 1):
        i, stop = np.uint64(starts[text]), np.uint64(starts[text + 1])
        characters, controls, mojibake = 0, 0, 0
        run, letters, is_mixed, same, previous = 0, 0, False, 0, np.uint64(0)
        while i < stop:
            code, i = decode(data, i)
            characters += 1
            sign = table[code]
            if sign == 0 and run == 0:
                previous = code
                continue
            controls += sign & CONTROL != 0
            mojibake += sign == TRACE
            same = same + 1 if code == previous else 1
            if sign == FILLER and same >= 3:
                mojibake += 3 if same == 3 else 1
            if sign & (LATIN | WINDOWS) != 0:
                run += 1
                is_mixed |= run > same
                letters += sign & LATIN != 0
            else:
                mojibake += _misread(run, letters, is_mixed)
                run, letters, is_mixed = 0, 0, False
            previous = code
        mojibake += _misread(run, letters, is_mixed)
        if characters:
            result[text, 0], result[text, 1] = controls / characters, mojibake / characters
    return result


@njit(cache=True, nogil=True)
def _misread(run, letters, is_mixed):
    """How many characters of a run of Latin-1 and Windows-1252 characters are mojibake: all or none."""
    return run if run >= RUN and is_mixed and 2 * letters >= run else 0
