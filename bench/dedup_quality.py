"""What near-duplicate removal finds and what it destroys, against exact similarities: `python bench/dedup_quality.py`.

The corpus is small enough to compare every pair of documents. A pair is found if at most one of the two stays.
A removal is false if no document stays that has at least the threshold's similarity with the removed one.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

import numpy as np
from tqdm import tqdm

from bench.corpus import Corpus
from bench.engines import THRESHOLD, chosen_engines, prepare
from bench.exact import Pairs, all_pairs, jaccard, shingles
from bench.planting import Group
from data_clean.keys import comparison_key
from sources.report import settings, table, write_json
from stage import ROOT, StageConfig, require, run_stage

RANGES = ((0.8, 1.01), (0.7, 0.8), (0.65, 0.7), (0.5, 0.65))  # of similarity, [from, to)
QUANTILES = (0, 0.05, 0.5, 0.95, 1)
ALIKE = 0.2  # similarity that unrelated texts hardly ever reach
MOST_PAIRS = 20_000  # of a group whose similarities are described
CLUSTER = "大簇"
OTHERS = "无关文档"


@dataclass
class Config(StageConfig):
    """近似去重的质量：召回与误删，以逐对的精确 Jaccard 相似度为准。"""

    documents: int = 8000  # 文档数；时间和内存与其平方成正比
    planted: float = 0.6  # 人工放入的重复文档和易混文档所占的比例
    data: Path | None = None  # 模仿哪份语料的用字；不填则用内置演示语料
    engines: tuple[str, ...] = ()  # 只测这些方法（名字，或名字里的字样）；不填则全测
    out: Path = ROOT / "out" / "bench" / "dedup_quality.json"  # 结果
    seed: int = 0  # 随机种子

    def check(self) -> None:
        require(100 <= self.documents <= 20_000, "documents", self.documents, "在 100 与 20000 之间")
        require(0 < self.planted <= 1, "planted", self.planted, "大于 0 且不大于 1")


class Truth:
    """A corpus with the exact similarities of all its pairs."""

    def __init__(self, corpus: Corpus) -> None:
        self.texts = [text for block in corpus.blocks() for text in block]
        self.keys = [comparison_key(text) for text in self.texts]
        self.groups: list[Group] = corpus.groups
        self.pairs = all_pairs(self.keys, ALIKE)
        self.group_of = np.full(len(self.texts), -1)  # (n,) number of each document's group, -1 for none
        self.category = np.full(len(self.texts), OTHERS, object)  # (n,)
        for number, group in enumerate(self.groups):
            self.group_of[group.rows] = number
            self.category[group.rows] = category(group)

    def grouped(self) -> np.ndarray:
        """Whether the two of a pair were planted together, (pairs,) bool."""
        one, other = self.group_of[self.pairs.one], self.group_of[self.pairs.other]
        return (one == other) & (one >= 0)

    def in_cluster(self) -> np.ndarray:
        """Whether the two of a pair belong to one big cluster: there are too many such pairs to count with others."""
        return self.grouped() & (self.category[self.pairs.one] == CLUSTER)

    def tight_groups(self) -> list[Group]:
        """Groups of copies in which every pair reaches the threshold: one document of each should stay."""
        similar = self.grouped() & (self.pairs.jaccard >= THRESHOLD)
        counts = np.bincount(self.group_of[self.pairs.one[similar]], minlength=len(self.groups))
        whole = [len(group.rows) * (len(group.rows) - 1) // 2 for group in self.groups]
        return [
            g for g, count, full in zip(self.groups, counts, whole, strict=True) if g.copies and count == full
        ]


def category(group: Group) -> str:
    if group.copies:
        return CLUSTER if group.kind == CLUSTER else "改动的副本"
    if group.kind.startswith("模板"):
        return "同一模板"
    return OTHERS if group.kind == "极短" else "其他文字和符号"


def describe(truth: Truth, random: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Similarities within the planted groups: of copies with their original, of others among each other."""
    values: dict[str, list[float]] = {}
    for group in truth.groups:
        sets = [shingles(truth.keys[row]) for row in group.rows]
        values.setdefault(group.kind, []).extend(
            jaccard(sets[a], sets[b]) for a, b in compared(group, random)
        )
    return {
        kind: {"pairs": len(found), "quantiles": np.quantile(found, QUANTILES).round(3).tolist()}
        for kind, found in values.items()
    }


def compared(group: Group, random: np.random.Generator) -> Iterator[tuple[int, int]]:
    size = len(group.rows)
    if group.copies:
        return ((0, member) for member in range(1, size))
    pairs = ((a, b) for b in range(size) for a in range(b))
    chance = min(1, MOST_PAIRS / (size * (size - 1) / 2))
    return (pair for pair in pairs if random.random() < chance)


