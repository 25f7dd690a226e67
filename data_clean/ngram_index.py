"""Which questions of a set does a document contain, nearly whole? Compiled, about 2.5 ns a character.

The questions are indexed by their n-grams. A document is read once with a rolling hash; where its n-grams are
known, they are laid over the question that they come from, and when they cover enough of it within one stretch
of the document, the document contains that question. Unlike a single long n-gram this survives a changed
character, and unlike a single short one it is not satisfied by a phrase.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.lib.stride_tricks import sliding_window_view

SHARE = 0.6  # of a question's characters that must be found
MINIMUM = 13  # characters that must be found at least; questions that have fewer are not looked for
ASKS = 8  # characters at the end that ask: half must be found, or one and half of the options
DISTINCT = 4  # different characters in an n-gram that says anything, unlike 01010101
COMMON = 3  # items that may have an n-gram before it is a set phrase, which says nothing
GAP = 50  # characters of the document between two n-grams of the same occurrence, at most

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # of the rolling polynomial hash, modulo 2^64
SPREAD = np.uint64(0xD6E8FEB86659FD93)  # odd: carries every bit into the upper ones, and loses none
HALF = np.uint64(32)
BLOOM_BITS = 16  # of the filter for each n-gram: one unknown n-gram in 400 passes


class Index(NamedTuple):
    """Known texts, each one form of an item: their n-grams, and how much of each must be found."""

    ngram: int
    item: np.ndarray  # (texts,) int32: what the text is a form of
    part: np.ndarray  # (characters,) int8, of all texts: see `parts`
    need: np.ndarray  # (texts, 3) int32: characters to be found, in all, of part 1, of part 2
    hashes: np.ndarray  # (n-grams,) uint64, sorted
    uses: np.ndarray  # (n-grams + 1,) int64: n-gram g is in text[uses[g] : uses[g + 1]], at place[the same]
    text: np.ndarray  # (uses,) int32
    place: np.ndarray  # (uses,) int32: the character, of those of all texts, where the n-gram begins
    buckets: np.ndarray  # (2^b + 1,) int32: of upper bits u are hashes[buckets[u] : buckets[u + 1]]
    bucket_shift: np.uint64
    bloom: np.ndarray  # (2^w,) uint64
    bloom_shift: np.uint64
    drop: np.uint64  # FACTOR ** ngram: takes a character out of the rolling hash again


class Found(NamedTuple):
    """What is known of each text while documents are read; places are those of the documents, from 1."""

    begin: np.ndarray  # (texts,) int64: where the first n-gram of the present occurrence ended
    end: np.ndarray  # (texts,) int64: where its latest n-gram ended
    covered: np.ndarray  # (texts, 3) int32: characters found, in all, of part 1, of part 2
    seen: np.ndarray  # (characters,) int64: the occurrence (its begin) that found the character last


def build_index(
    codes: np.ndarray, starts: np.ndarray, item: np.ndarray, question: np.ndarray, ngram: int
) -> Index:
    """Index texts; those with too little to recognise them by are left out.

    codes: (characters,) uint32, text i is codes[starts[i] : starts[i + 1]]. item: (texts,), not decreasing.
    question: (texts,) characters of the question that each text begins with; the rest are its options.
    """
    text_of = np.repeat(np.arange(len(item)), np.diff(starts))  # (characters,)
    hashes, place = telling_ngrams(codes, text_of, item, ngram)
    begun, ended = (np.bincount(ends, minlength=len(codes) + 1) for ends in (place, place + ngram))
    part = parts((begun - ended).cumsum()[:-1] > 0, starts, question)
    chosen = (part >= 0, part == 1, part == 2)
    sizes = [np.bincount(text_of[which], minlength=len(item)) for which in chosen]  # (texts,) each
    asked = np.where(sizes[2] > 0, np.minimum(sizes[1], 1), np.ceil(0.5 * sizes[1]))
    need = [np.maximum(np.ceil(SHARE * sizes[0]), MINIMUM), asked, np.ceil(0.5 * sizes[2])]
    is_used = sizes[0][text_of[place]] >= MINIMUM
    hashes, place = hashes[is_used], place[is_used]
    is_first = starts_of_runs(hashes)
    buckets, bloom = bucket_bounds(hashes[is_first]), bloom_filter(hashes[is_first])
    return Index(
        ngram=ngram,
        item=item.astype(np.int32),
        part=part.astype(np.int8),
        need=np.stack(need, axis=1).astype(np.int32),
        hashes=hashes[is_first],
        uses=np.append(np.flatnonzero(is_first), len(hashes)),
        text=text_of[place].astype(np.int32),
        place=place.astype(np.int32),
        buckets=buckets,
        bucket_shift=shift_for(buckets),
        bloom=bloom,
        bloom_shift=shift_for(bloom),
        drop=np.uint64(pow(int(FACTOR), ngram, 1 << 64)),
    )


def parts(is_telling: np.ndarray, starts: np.ndarray, question: np.ndarray) -> np.ndarray:
    """What each character belongs to, (characters,): 1 the end of a question, 2 options, 0 the rest of a question.

    -1: it lies in no n-gram that says anything, and does not count. starts, question: as in `build_index`.
    """
    before = np.concatenate([[0], is_telling.cumsum()])  # (characters + 1,): telling ones before each
    sizes, ends = np.diff(starts), starts[:-1] + question
    in_options = np.arange(len(is_telling)) >= np.repeat(ends, sizes)
    asks = before[:-1] >= np.repeat(before[ends] - ASKS, sizes)
    return np.where(is_telling, np.where(in_options, 2, asks), -1)


def telling_ngrams(
    codes: np.ndarray, text_of: np.ndarray, item: np.ndarray, ngram: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams that say something, sorted, and where each begins: its first place in each text."""
    if len(codes) < ngram:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    is_inside = text_of[: len(codes) - ngram + 1] == text_of[ngram - 1 :]
    place = np.flatnonzero(is_inside & (distinct_characters(codes, ngram) >= min(DISTINCT, ngram)))
    hashes = hash_windows(codes, ngram)[place]
    order = np.lexsort((place, hashes))
    hashes, place = hashes[order], place[order]
    first_in_text = starts_of_runs(hashes) | starts_of_runs(text_of[place])
    hashes, place = hashes[first_in_text], place[first_in_text]
    is_first = starts_of_runs(hashes)
    ngram_of = is_first.cumsum() - 1
    is_new_item = is_first | starts_of_runs(item[text_of[place]])
    is_telling = np.bincount(ngram_of[is_new_item])[ngram_of] <= COMMON if len(place) else is_first
    return hashes[is_telling], place[is_telling]


