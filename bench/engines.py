"""Ways of removing near duplicates, ours and others', behind one function each: documents -> which to keep.

Ours takes texts as they are. Other packages get keys made beforehand, in time that is not counted; making
n-grams of them is their work, because their interfaces ask for it. All of them work in one thread.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import numpy as np

from bench.exact import jaccard, shingles
from data_clean.duplicates import deduplicate
from data_clean.keys import keys_of
from data_clean.signatures import Settings
from data_clean.texts import from_strings
from stage import UserError

Removal = np.ndarray  # (n,) bool: the documents that stay
NUM_PERM, BANDS, THRESHOLD, NGRAM, DISTANCE = 128, 21, 0.65, 3, 6  # as ours, for all that have such settings
WHOLE_BANDS = NUM_PERM // BANDS * BANDS  # rensa wants no values left over
NOT_CHINESE = re.compile("[^\u4e00-\u9fa5]")
INSTALL = {
    "rensa": "pip install rensa==0.5.0",
    "gaoya": "pip install gaoya==0.2.2",
    "datasketch": "pip install datasketch==2.0.0",
    "simhash": "pip install simhash==2.1.2",
}


class Engine(NamedTuple):
    """One way to remove near duplicates."""

    run: Callable[[list[str]], Removal]  # takes what `form` says
    form: Literal["texts", "keys"]
    limit: int  # documents that it does in about a minute
    package: str = ""


def prepare(engine: Engine, texts: Sequence[str]) -> list[str]:
    """The documents in the form in which the engine takes them."""
    return keys(texts) if engine.form == "keys" else list(texts)


def keys(texts: Sequence[str]) -> list[str]:
    """The comparison keys as strings."""
    codes, starts = keys_of(from_strings(texts))
    whole = codes.astype("<u4").tobytes().decode("utf-32-le")
    return [whole[start:end] for start, end in zip(starts.tolist(), starts[1:].tolist(), strict=False)]


def missing(engine: Engine) -> str:
    """What to do to have the engine's package; nothing if it is there."""
    if not engine.package or find_spec(engine.package):
        return ""
    return f"没有 {engine.package}，跳过；安装：{INSTALL[engine.package]}"


def ours(texts: list[str]) -> Removal:
    return deduplicate(texts, Settings()).keep


def our_simhash(texts: list[str]) -> Removal:
    return deduplicate(texts, Settings(method="simhash")).keep


def ours_then(second: Callable[[list[str]], Removal], texts: list[str]) -> Removal:
    """Another removal over what our MinHash leaves."""
    keep = ours(texts)
    keep[keep] = second([texts[number] for number in np.flatnonzero(keep).tolist()])
    return keep


def original(texts: list[str], distinct: bool = False) -> Removal:
    """The original's kind: MinHash over single Chinese characters, one update for each, one document after another.

    distinct: one update for each different character only, which gives the same sketch in half the time.
    """
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=0.85, num_perm=NUM_PERM)
    keep = np.ones(len(texts), bool)
    for number, text in enumerate(texts):
        sketch = MinHash(num_perm=NUM_PERM)
        chars = NOT_CHINESE.sub("", text)
        for char in set(chars) if distinct else chars:
            sketch.update(char.encode("utf-8"))
        keep[number] = not index.query(sketch)
        if keep[number]:
            index.insert(number, sketch)
    return keep