def judge(truth: Truth, keep: np.ndarray) -> dict[str, Any]:
    """Recall by similarity, false removals by category, and how many documents of each group stay."""
    pairs, gone = truth.pairs, ~keep
    found = ~(keep[pairs.one] & keep[pairs.other])
    counted = ~truth.in_cluster()
    recall = {}
    for low, high in RANGES:
        chosen = counted & (pairs.jaccard >= low) & (pairs.jaccard < high)
        recall[f"{low:.2f}–{min(high, 1):.2f}"] = [int(found[chosen].sum()), int(chosen.sum())]
    is_false = gone & (nearest_kept(pairs, keep) < THRESHOLD)
    stay = np.array([keep[group.rows].sum() for group in truth.tight_groups()])
    return {
        "removed": int(gone.sum()),
        "recall": recall,
        "false": {
            name: [int(is_false[truth.category == name].sum()), int((truth.category == name).sum())]
            for name in dict.fromkeys(truth.category.tolist())
        },
        # Alike to a document that was removed in its turn, but to none that stays.
        "chained": int((is_false & (nearest_kept(pairs, np.ones_like(keep)) >= THRESHOLD)).sum()),
        "groups": {
            "none": int((stay == 0).sum()),
            "one": int((stay == 1).sum()),
            "more": int((stay > 1).sum()),
        },
        "clusters": [
            [int(keep[group.rows].sum()), len(group.rows)] for group in truth.groups if group.kind == CLUSTER
        ],
    }


def nearest_kept(pairs: Pairs, keep: np.ndarray) -> np.ndarray:
    """For each document the similarity of the most similar one that stays, (n,); 0 below the least of `pairs`."""
    nearest = np.zeros(len(keep))
    for mine, other in ((pairs.one, pairs.other), (pairs.other, pairs.one)):
        stays = keep[other]
        np.maximum.at(nearest, mine[stays], pairs.jaccard[stays])
    return nearest


def show(results: dict[str, dict[str, Any]]) -> str:
    first = next(iter(results.values()))
    found = [
        [name, r["removed"], *(f"{part / max(total, 1):.1%}" for part, total in r["recall"].values())]
        + [*r["groups"].values(), "、".join(str(kept) for kept, _ in r["clusters"])]
        for name, r in results.items()
    ]
    false = [
        [name, *(count for count, _ in r["false"].values()), r["chained"]] for name, r in results.items()
    ]
    clusters = "、".join(f"{size:,} 篇" for _, size in first["clusters"]) or "无"
    pairs = "、".join(f"{name} {total:,} 对" for name, (_, total) in first["recall"].items())
    documents = "、".join(f"{name} {total:,} 篇" for name, (_, total) in first["false"].items())
    return (
        f"相似度在各区间的文档对，至多留下一篇的比例（{pairs}；最后一个区间低于阈值，不该删）；\n"
        f"整组互相重复的组留下 0 篇、1 篇、更多篇的各有多少；大簇（{clusters}）留下几篇\n"
        + table(["方法", "删去", *first["recall"], "组留 0", "组留 1", "组留多", "大簇留下"], found)
        + f"\n\n误删：留下的文档与它的相似度都不到 {THRESHOLD}（{documents}）；连锁：与它相似的也都被删了\n"
        + table(["方法", *first["false"], "其中连锁"], false)
    )


def show_planted(truth: Truth, planted: dict[str, dict[str, Any]]) -> str:
    rows = [[kind, d["pairs"], *(f"{q:.3f}" for q in d["quantiles"])] for kind, d in planted.items()]
    apart = truth.pairs.jaccard[~truth.grouped()]
    total = len(truth.keys) * (len(truth.keys) - 1) // 2
    return (
        "各组之内的精确 Jaccard 相似度：副本与原文之间，其余两两之间\n"
        + table(["种类", "对", "最小", "5 %", "中位", "95 %", "最大"], rows)
        + f"\n不同组的约 {total:,} 对文档中，相似度达到 {ALIKE} 的有 {len(apart):,} 对"
        + (f"，最高 {apart.max():.3f}" if len(apart) else "")
    )


def main(cfg: Config) -> None:
    engines = chosen_engines(cfg.engines)
    truth = Truth(Corpus(cfg.documents, cfg.planted, cfg.seed, cfg.data))
    planted = describe(truth, np.random.default_rng(cfg.seed))
    print(show_planted(truth, planted) + "\n", flush=True)
    results = {}
    for name, engine in tqdm(engines.items(), unit=" 种", disable=None):
        results[name] = judge(truth, engine.run(prepare(engine, truth.texts)))
    print(show(results))
    write_json(cfg.out, {"settings": settings(cfg), "planted": planted, "engines": results})
    print(f"\n已写入 {cfg.out}")


if __name__ == "__main__":
    run_stage(Config, main)