def starts_of_runs(values: np.ndarray) -> np.ndarray:
    """Where a value differs from the one before it, (n,) bool."""
    return np.append(True, values[1:] != values[:-1])[: len(values)]


def distinct_characters(codes: np.ndarray, ngram: int) -> np.ndarray:
    """How many different characters each n-gram has, (characters - ngram + 1,)."""
    windows = np.sort(sliding_window_view(codes, ngram), axis=1)  # (n-grams, ngram)
    return 1 + np.count_nonzero(windows[:, 1:] != windows[:, :-1], axis=1)


def hash_windows(codes: np.ndarray, ngram: int) -> np.ndarray:
    """Hash of every n-gram, the same that `scan` rolls, (characters - ngram + 1,) uint64."""
    codes = codes.astype(np.uint64)
    hashes = np.zeros(len(codes) - ngram + 1, np.uint64)
    for offset in range(ngram):
        hashes = hashes * FACTOR + codes[offset : offset + len(hashes)]
    hashes *= SPREAD
    return hashes ^ (hashes >> HALF)


def bucket_bounds(hashes: np.ndarray) -> np.ndarray:
    """Where each value of the upper bits begins among sorted hashes: about one hash to a bucket."""
    bits = max(len(hashes).bit_length(), 1)
    uppers = np.arange((1 << bits) + 1, dtype=np.uint64)
    return np.searchsorted(hashes >> np.uint64(64 - bits), uppers).astype(np.int32)