def datasketch_batch(keys: list[str], verify: bool = False) -> Removal:
    """datasketch at its best on one core: sketches in batches, LSH with our bands, verified by exact Jaccard or not."""
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=NUM_PERM, params=(BANDS, NUM_PERM // BANDS))
    sketches = MinHash.generator(([g.encode() for g in shingles(key)] for key in keys), num_perm=NUM_PERM)
    keep = np.ones(len(keys), bool)
    for number, (key, sketch) in enumerate(zip(keys, sketches, strict=True)):
        if key:  # sketches of nothing are all equal
            found = index.query(sketch)
            if verify:
                mine = shingles(key)
                found = any(jaccard(mine, shingles(keys[other])) >= THRESHOLD for other in found)
            keep[number] = not found
            if keep[number]:
                index.insert(number, sketch, check_duplication=False)
    return keep


def rensa_documented(keys: list[str]) -> Removal:
    """rensa's removal as its README has it: candidates of LSH, checked by the similarity of their sketches."""
    from rensa import RMinHashDeduplicator

    filled = [number for number, key in enumerate(keys) if key]
    index = RMinHashDeduplicator(THRESHOLD, WHOLE_BANDS, True, BANDS)
    keep = np.ones(len(keys), bool)
    keep[filled] = index.add_pairs((str(number), list(shingles(keys[number]))) for number in filled)
    return keep


def rensa_matrix(keys: list[str]) -> Removal:
    """rensa at its best: n-grams hashed by numpy, sketches as a matrix, the removal above for what LSH flags."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(*gram_hashes(keys), WHOLE_BANDS, 42)
    index = RMinHashLSH(THRESHOLD, WHOLE_BANDS, BANDS)
    flagged = np.flatnonzero(index.query_duplicate_flags_matrix_one_shot(matrix))
    keep = np.ones(len(keys), bool)
    keep[flagged] = rensa_documented([keys[number] for number in flagged.tolist()])
    return keep


def rensa_rho(keys: list[str]) -> Removal:
    """rensa's sampling sketch with the settings of its benchmark; flags all that have a duplicate, none to keep."""
    from rensa import RMinHash, RMinHashLSH

    matrix = RMinHash.digest_matrix_from_flat_token_hashes_rho(*gram_hashes(keys), NUM_PERM, 42)
    flags = RMinHashLSH(0.8, NUM_PERM, 8).query_duplicate_flags_matrix_one_shot(matrix)
    return ~np.array(flags, bool) | ~np.array(list(map(bool, keys)), bool)


def gram_hashes(keys: list[str], block: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """64-bit hashes of all n-grams of all keys, and where each key's begin, (n + 1,); none of shorter keys."""
    starts = np.cumsum([0, *(max(len(key) - NGRAM + 1, 0) for key in keys)]).astype(np.uint64)
    hashes = np.empty(int(starts[-1]), np.uint64)
    for first in range(0, len(keys), block):  # what numpy works on stays in the processor's cache
        part = keys[first : first + block]
        codes = np.frombuffer("".join(part).encode("utf-32-le"), "<u4").astype(np.uint64)
        value = np.zeros(max(len(codes) - NGRAM + 1, 0), np.uint64)
        for offset in range(NGRAM):
            value = value * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + len(value)]
        value ^= value >> np.uint64(32)
        sizes = np.array(list(map(len, part)))
        is_inside = np.ones(len(codes), bool)
        for back in range(1, NGRAM):  # n-grams that would begin so near the end of a key
            is_inside[(np.cumsum(sizes) - back)[sizes >= back]] = False
        hashes[int(starts[first]) : int(starts[first + len(part)])] = value[is_inside[: len(value)]]
    return hashes, starts


def gaoya(keys: list[str]) -> Removal:
    """gaoya's index with our bands; candidates are checked by the similarity of their sketches."""
    from gaoya.minhash import MinHashStringIndex

    index = MinHashStringIndex(
        32, THRESHOLD, BANDS, NUM_PERM // BANDS, None, "char", False, (NGRAM, NGRAM), "smallvec"
    )
    keep = np.ones(len(keys), bool)
    for number, key in enumerate(keys):
        if key:
            keep[number] = not index.query(key)
            if keep[number]:
                index.insert_document(number, key)
    return keep


def simhash_package(keys: list[str]) -> Removal:
    """The simhash package over character 3-grams, with our distance."""
    from simhash import Simhash, SimhashIndex

    index = SimhashIndex([], k=DISTANCE)
    keep = np.ones(len(keys), bool)
    for number, key in enumerate(keys):
        if key:
            fingerprint = Simhash(list(shingles(key)))
            keep[number] = not index.get_near_dups(fingerprint)
            if keep[number]:
                index.add(str(number), fingerprint)
    return keep


ENGINES: dict[str, Engine] = {
    "本引擎 MinHash": Engine(ours, "texts", 10**9),
    "本引擎 SimHash": Engine(our_simhash, "texts", 10**9),
    "本引擎 MinHash 后 SimHash": Engine(partial(ours_then, our_simhash), "texts", 10**9),
    "原项目的写法": Engine(original, "texts", 10_000, "datasketch"),
    "原项目的写法，先去掉重复的字": Engine(partial(original, distinct=True), "texts", 10_000, "datasketch"),
    "datasketch 批量，不核实": Engine(datasketch_batch, "keys", 30_000, "datasketch"),
    "datasketch 批量，核实": Engine(partial(datasketch_batch, verify=True), "keys", 30_000, "datasketch"),
    "rensa（README 的用法）": Engine(rensa_documented, "keys", 100_000, "rensa"),
    "rensa 矩阵": Engine(rensa_matrix, "keys", 10**9, "rensa"),
    "rensa rho（只标记）": Engine(rensa_rho, "keys", 10**9, "rensa"),
    "gaoya": Engine(gaoya, "keys", 50_000, "gaoya"),
    "simhash 包": Engine(simhash_package, "keys", 10_000, "simhash"),
    "本引擎 MinHash 后 simhash 包": Engine(
        partial(ours_then, lambda texts: simhash_package(keys(texts))), "texts", 10_000, "simhash"
    ),
}


def chosen_engines(names: tuple[str, ...]) -> dict[str, Engine]:
    """The engines of these names, or whose names hold these words, all if there are none; with their packages."""
    chosen = {}
    for name, engine in ENGINES.items():
        if names and not any(word == name or (word not in ENGINES and word in name) for word in names):
            continue
        if advice := missing(engine):
            print(f"{name}：{advice}", flush=True)
        else:
            chosen[name] = engine
    if not chosen:
        raise UserError(f"--engines {' '.join(names)} 没有对应的方法；可选：{'、'.join(ENGINES)}。")
    return chosen
