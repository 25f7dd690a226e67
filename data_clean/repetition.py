"""How much a text repeats itself, in n-grams of characters: exact, in a few compiled passes.

An n-gram that is repeated consists of two shorter ones that are, so the names of 4-grams follow from those of
2-grams, and so on (prefix doubling: Karp, Miller, Rosenberg 1972, https://doi.org/10.1145/800152.804905). From
step to step fewer places are left to look at, and as names are compared, not hashes, nothing can collide.

The loops over all characters have no branches that depend on the text: mispredicted ones took most of the time.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

SAMPLE = 20_000  # characters looked at: in a whole book even good prose repeats itself
ECHO = 20  # characters within which a repeated phrase is an echo
PADDING = 16  # zeros behind the names, where longer n-grams look for their second half
SLOTS = 1 << 18  # of the hash table, 6 or more for each n-gram: few collide
HASH = np.uint64(0x9E3779B97F4A7C15)
LOGARITHMS = np.log(np.maximum(np.arange(SAMPLE + 1), 1))
# What `repetition` counts.
FUNCTION_WORDS, TOP2, TOP3, TOP4, REPEATED8, REPEATED12, REPEATED16, ECHOES, REPETITIONS = range(9)


class Room(NamedTuple):
    """Buffers that serve one text after the other. Names are numbers from 1; 0 stands for what occurs once."""

    first: np.ndarray  # (0x110000,) int32 name of a character, 0 while it has not occurred
    names: np.ndarray  # (5, SAMPLE + PADDING) int32 names by place of characters, 2-, 4-, 8-grams, others
    places: np.ndarray  # (4, SAMPLE + 1) int32 where repeated 2-, 4-, 8-grams and others are
    keys: np.ndarray  # (SAMPLE + 1,) int64 both parts of an n-gram, by its name
    counts: np.ndarray  # (SAMPLE + 1,) int32 occurrences by name
    last: np.ndarray  # (SAMPLE + 1,) int32 place of the last occurrence by name
    table: np.ndarray  # (SLOTS,) int32 hash table of names


def room() -> Room:
    """New buffers."""
    shapes = (0x110000, (5, SAMPLE + PADDING), (4, SAMPLE + 1), SAMPLE + 1, SAMPLE + 1, SAMPLE + 1, SLOTS)
    types = [np.int32] * 3 + [np.int64] + [np.int32] * 3
    return Room(*map(np.zeros, shapes, types))


@njit(cache=True, nogil=True)
def repetition(text, words, first, names, places, keys, counts, last, table, tally):
    """Count function words and n-grams into tally, (REPETITIONS,) int64; returns the entropy of the characters.

    text: (size,) uint32 code points, 1 to SAMPLE. TOP: occurrences, after the first, of the most frequent n-gram;
    REPEATED: characters in n-grams that occurred before; ECHOES: 8-grams that occurred at most ECHO characters before.
    """
    names[1:, : len(text) + PADDING] = 0
    one, two, four, eight, other = names[0], names[1], names[2], names[3], names[4]
    twos, fours, eights, others = places[0], places[1], places[2], places[3]
    entropy, n = _name_characters(text, words, first, one, twos, counts, tally)
    n, tally[TOP2], _, _ = _join(one, one, 1, 2, twos, n, two, twos, keys, counts, last, table)
    _, tally[TOP3], _, _ = _join(two, one, 2, 3, twos, n, other, others, keys, counts, last, table)
    n, tally[TOP4], _, _ = _join(two, two, 2, 4, twos, n, four, fours, keys, counts, last, table)
    n, _, repeated, echoes = _join(four, four, 4, 8, fours, n, eight, eights, keys, counts, last, table)
    tally[REPEATED8], tally[ECHOES] = repeated, echoes
    _, _, repeated, _ = _join(eight, four, 8, 12, eights, n, other, others, keys, counts, last, table)
    tally[REPEATED12] = repeated
    _, _, repeated, _ = _join(eight, eight, 8, 16, eights, n, other, others, keys, counts, last, table)
    tally[REPEATED16] = repeated
    return entropy


@njit(cache=True, nogil=True)
def _name_characters(text, words, first, names, places, counts, tally):
    """Name the characters; returns their entropy, and how many places may hold a repeated 2-gram."""
    size = len(text)
    counts[: size + 1] = 0
    for i in range(size):
        code = text[i]
        name = first[code]
        name += np.int32(i + 1) * np.int32(name == 0)  # a conditional would be a branch
        first[code] = name
        counts[name] += np.int32(1)
        names[i] = name
    names[size : size + PADDING] = 0
    for code in words:
        tally[FUNCTION_WORDS] += first[code] != 0
    n, was_repeated, logarithms = 0, np.int32(0), 0.0
    for i in range(size):
        first[text[i]] = 0
        count = counts[names[i]]
        logarithms += LOGARITHMS[count]
        is_repeated = np.int32(count > 1)
        names[i] *= is_repeated
        places[n] = i - 1
        n += np.int64(is_repeated & was_repeated)
        was_repeated = is_repeated
    return np.log(size) - logarithms / size, n


@njit(cache=True, nogil=True)
def _join(left, right, offset, length, places, n, names, kept_places, keys, counts, last, table):
    """Name the n-grams of this length made of one named in `left` and one `offset` characters behind.

    Returns how many of n places hold a repeated one, which go to kept_places; how often the most frequent one
    occurs again; and of n-grams that occurred before, how many characters are in them, and how many are echoes.
    """
    m = 0
    for k in range(n):
        i = np.uint64(places[k])
        one, other = np.int64(left[i]), np.int64(right[i + np.uint64(offset)])
        kept_places[m] = i
        keys[m + 1] = one << 16 | other
        m += np.int64((one != 0) & (other != 0))
    mask = np.uint64(15)
    while mask < 6 * m:
        mask = np.uint64(2) * mask + np.uint64(1)
    table[: np.int64(mask) + 1] = 0
    counts[: m + 1] = 0
    for k in range(m):
        key = keys[k + 1]
        keys[0] = key  # so that a free slot ends the search, too
        slot = (np.uint64(key) * HASH >> np.uint64(32)) & mask
        while keys[table[slot]] != key:
            slot = (slot + np.uint64(1)) & mask
        name = table[slot]
        name += np.int32(k + 1) * np.int32(name == 0)
        table[slot] = name
        counts[name] += np.int32(1)
        names[kept_places[k]] = name
    kept, top, covered, echoes, end = 0, np.int32(1), 0, 0, 0
    for k in range(m):
        i = kept_places[k]
        name = names[i]
        count = counts[name]
        top = max(top, count)
        if length >= 8 and count > 1:
            if name != k + 1:
                covered += i + length - max(np.int64(i), end)
                end = np.int64(i) + length
                echoes += np.int64(i) - np.int64(last[name]) <= ECHO
            last[name] = i
        is_repeated = np.int32(count > 1)
        names[i] = name * is_repeated
        kept_places[kept] = i
        kept += np.int64(is_repeated)
    return kept, np.int64(top) - 1, covered, echoes
