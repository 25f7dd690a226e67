"""What cleaning did: rows, characters and seconds of every step, what each rule dropped, examples, distributions.

Every task keeps a tally of its own and returns it as JSON; merged in the order of the tasks they give the same
report whatever process did what. Nothing in it grows with the corpus.
"""

from collections import defaultdict
from typing import Any

import numpy as np

from data_clean.duplicates import Clusters
from data_clean.jaccard import similarities
from data_clean.keys import keys_of
from data_clean.shards import Corpus
from data_clean.texts import Texts
from sources.report import table

EXAMPLES = 5  # of each rule
PAIRS = 20  # of duplicates
SAMPLE = 2000  # duplicates whose similarity to the kept text is measured for the report
EXCERPT = 200  # characters of a text shown
EXACT, NEAR = "完全重复", "近似重复"
LENGTHS = [0, *(round(10 ** (k / 8)) for k in range(8, 49))]  # edges of the histograms of characters
SIMILARITIES = [round(0.05 * k, 2) for k in range(21)]
CLUSTER_SIZES = [2, 3, 4, 5, 6, 8, 11, 16, 32, 64, 128, 256, 512, 1024, 10**4, 10**5, 10**9]


class Tally:
    """Counts that can be added up; `report` gives them as JSON, `show` as two tables."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}  # rows in, rows out, characters in, characters out, seconds
        self.read: dict[str, list[int]] = {}  # of each source rows, characters
        self.kept: dict[str, list[int]] = {}
        self.dropped: dict[str, dict[str, int]] = defaultdict(dict)  # source -> rule -> rows
        self.rules: dict[str, dict[str, Any]] = {}
        self.changes: dict[str, dict[str, int]] = defaultdict(dict)  # what was changed within texts
        self.histograms: dict[str, dict[str, list[float]]] = {}

    def step(self, name: str, rows: tuple[int, int], characters: tuple[int, int], seconds: float) -> None:
        """Add documents that went into and came out of a step, and the processor seconds it took."""
        _add(self.steps, name, [*rows, *characters, seconds])

    def count_read(self, texts: Texts, sources: np.ndarray) -> int:
        """Count documents as they are read; returns their characters."""
        return self._count(self.read, "字数：读入", texts, sources)

    def count_kept(self, texts: Texts, sources: np.ndarray) -> int:
        """Count documents as they are written; returns their characters."""
        return self._count(self.kept, "字数：保留", texts, sources)

    def change(self, kind: str, counts: dict[str, int]) -> None:
        """Add what was changed within texts, e.g. telephone numbers masked."""
        for name, number in counts.items():
            self.changes[kind][name] = self.changes[kind].get(name, 0) + number

    def histogram(self, name: str, values: np.ndarray, edges: list[float]) -> None:
        """Add values to a histogram; those outside the edges count in its first and last bin."""
        counts, _ = np.histogram(np.clip(values, edges[0], np.nextafter(edges[-1], 0)), edges)
        if name in self.histograms:
            counts = counts + self.histograms[name]["counts"]
        self.histograms[name] = {"edges": list(edges), "counts": counts.tolist()}

    def drop(
        self, rule: str, texts: Texts, sources: np.ndarray, notes: list[dict[str, Any]] | None = None
    ) -> None:
        """Count the documents that a rule drops, and keep the first few as examples.

        notes: what else to show beside each example.
        """
        self._count_dropped(rule, sources, texts.characters)
        room = EXAMPLES - len(self.rules[rule]["examples"])
        for index in range(min(room, texts.count)):
            example = {"source": sources[index], "text": texts.text(index)[:EXCERPT]}
            self.rules[rule]["examples"].append(example | (notes[index] if notes else {}))

    def drop_duplicates(self, corpus: Corpus, clusters: Clusters, ngram: int) -> None:
        """Count duplicates that are not written, with pairs of a dropped and its kept text as examples."""
        gone = (clusters.members != clusters.kept) & ~corpus.is_reference(clusters.members)
        for rule, chosen in ((EXACT, gone & clusters.is_exact), (NEAR, gone & ~clusters.is_exact)):
            numbers = clusters.members[chosen]
            self._count_dropped(rule, corpus.source_names(numbers), corpus.rows("length", numbers))
            pairs = np.stack([numbers, clusters.kept[chosen]], axis=1)
            pairs = pairs[np.linspace(0, len(pairs) - 1, min(SAMPLE, len(pairs))).astype(int)]
            self.rules[rule]["examples"] = self._pairs(corpus, pairs, ngram, rule)
        _, sizes = np.unique(clusters.kept, return_counts=True)
        self.histogram("重复簇的大小", sizes, CLUSTER_SIZES)

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    def merge(self, other: dict[str, Any]) -> None:
        """Add the tally of another process, given as its `to_json`."""
        for mine, theirs in ((self.steps, "steps"), (self.read, "read"), (self.kept, "kept")):
            for name, values in other[theirs].items():
                _add(mine, name, values)
        for source, rules in other["dropped"].items():
            for rule, rows in rules.items():
                self.dropped[source][rule] = self.dropped[source].get(rule, 0) + rows
        for rule, entry in other["rules"].items():
            mine = self.rules.setdefault(rule, {"rows": 0, "characters": 0, "examples": []})
            mine["rows"] += entry["rows"]
            mine["characters"] += entry["characters"]
            mine["examples"] = (mine["examples"] + entry["examples"])[:EXAMPLES]
        for kind, counts in other["changes"].items():
            self.change(kind, counts)
        for name, histogram in other["histograms"].items():
            mine = self.histograms.setdefault(name, {**histogram, "counts": [0] * len(histogram["counts"])})
            mine["counts"] = [a + b for a, b in zip(mine["counts"], histogram["counts"], strict=True)]

    @property
    def total_kept(self) -> tuple[int, int]:
        """Rows and characters written."""
        return sum(rows for rows, _ in self.kept.values()), sum(size for _, size in self.kept.values())

    def report(self) -> dict[str, Any]:
        """Everything counted, for the JSON report."""
        names = ("rows_in", "rows_out", "characters_in", "characters_out", "seconds")
        steps = [
            {"step": name, **dict(zip(names, values, strict=True))} for name, values in self.steps.items()
        ]
        for step in steps:
            step["seconds"] = round(step["seconds"], 3)
            step["rows_per_second"] = round(step["rows_in"] / max(step["seconds"], 1e-3))
        sources = {
            name: {
                "rows_in": rows,
                "rows_out": self.kept.get(name, [0, 0])[0],
                "characters_in": characters,
                "characters_out": self.kept.get(name, [0, 0])[1],
                "dropped": self.dropped.get(name, {}),
            }
            for name, (rows, characters) in self.read.items()
        }
        return {
            "steps": steps,
            "sources": sources,
            "rules": self.rules,
            "changes": self.changes,
            "histograms": self.histograms,
        }

    def show(self) -> None:
        """Print what each step and each source let through."""
        rows = [[name, *map(int, values[:4]), f"{values[4]:.1f}"] for name, values in self.steps.items()]
        print(table(["步骤", "输入行", "输出行", "输入字符", "输出字符", "处理器秒"], rows))
        names = list(self.rules)
        lines = [
            [
                source,
                rows,
                self.kept.get(source, [0])[0],
                *(self.dropped[source].get(rule, 0) for rule in names),
            ]
            for source, (rows, _) in self.read.items()
        ]
        print("\n" + table(["来源", "读入", "保留", *names], lines))

    def _count(self, totals: dict[str, list[int]], title: str, texts: Texts, sources: np.ndarray) -> int:
        characters = texts.characters
        for source in sorted(set(sources)):
            here = characters[sources == source]
            _add(totals, source, [len(here), int(here.sum())])
        self.histogram(title, characters, LENGTHS)
        return int(characters.sum())

    def _count_dropped(self, rule: str, sources: np.ndarray, characters: np.ndarray) -> None:
        entry = self.rules.setdefault(rule, {"rows": 0, "characters": 0, "examples": []})
        entry["rows"] += len(sources)
        entry["characters"] += int(characters.sum())
        for source in sorted(set(sources)):
            rows = int((sources == source).sum())
            self.dropped[source][rule] = self.dropped[source].get(rule, 0) + rows

    def _pairs(self, corpus: Corpus, pairs: np.ndarray, ngram: int, rule: str) -> list[dict[str, Any]]:
        """Examples of duplicates, spread over all similarities that occur, and a histogram of these."""
        if not len(pairs):
            return []
        numbers, local = np.unique(pairs, return_inverse=True)
        local, texts, sources = local.reshape(-1, 2), corpus.texts(numbers), corpus.source_names(numbers)
        values = similarities(keys_of(texts), local, ngram)
        if rule == NEAR:
            self.histogram("近似重复：与保留者的相似度", values, SIMILARITIES)
        order = np.argsort(values, kind="stable")
        shown = order[np.linspace(0, len(order) - 1, min(PAIRS, len(order))).astype(int)]
        return [
            {
                "source": sources[gone],
                "text": texts.text(gone)[:EXCERPT],
                "kept_source": sources[kept],
                "kept": texts.text(kept)[:EXCERPT],
                "similarity": round(float(value), 4),
            }
            for (gone, kept), value in zip(local[shown].tolist(), values[shown], strict=True)
        ]


def _add(totals: dict[str, list], name: str, values: list) -> None:
    """Add to the values under a name."""
    totals[name] = [a + b for a, b in zip(totals.get(name, [0] * len(values)), values, strict=True)]
