"""The readable reference of duplicates.py, on the packages datasketch and simhash: every document in memory, one
at a time. It gives the same clusters, up to the chance of which candidates are looked at, hundreds of times slower.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from data_clean.duplicates import unite
from data_clean.keys import comparison_key
from data_clean.shards import Corpus
from data_clean.signatures import Settings


def join_near(corpus: Corpus, parent: np.ndarray, alive: np.ndarray, settings: Settings) -> None:
    """Unite the documents that are near duplicates by the method that is set."""
    texts = (text for shard in corpus.shards for text in shard.texts().texts())
    keys = {number: comparison_key(text) for number, text in enumerate(texts) if alive[number]}
    pairs = {"minhash": minhash_pairs, "simhash": simhash_pairs}[settings.method](keys, settings)
    left, right = zip(*pairs, strict=True) if (pairs := list(pairs)) else ((), ())
    unite(parent, np.array(left, np.int64), np.array(right, np.int64))


def ngrams(key: str, size: int) -> set[str]:
    """The set of character n-grams; of a shorter key the key itself."""
    return {key[i : i + size] for i in range(max(len(key) - size, 0) + 1)}


def minhash_pairs(keys: dict[int, str], settings: Settings) -> Iterator[tuple[int, int]]:
    """Pairs that share a band and whose exact Jaccard similarity reaches the threshold."""
    from datasketch import MinHash, MinHashLSH

    sets = {number: ngrams(key, settings.ngram) for number, key in keys.items()}
    index = MinHashLSH(num_perm=settings.num_perm, params=(settings.bands, settings.rows))
    for number, grams in tqdm(sets.items(), desc="datasketch", unit=" 篇", disable=None):
        sketch = MinHash(num_perm=settings.num_perm, seed=settings.seed + 1)
        sketch.update_batch([gram.encode() for gram in grams])
        for other in index.query(sketch):
            common = len(grams & sets[other])
            if common >= settings.threshold * (len(grams) + len(sets[other]) - common):
                yield number, other
        index.insert(number, sketch)


def simhash_pairs(keys: dict[int, str], settings: Settings) -> Iterator[tuple[int, int]]:
    """Pairs whose fingerprints differ in few bits."""
    from simhash import Simhash

    seen: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    cuts = np.linspace(0, 64, settings.distance + 2).astype(int).tolist()
    for number, key in tqdm(keys.items(), desc="simhash", unit=" 篇", disable=None):
        grams = [key[i : i + settings.ngram] for i in range(max(len(key) - settings.ngram, 0) + 1)]
        value = Simhash(grams).value
        # Of distance + 1 groups of bits one is the same in both.
        for group, (low, high) in enumerate(pairwise(cuts)):
            bucket = seen[group, (value >> low) & ((1 << (high - low)) - 1)]
            yield from (
                (number, other) for other, bits in bucket if (bits ^ value).bit_count() <= settings.distance
            )
            bucket.append((number, value))
