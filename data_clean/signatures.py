"""Documents as short signatures that resemble each other as the documents do.

MinHash (Broder 1997, https://doi.org/10.1109/SEQUEN.1997.666900): the least value of a random hash over the
n-grams of a key; two documents agree in it with the probability of the Jaccard similarity of their n-gram
sets. Locality-sensitive hashing groups the `num_perm` values in `bands`: documents that agree in all values of
some band are compared. SimHash (Charikar 2002, https://doi.org/10.1145/509907.509965): 64 bits, each the
majority vote of the n-grams' bits; nearly equal documents differ in few bits.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numba import njit
from xxhash import xxh3_64_intdigest

from data_clean.keys import Keys

Method = Literal["minhash", "simhash", "none"]
STEP = 8  # n-grams hashed between two looks at a signature: its values then stay in registers longer


@dataclass(frozen=True)
class Settings:
    """How near duplicates are found."""

    method: Method = "minhash"
    ngram: int = 3  # characters
    num_perm: int = 128  # MinHash values of a document
    bands: int = 21  # groups of num_perm // bands values
    threshold: float = 0.65  # Jaccard similarity from which a MinHash candidate is a duplicate
    distance: int = 6  # SimHash bits in which duplicates may differ
    seed: int = 0

    @property
    def rows(self) -> int:
        """MinHash values in a band."""
        return self.num_perm // self.bands

    @cached_property
    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor (odd) and shift of every hash x -> factor * x + shift modulo 2**32, (num_perm,) uint32 each."""
        random = np.random.default_rng(self.seed)
        factors = random.integers(0, 2**31, self.num_perm, np.uint32) * np.uint32(2) + np.uint32(1)
        return factors, random.integers(0, 2**32, self.num_perm, np.uint32)


class Signatures(NamedTuple):
    """What duplicates are found by; the columns of a method that is not used are empty."""

    exact: np.ndarray  # (n,) uint64 hash of the key; 0 for an empty key, which is alike to nothing
    bands: np.ndarray  # (n, bands) uint64 MinHash band keys
    low_bytes: np.ndarray  # (n, num_perm) uint8 MinHash values, their lowest bytes
    simhash: np.ndarray  # (n,) uint64 SimHash fingerprints


def sign(keys: Keys, settings: Settings) -> Signatures:
    """The hash of every key, and its signature by the method that is set."""
    exact = exact_hashes(keys)
    bands, low_bytes = np.empty((0, 0), np.uint64), np.empty((0, 0), np.uint8)
    fingerprints = np.empty(0, np.uint64)
    if settings.method == "minhash":
        bands, low_bytes = minhash(keys, settings)
    elif settings.method == "simhash":
        fingerprints = simhash(keys, settings)
    return Signatures(exact, bands, low_bytes, fingerprints)


def exact_hashes(keys: Keys) -> np.ndarray:
    """xxh3 of every key, (n,) uint64; 0 for an empty one."""
    codes, starts = memoryview(keys.codes).cast("B"), (4 * keys.starts).tolist()
    pairs = pairwise(starts)
    hashes = [max(xxh3_64_intdigest(codes[a:b]), 1) if b > a else 0 for a, b in pairs]
    return np.array(hashes, np.uint64)


def minhash(keys: Keys, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Band keys (n, bands) uint64, and the lowest byte of every MinHash value (n, num_perm) uint8.

    Documents with an empty key have band keys 0: they are alike to nothing.
    """
    return _minhash(*keys, settings.ngram, *settings.hashes, settings.bands)


def simhash(keys: Keys, settings: Settings) -> np.ndarray:
    """Fingerprints, (n,) uint64; 0 for an empty key."""
    return _simhash(*keys, settings.ngram)


@njit(cache=True, nogil=True)
def gram_hashes(codes, first, end, ngram, out):
    """Hash every n-gram of codes[first:end] (a shorter text is one n-gram) into out; returns how many."""
    size = min(ngram, end - first)
    count = end - first - size + 1 if size > 0 else 0
    for i in range(count):
        out[i] = 0
    for offset in range(size):
        for i in range(count):
            out[i] = np.uint32(np.uint32(out[i] * np.uint32(0x9E3779B1)) + codes[first + i + offset])
    for i in range(count):  # spread the bits (MurmurHash3's finaliser)
        h = out[i]
        h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B))
        h = np.uint32((h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35))
        out[i] = h ^ (h >> np.uint32(16))
    return count


@njit(cache=True, nogil=True)
def _minhash(codes, starts, ngram, factors, shifts, bands):
    n, num_perm = len(starts) - 1, len(factors)
    band_keys = np.zeros((n, bands), np.uint64)
    low_bytes = np.empty((n, num_perm), np.uint8)
    grams = np.empty(max(1, (starts[1:] - starts[:-1]).max()) + STEP if n else 1, np.uint32)
    least = np.empty(num_perm, np.uint32)
    for text in range(n):
        count = gram_hashes(codes, starts[text], starts[text + 1], ngram, grams)
        for i in range(count, count + STEP):  # fill the last step up; repeating a member changes no minimum
            grams[i] = grams[0]
        least[:] = 0xFFFFFFFF
        for i in range(0, count, STEP):
            _lower(least, grams[i : i + STEP], factors, shifts)
        if count:
            _fold(least, bands, band_keys[text])
        for p in range(num_perm):
            low_bytes[text, p] = least[p] & np.uint32(0xFF)
    return band_keys, low_bytes


@njit(cache=True, nogil=True)
def _lower(least, grams, factors, shifts):
    """Take STEP n-grams into the minima."""
    a, b, c, d = grams[0], grams[1], grams[2], grams[3]
    e, f, g, h = grams[4], grams[5], grams[6], grams[7]
    for p in range(len(least)):
        factor, shift = factors[p], shifts[p]
        # numba widens uint32 arithmetic to uint64: without the casts the minimum is taken of the wrong value
        one = min(np.uint32(factor * a + shift), np.uint32(factor * b + shift))
        two = min(np.uint32(factor * c + shift), np.uint32(factor * d + shift))
        three = min(np.uint32(factor * e + shift), np.uint32(factor * f + shift))
        four = min(np.uint32(factor * g + shift), np.uint32(factor * h + shift))
        least[p] = min(least[p], min(min(one, two), min(three, four)))


@njit(cache=True, nogil=True)
def _fold(least, bands, out):
    """One 64-bit key for the values of each band; never 0."""
    rows = len(least) // bands
    for band in range(bands):
        key = np.uint64(band)
        for row in range(band * rows, (band + 1) * rows):
            key = (key ^ np.uint64(least[row])) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        out[band] = max(key, np.uint64(1))


@njit(cache=True, nogil=True)
def _simhash(codes, starts, ngram):
    n = len(starts) - 1
    fingerprints = np.zeros(n, np.uint64)
    grams = np.empty(max(1, (starts[1:] - starts[:-1]).max()) if n else 1, np.uint32)
    votes = np.empty(64, np.int32)
    for text in range(n):
        count = gram_hashes(codes, starts[text], starts[text + 1], ngram, grams)
        votes[:] = 0
        for i in range(count):
            h = np.uint64(grams[i]) * np.uint64(0x9E3779B97F4A7C15)  # 32 bits spread over 64
            h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            for bit in range(64):
                votes[bit] += np.int32((h >> np.uint64(bit)) & np.uint64(1))
        for bit in range(64):
            if 2 * votes[bit] > count:
                fingerprints[text] |= np.uint64(1) << np.uint64(bit)
    return fingerprints
