"""Exact and near duplicates.

Near duplicates: every document is sketched as a row of small numbers such that similar documents agree
in many columns (MinHash: share of equal columns estimates the Jaccard similarity of the n-gram sets;
SimHash: share of equal bits estimates the cosine). Columns are grouped in bands, and only documents that
agree in all columns of some band are compared (LSH). MinHash candidates are then verified by the exact
Jaccard similarity of their n-gram sets: texts that share a template but differ in facts survive.
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from tqdm import tqdm

Pair = tuple[int, int, float]  # dropped document, kept document, their similarity
BLOCK = 1024  # n-grams hashed at a time: 128 hashes of each still fit the processor's cache


def exact_duplicates(keys: Iterable[str]) -> list[Pair]:
    """Documents whose key equals that of an earlier one; empty keys say nothing and are never equal."""
    first: dict[bytes, int] = {}
    pairs = []
    for index, key in enumerate(keys):
        kept = first.setdefault(hashlib.blake2b(key.encode(), digest_size=16).digest(), index)
        if kept != index and key:
            pairs.append((index, kept, 1.0))
    return pairs


def shingles(key: str, ngram: int) -> np.ndarray:
    """The set of character n-grams of a key as sorted 64-bit hashes (of the whole key if it is shorter)."""
    codes = np.frombuffer(key.encode("utf-32-le"), dtype="<u4").astype(np.uint64)
    size = min(ngram, len(codes))
    hashes = np.zeros(max(len(codes) - size + 1, 0) if len(codes) else 0, dtype=np.uint64)
    for offset in range(size):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(hashes)] + np.uint64(1)
    return np.unique(_mix(hashes))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Exact Jaccard similarity of two sets given as sorted arrays; 0 if both are empty."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(len(one) + len(other) - common, 1)


def minhash_sketches(sets: Iterable[np.ndarray], count: int, num_perm: int, seed: int) -> np.ndarray:
    """For each set the least value of each of `num_perm` random bijections over its members."""
    random = np.random.default_rng(seed)
    factor = random.integers(0, 2**31, (num_perm, 1), dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    shift = random.integers(0, 2**32, (num_perm, 1), dtype=np.uint32)
    sketches = np.full((count, num_perm), 2**32 - 1, dtype=np.uint32)
    for sketch, members in zip(sketches, sets, strict=True):
        hashes = (members >> np.uint64(32)).astype(np.uint32)
        for start in range(0, len(hashes), BLOCK):
            permuted = factor * hashes[start : start + BLOCK] + shift
            np.minimum(sketch, permuted.min(axis=1), out=sketch)
    return sketches


def simhash_sketches(sets: Iterable[np.ndarray], count: int) -> np.ndarray:
    """For each set 64 bits: bit k is what the majority of its members have there."""
    sketches = np.zeros((count, 64), dtype=np.uint8)
    for sketch, members in zip(sketches, sets, strict=True):
        ones = np.zeros(64, dtype=np.int64)
        for start in range(0, len(members), BLOCK):
            block = members[start : start + BLOCK]
            ones += np.unpackbits(block.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=0, dtype=np.int64)
        sketch[:] = ones * 2 > len(members)
    return sketches


def buckets(sketches: np.ndarray, bands: int) -> np.ndarray:
    """(documents, bands) -> number of the bucket each falls into; -1 where it is alone there."""
    width = sketches.shape[1] // bands
    result = np.full((len(sketches), bands), -1, dtype=np.int64)
    for band in range(bands):
        mixed = np.zeros(len(sketches), dtype=np.uint64)
        for column in range(band * width, (band + 1) * width):
            mixed = _mix(mixed * np.uint64(31) + sketches[:, column])
        _, bucket, size = np.unique(mixed, return_inverse=True, return_counts=True)
        result[:, band] = np.where(size[bucket] > 1, bucket + band * len(sketches), -1)
    return result


def near_duplicates(
    sketches: np.ndarray,
    bands: int,
    lengths: list[int],
    min_agreement: float,
    similarity: Callable[[int, int], float] | None = None,
    threshold: float = 0.0,
) -> list[Pair]:
    """Drop every document that resembles a longer (or as long, earlier) one that is kept.

    Comparing with kept documents only means that each dropped one has a kept twin: a chain of slight
    changes never drags down a text that resembles none of the survivors.
    """
    bucket_of = buckets(sketches, bands)
    kept_in: dict[int, list[int]] = {}

    def twin_of(index: int, mine: list[int]) -> Pair | None:
        candidates = np.array(
            sorted({kept for bucket in mine for kept in kept_in.get(bucket, ())}), dtype=int
        )
        agreement = (sketches[candidates] == sketches[index]).mean(axis=1)
        # The likeliest first; those far below the threshold by the sketch are not looked at.
        for position in np.argsort(-agreement, kind="stable"):
            if agreement[position] < min_agreement:
                break
            kept = int(candidates[position])
            value = similarity(index, kept) if similarity else float(agreement[position])
            if value >= threshold:
                return index, kept, value
        return None

    pairs = []
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for index in tqdm(order, desc="近似去重", unit=" 篇", disable=None):
        mine = [bucket for bucket in bucket_of[index].tolist() if bucket >= 0]
        twin = twin_of(index, mine) if mine else None
        if twin:
            pairs.append(twin)
        else:
            for bucket in mine:
                kept_in.setdefault(bucket, []).append(index)
    return pairs


def by_minhash(
    keys: list[str], lengths: list[int], ngram: int, num_perm: int, bands: int, threshold: float, seed: int
) -> list[Pair]:
    """Near duplicates by MinHash LSH, each verified by its exact Jaccard similarity."""
    shingles_of = lru_cache(maxsize=512)(lambda index: shingles(keys[index], ngram))
    # The sketch errs by less than four standard deviations, so hardly a true duplicate is missed here.
    margin = 4 * (threshold * (1 - threshold) / num_perm) ** 0.5
    progress = tqdm(keys, desc="MinHash", unit=" 篇", disable=None)
    sketches = minhash_sketches((shingles(key, ngram) for key in progress), len(keys), num_perm, seed)
    return near_duplicates(
        sketches,
        bands,
        lengths,
        min_agreement=threshold - margin,
        similarity=lambda one, other: jaccard(shingles_of(one), shingles_of(other)),
        threshold=threshold,
    )


def by_simhash(keys: list[str], lengths: list[int], ngram: int, distance: int) -> list[Pair]:
    """Near duplicates by 64-bit SimHash: at most `distance` bits differ; nothing is verified further."""
    progress = tqdm(keys, desc="SimHash", unit=" 篇", disable=None)
    sketches = simhash_sketches((shingles(key, ngram) for key in progress), len(keys))
    empty = [index for index, key in enumerate(keys) if not key]
    sketches[empty] = np.random.default_rng(0).integers(0, 2, (len(empty), 64))
    # Of distance + 1 bands, one at least is untouched by `distance` differing bits.
    return near_duplicates(sketches, distance + 1, lengths, min_agreement=1 - distance / 64)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spread 64-bit numbers evenly (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
