"""Which documents validate: decided by the hash of a text, so that adding data harms no validation set."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from xxhash import xxh3_64_intdigest

from data_clean.texts import Texts
from sources.token_runs import Run, read_entries

HASHES = 2**64
MOST = HASHES // 10  # no more than a tenth of a small corpus validates


def text_hashes(texts: Texts) -> np.ndarray:
    """xxh3 of every text, (n,) uint64: equal texts are one document to the split."""
    data = memoryview(texts.data)
    pairs = pairwise(texts.starts.tolist())
    return np.array([xxh3_64_intdigest(data[begin:end]) for begin, end in pairs], np.uint64)


def highest_limit(fraction: float) -> int:
    """No document whose hash is at or above this validates, except the only one of a tiny corpus."""
    return max(int(fraction * HASHES), MOST)


def validation_limit(
    hashes: np.ndarray, tokens: np.ndarray, fraction: float, least: int, most_tokens: int
) -> int:
    """The hash below which documents validate; all others train.

    hashes: (n,) uint64 of the distinct documents of a corpus, ascending; if at least `least` of them are below
    `fraction`, only those below it matter. tokens: (n,) of each.

    The limit is `fraction` of all hashes. A small corpus, with less than `least` documents below it, doubles it
    until there are enough, at most to a tenth; if there is still none, the document with the least hash
    validates. A large corpus, with more than `most_tokens` tokens below it, halves it until they fit.

    Adding documents never raises the limit. Therefore a document that trained (in a corpus of at least two
    distinct ones) never becomes a validation document. And once a corpus is no longer small, its split never
    changes at all until its validation tokens pass `most_tokens`; then half of the validation documents, those
    with the greater hashes, go to training, and the split is again fixed until the next halving.
    """
    limit = int(fraction * HASHES)
    if not limit or len(hashes) < 2:
        return 0

    def count(limit: int) -> int:
        return int(np.count_nonzero(hashes < limit))

    if least:
        while count(limit) < least and 2 * limit <= MOST:
            limit *= 2
        limit = limit if count(limit) else int(hashes[0]) + 1
    while count(limit) > 1 and tokens[: count(limit)].sum() > most_tokens:
        limit //= 2
    return limit


def choose_limit(runs: Sequence[Run], fraction: float, least: int, most_tokens: int) -> int:
    """The `validation_limit` of the corpus in these runs."""
    below = int(fraction * HASHES)
    documents = distinct_documents(runs, below)
    if len(documents[0]) < least:
        documents = distinct_documents(runs, HASHES)
    return validation_limit(*documents, fraction, least, most_tokens)


def distinct_documents(runs: Sequence[Run], below: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes below a limit, ascending, and the tokens of their documents, (n,) each."""
    hashes, tokens = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    for run in runs:
        entries = read_entries(run)
        entries = entries[(entries["copy"] <= 0) & (entries["hash"] < below)]
        hashes.append(entries["hash"])
        tokens.append(entries["tokens"])
    distinct, first = np.unique(np.concatenate(hashes), return_index=True)
    return distinct, np.concatenate(tokens)[first].astype(np.int64)