def bloom_filter(hashes: np.ndarray) -> np.ndarray:
    """A filter that every known hash passes: three bits of one word, so that a miss costs one look."""
    bits = max((len(hashes) * BLOOM_BITS // 64).bit_length(), 1)
    words = np.zeros(1 << bits, np.uint64)
    np.bitwise_or.at(words, hashes >> shift_for(words), bloom_mask(hashes))
    return words


def bloom_mask(h: np.ndarray) -> np.ndarray:
    """The three bits of a hash, given by its lowest 18."""
    one, low = np.uint64(1), np.uint64(63)
    return (one << (h & low)) | (one << (h >> np.uint64(6) & low)) | (one << (h >> np.uint64(12) & low))


def shift_for(table: np.ndarray) -> np.uint64:
    """By how much to shift a hash so that its upper bits number the cells of a table of 2^b (+ 1) cells."""
    return np.uint64(65 - len(table).bit_length())


def empty_found(index: Index) -> Found:
    """Working memory of one call of `scan`; pages that are not touched cost nothing."""
    begin, end = np.zeros((2, len(index.item)), np.int64)
    return Found(begin, end, np.zeros_like(index.need), np.zeros(len(index.part), np.int64))


compiled_mask = njit(bloom_mask)


@njit(cache=True, nogil=True)
def scan(
    keys: np.ndarray, starts: np.ndarray, index: Index, found: Found, items: np.ndarray, begins: np.ndarray
) -> None:
    """Read documents: items[i] becomes the first item that document i contains, begins[i] where in `keys`.

    keys: (characters,) uint32, document i is keys[starts[i] : starts[i + 1]]. items, begins: (n,), written
    only for documents that contain an item.
    """
    for document in range(len(starts) - 1):
        start, end = starts[document], starts[document + 1]
        lead = start + index.ngram - 1
        rolling, gone = np.uint64(0), np.uint64(0)
        for i in range(start, min(lead, end)):
            rolling = rolling * FACTOR + np.uint64(keys[i])
        for i in range(lead, end):
            rolling = rolling * FACTOR + (np.uint64(keys[i]) - gone)
            gone = np.uint64(keys[i - index.ngram + 1]) * index.drop
            h = rolling * SPREAD
            h ^= h >> HALF
            mask = compiled_mask(h)
            if index.bloom[h >> index.bloom_shift] & mask != mask:
                continue
            upper = h >> index.bucket_shift
            text = -1
            for gram in range(index.buckets[upper], index.buckets[upper + np.uint64(1)]):
                if index.hashes[gram] == h:
                    text = lay_over(gram, start, i + 1, index, found)
            if text >= 0:
                items[document] = index.item[text]
                begins[document] = found.begin[text] - index.ngram
                break


@njit(cache=True, nogil=True)
def lay_over(gram: int, start: int, end: int, index: Index, found: Found) -> int:
    """Note an n-gram, ending at place `end` of a document from `start`; the text that is now found, or -1."""
    for use in range(index.uses[gram], index.uses[gram + 1]):
        text, place = index.text[use], index.place[use]
        covered, need = found.covered[text], index.need[text]
        if found.end[text] <= start or end - found.end[text] > GAP:
            found.begin[text] = end
            covered[:] = 0
        found.end[text] = end
        for character in range(place, place + index.ngram):
            part = index.part[character]
            if part >= 0 and found.seen[character] != found.begin[text]:
                found.seen[character] = found.begin[text]
                covered[0] += 1
                if part > 0:
                    covered[part] += 1
        if covered[0] >= need[0] and covered[1] >= need[1] and covered[2] >= need[2]:
            return text
    return -1
