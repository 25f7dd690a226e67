"""Which documents of a corpus are duplicates of each other, and which of them stays.

Documents with equal keys are duplicates. Others are candidates if they share a bucket of locality-sensitive
hashing (see signatures.py) and their whole signatures agree well enough; MinHash candidates are then verified by
the exact Jaccard similarity of their n-gram sets, because texts that follow one template and differ in facts
share buckets too. Verified pairs are joined to clusters (union-find), and of each cluster one document stays.

Memory: 10 bytes per document and, whatever the size of the corpus, about 0.6 GB for the keys of one band and the
signatures and texts that are being compared; everything else stays on disk.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from numba import njit
from tqdm import tqdm

from data_clean.jaccard import similarities
from data_clean.keys import keys_of
from data_clean.shards import Corpus, Documents, Shard, write_shard
from data_clean.signatures import Settings, sign
from data_clean.texts import from_strings

PARTITION = 1 << 24  # keys sorted at a time
BLOCK = 1 << 18  # documents whose signatures are compared at a time
MOST_COMPARED = 256  # documents of its bucket that one is compared with: no bucket costs quadratic time
SHARD = 3000  # texts in memory that are taken at a time: the memory of small batches is used again
PAIRS = 1 << 20  # candidate pairs in memory
VERIFY_CHARACTERS = 4 << 20  # of the candidate pairs that a thread verifies at a time

Column = Callable[[Shard], np.ndarray]  # the keys of a shard's documents, (count,) uint64
Join = Callable[[Corpus, np.ndarray, np.ndarray, Settings], None]  # corpus, parent, alive, settings
Buckets = tuple[np.ndarray, np.ndarray]  # members (m,) int64, and where each one's bucket begins, (m,) int64


class Clusters(NamedTuple):
    """The documents that have duplicates, in ascending order."""

    members: np.ndarray  # (m,) int64 numbers of the documents
    kept: np.ndarray  # (m,) int64 number of the document that stays of each one's cluster
    is_exact: np.ndarray  # (m,) bool: a document that is preferred has the same key


def find_clusters(
    corpus: Corpus, settings: Settings, join: Join, rank: Callable[[str], int] = lambda source: 0
) -> Clusters:
    """Find all duplicates of a corpus and choose what stays.

    join: unites near duplicates, see `join_near`. rank: of a data set; lower is preferred. Of a cluster stays a
    reference document, else that of the best data set, of these the longest, of these the first.
    """
    parent = apart(corpus)
    alive = join_equal(corpus, parent)
    join(corpus, parent, alive, settings)
    return choose(corpus, parent, rank)


def apart(corpus: Corpus) -> np.ndarray:
    """A union-find in which every document is alone."""
    return np.arange(len(corpus), dtype=np.int32 if len(corpus) < 2**31 else np.int64)


def join_equal(corpus: Corpus, parent: np.ndarray) -> np.ndarray:
    """Unite the documents with equal keys; returns which are still to be compared, (n,) bool."""
    alive = np.concatenate([np.empty(0, bool), *(shard.column("exact") > 0 for shard in corpus.shards)])
    for members, begins in buckets(corpus, alive, lambda shard: shard.column("exact")):
        unite(parent, members, members[begins])
        alive[members[begins != np.arange(len(begins))]] = False  # the first speaks for its equals
    return alive


def join_near(
    corpus: Corpus, parent: np.ndarray, alive: np.ndarray, settings: Settings, threads: int = 1
) -> None:
    """Unite near duplicates, in `parent`, among the documents that are `alive`."""
    if settings.method == "minhash":
        join_by_minhash(corpus, parent, alive, settings, range(settings.bands), threads)
    elif settings.method == "simhash":
        join_by_simhash(corpus, parent, alive, settings)


def join_by_minhash(
    corpus: Corpus,
    parent: np.ndarray,
    alive: np.ndarray,
    settings: Settings,
    bands: Sequence[int],
    threads: int = 1,
) -> None:
    """Unite the documents that share one of these bands and are similar, band by band."""
    # The signature errs by more than three standard deviations once in a thousand times.
    margin = 3 * (settings.threshold * (1 - settings.threshold) / settings.num_perm) ** 0.5
    least_equal = int(np.ceil((settings.threshold - margin) * settings.num_perm))
    with ThreadPoolExecutor(threads) as pool:
        for band in tqdm(bands, desc="近似去重", unit=" 段", disable=None):
            for members, begins in buckets(corpus, alive, lambda shard, b=band: shard.column("bands")[b]):
                low_bytes = corpus.rows("low_bytes", members)
                active = np.arange(len(members))
                next_one = active - 1  # whom to compare with next, going back in the bucket
                most = 1
                while len(active):
                    # At first one each: where it is similar, most others in the bucket need no comparison any more.
                    left, right, active = candidates(
                        active, begins, next_one, members, parent, low_bytes, least_equal, most
                    )
                    pairs = np.stack([members[left], members[right]], axis=1)
                    similar = verify(corpus, pairs, settings.ngram, pool) >= settings.threshold
                    unite(parent, pairs[similar, 0], pairs[similar, 1])
                    most = max(1, min(2 * most, PAIRS // max(1, len(active))))


def join_by_simhash(corpus: Corpus, parent: np.ndarray, alive: np.ndarray, settings: Settings) -> None:
    """Unite the documents whose fingerprints differ in few bits; nothing is verified.

    Of `blocks` groups of bits, at least blocks - distance are untouched by that many differing bits: documents that
    agree in such a selection share a bucket (Manku et al. 2007, https://doi.org/10.1145/1242572.1242592).
    """
    for mask in tqdm(simhash_masks(len(corpus), settings.distance), desc="SimHash", unit=" 表", disable=None):
        for members, begins in buckets(corpus, alive, lambda shard, m=mask: shard.column("simhash") & m):
            unite_close(begins, members, parent, corpus.rows("simhash", members), settings.distance)


def simhash_masks(documents: int, distance: int) -> list[np.uint64]:
    """The selections of bits to group by: enough bits that buckets stay small in a corpus of this size."""
    for blocks in range(distance + 1, 65):
        groups = np.array_split(np.arange(64, dtype=np.uint64), blocks)
        bits = min(map(len, groups)) * (blocks - distance)
        if documents >> bits <= 64 or blocks == distance + 4:
            break
    ones = [np.bitwise_or.reduce(np.uint64(1) << group) for group in groups]
    return [np.bitwise_or.reduce(chosen) for chosen in combinations(ones, blocks - distance)]


def buckets(corpus: Corpus, alive: np.ndarray, column: Column) -> Iterator[Buckets]:
    """Documents with equal keys, in groups of about BLOCK documents; those alone in their bucket are left out."""
    if not alive.any():
        return
    partitions = int(np.count_nonzero(alive)) // PARTITION + 1
    for partition in range(partitions):
        numbers, keys = [], []
        for shard, first in zip(corpus.shards, corpus.firsts, strict=False):
            part = column(shard)
            chosen = alive[first : first + shard.count]
            if partitions > 1:
                chosen = chosen & (part % np.uint64(partitions) == partition)
            numbers.append(np.flatnonzero(chosen).astype(np.int32 if first < 2**30 else np.int64) + first)
            keys.append(part[chosen])
        yield from grouped(np.concatenate(numbers), np.concatenate(keys))


def grouped(numbers: np.ndarray, keys: np.ndarray) -> Iterator[Buckets]:
    """Group numbers by equal keys."""
    order = np.argsort(keys)
    same = np.diff(keys[order]) == 0  # beside the one before
    in_bucket = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    members, is_first = (
        numbers[order[in_bucket]].astype(np.int64),
        ~np.concatenate([[False], same])[in_bucket],
    )
    if not len(members):
        return
    bucket = np.cumsum(is_first) - 1
    members = members[np.lexsort((members, bucket))]  # sorting left equal keys in any order
    starts = np.flatnonzero(is_first)
    cuts = starts[
        np.unique(np.searchsorted(starts, np.arange(0, len(members), BLOCK)).clip(max=len(starts) - 1))
    ]
    for begin, end in pairwise([*cuts.tolist(), len(members)]):
        yield members[begin:end], starts[bucket[begin:end]] - begin


def verify(corpus: Corpus, pairs: np.ndarray, ngram: int, pool: ThreadPoolExecutor) -> np.ndarray:
    """Exact Jaccard similarity of pairs of documents, (m, 2) -> (m,)."""
    if not len(pairs):
        return np.empty(0)
    lengths = corpus.rows("length", pairs.ravel()).reshape(-1, 2).sum(axis=1)
    chunk = np.cumsum(lengths) // VERIFY_CHARACTERS
    chunks = np.split(pairs, np.flatnonzero(np.diff(chunk)) + 1)
    return np.concatenate(list(pool.map(lambda part: _verify_chunk(corpus, part, ngram), chunks)))


def _verify_chunk(corpus: Corpus, pairs: np.ndarray, ngram: int) -> np.ndarray:
    numbers, local = np.unique(pairs, return_inverse=True)
    return similarities(keys_of(corpus.texts(numbers)), local.reshape(-1, 2), ngram)


def choose(corpus: Corpus, parent: np.ndarray, rank: Callable[[str], int]) -> Clusters:
    """Of each cluster the document that stays."""
    root = flatten(parent)
    joined = np.flatnonzero(root != apart(corpus))
    if not len(joined):
        return Clusters(joined, joined, joined > 0)
    members = np.union1d(joined, root[joined]).astype(np.int64)
    sources = corpus.source_names(members)
    ranks = {name: rank(name) for name in set(sources)}
    order = np.lexsort(  # from the most to the least preferred
        (
            corpus.rows("order", members),
            -corpus.rows("length", members).astype(np.int64),
            np.array([ranks[name] for name in sources], np.int64),
            ~corpus.is_reference(members),
        )
    )
    _, first = np.unique(root[members][order], return_index=True)
    kept_of = dict(zip(root[members][order][first].tolist(), members[order][first].tolist(), strict=True))
    exact = corpus.rows("exact", members)
    is_exact = np.ones(len(members), bool)
    is_exact[order[np.unique(exact[order], return_index=True)[1]]] = False
    kept = np.array([kept_of[number] for number in root[members].tolist()], np.int64)
    return Clusters(members, kept, is_exact)


class Result(NamedTuple):
    """What `deduplicate` found."""

    keep: np.ndarray  # (n,) bool
    cluster: np.ndarray  # (n,) int64 position of the text that stays of each one's cluster


def deduplicate(texts: Sequence[str], settings: Settings, threads: int = 1) -> Result:
    """Duplicates among texts in memory, through the same steps as a corpus on disk."""
    if not len(texts):
        return Result(np.empty(0, bool), np.empty(0, np.int64))
    order = np.arange(len(texts), dtype=np.uint64)
    with TemporaryDirectory() as folder:
        shards = []
        for rows in np.array_split(order, len(texts) // SHARD + 1):
            part = from_strings(texts[int(rows[0]) : int(rows[-1]) + 1])
            documents = Documents(part, np.full(len(rows), "", object), rows)
            signatures = sign(keys_of(part), settings)
            path = Path(folder, str(len(shards)))
            shards.append(Shard(path, write_shard(path, [documents], [signatures], np.zeros(len(rows), int))))
        clusters = find_clusters(Corpus(shards), settings, partial(join_near, threads=threads))
    cluster = order.astype(np.int64)
    cluster[clusters.members] = clusters.kept
    return Result(cluster == order.astype(np.int64), cluster)


@njit(cache=True, nogil=True)
def find(parent, number):
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


@njit(cache=True, nogil=True)
def unite(parent, left, right):
    """Join the clusters of left[i] and right[i]; the lowest number is the root, in whatever order they come."""
    for i in range(len(left)):
        a, b = find(parent, left[i]), find(parent, right[i])
        parent[max(a, b)] = min(a, b)


@njit(cache=True, nogil=True)
def flatten(parent):
    """The root of every document."""
    for number in range(len(parent)):  # a root comes before all that it stands for
        parent[number] = parent[parent[number]]
    return parent


@njit(cache=True, nogil=True)
def candidates(active, begins, next_one, members, parent, low_bytes, least_equal, most):
    """For each active member the next few before it in its bucket that may be duplicates and are not yet known.

    active: (k,) positions of members. next_one: (m,) where each one looks next, lowered here. most: how many to
    find for each. Returns the positions of pairs, and who has not yet seen its whole bucket.
    """
    left, right, going_on = [], [], []
    for i in active:
        last = max(begins[i], i - MOST_COMPARED)
        j, found = next_one[i], 0
        while j >= last and found < most:
            if find(parent, members[i]) != find(parent, members[j]):
                equal = 0
                for p in range(low_bytes.shape[1]):
                    equal += low_bytes[i, p] == low_bytes[j, p]
                if equal >= least_equal:
                    left.append(i)
                    right.append(j)
                    found += 1
            j -= 1
        next_one[i] = j
        if j >= last:
            going_on.append(i)
    return np.array(left, np.int64), np.array(right, np.int64), np.array(going_on, np.int64)


@njit(cache=True, nogil=True)
def unite_close(begins, members, parent, fingerprints, distance):
    """Join the members of a bucket whose fingerprints differ in at most `distance` bits."""
    for i in range(len(begins)):
        for j in range(max(begins[i], i - MOST_COMPARED), i):
            bits = fingerprints[i] ^ fingerprints[j]
            count = 0
            while bits and count <= distance:
                bits &= bits - np.uint64(1)
                count += 1
            if count <= distance:
                a, b = find(parent, members[i]), find(parent, members[j])
                parent[max(a, b)] = min(a, b)
