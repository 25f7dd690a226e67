"""Examples for the report: the beginning of a text, and pairs of duplicates with what they differ in."""

from typing import Any

import numpy as np

from data_clean.jaccard import similarities
from data_clean.keys import keys_of
from data_clean.shards import Corpus
from data_clean.texts import Texts

EXCERPT = 120  # characters of a dropped text
PAIR_EXCERPT = 240  # characters of each text of a pair
SAMPLED = 256  # pairs that examples are chosen from
LONG = 50_000  # characters of both texts of a pair: longer ones are no examples


def beginning(texts: Texts, index: int) -> str:
    """The first characters of a text, without decoding all of it."""
    start = texts.starts[index]
    end = min(texts.starts[index + 1], start + 4 * EXCERPT)
    return texts.data[start:end].tobytes().decode(errors="ignore")[:EXCERPT]


def example_pairs(
    corpus: Corpus, dropped: np.ndarray, kept: np.ndarray, ngram: int, most: int, least: float = 0.0
) -> list[dict[str, Any]]:
    """Some of the dropped documents beside what is kept instead, from the least similar pair to the most.

    dropped, kept: (m,) numbers. Similarities are those of the n-gram sets; of those from `least` on, all that occur
    are shown. Texts that differ come before copies.
    """
    chosen = np.unique(np.linspace(0, len(dropped) - 1, SAMPLED).astype(int))
    pairs = np.stack([dropped[chosen], kept[chosen]], axis=1)  # (sampled, 2)
    lengths = corpus.rows("length", pairs.ravel()).reshape(-1, 2).sum(axis=1, dtype=np.int64)
    pairs = pairs[lengths <= LONG]
    if not len(pairs):
        return []
    numbers, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    texts, names = corpus.texts(numbers), corpus.source_names(numbers)
    values = similarities(keys_of(texts), places, ngram)
    is_same = np.array([texts.text(one) == texts.text(other) for one, other in places.tolist()])
    spread = spread_order(values + is_same)
    spread = spread[values[spread] >= least][:most]
    return [
        pair_example(texts, names, *places[i].tolist(), values[i]) for i in spread[np.argsort(values[spread])]
    ]


def spread_order(values: np.ndarray) -> np.ndarray:
    """Positions of values, (m,): at first one of every twentieth of the scale, then a second one of each, and on."""
    bins = np.floor(values * 20)
    order = np.argsort(bins, kind="stable")
    ordered = bins[order]
    rank = np.arange(len(bins)) - np.searchsorted(ordered, ordered)
    return order[np.lexsort((ordered, rank))]


def pair_example(texts: Texts, names: np.ndarray, one: int, other: int, similarity: float) -> dict[str, Any]:
    """Excerpts of a dropped and a kept text, from a little before they first differ."""
    dropped, kept = texts.text(one), texts.text(other)
    shortest = min(len(dropped), len(kept))
    differ = next((i for i in range(shortest) if dropped[i] != kept[i]), shortest)
    start = max(differ - PAIR_EXCERPT // 4, 0) if shortest > PAIR_EXCERPT else 0
    mark = "…" if start else ""
    return {
        "source": names[one],
        "text": mark + dropped[start:][:PAIR_EXCERPT],
        "kept_source": names[other],
        "kept": mark + kept[start:][:PAIR_EXCERPT],
        "similarity": round(float(similarity), 4),
    }
