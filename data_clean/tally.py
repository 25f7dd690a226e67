"""What cleaning did: rows, characters and seconds of every step, what each rule dropped, examples, histograms.

Every process counts for itself; `to_json` and `merge` bring the counts together, in the order of the work. What
is kept does not grow with the corpus: numbers, and a few excerpts for each rule.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from data_clean.benchmarks import Benchmarks
from data_clean.duplicates import Clusters
from data_clean.examples import beginning, example_pairs
from data_clean.shards import Corpus
from data_clean.signatures import Settings
from data_clean.texts import Texts
from sources.report import table

EXACT, NEAR, CONTAMINATED = "完全重复", "近似重复", "与评测题雷同"
EXAMPLES = {EXACT: 5, NEAR: 20, CONTAMINATED: 100}  # examples kept for a rule, others:
FEW = 5
BLOCK = 1 << 18  # documents whose sources are looked up at a time
MOST_SOURCES = 1000
OTHERS = "（其余来源）"  # what data sets beyond these are counted as

# Edges of histograms; each bin but the last is half open.
LENGTHS = np.unique(np.concatenate([[0], 2 ** np.arange(0, 25, 0.5)]).astype(int)).tolist()
SIZES = [2, 3, *(2**n for n in range(2, 25))]
SHARES = [n / 50 for n in range(51)]

Numbers = dict[str, Any]  # nested: numbers and lists of numbers at the leaves


class Tally:
    """The account of one process, or of all whose accounts were merged into it."""

    def __init__(self) -> None:
        self.steps: Numbers = {}  # step -> rows_in, rows_out, characters_in, characters_out, seconds
        self.sources: Numbers = {}  # data set -> the first four of these, and rows and characters by rule
        self.rules: Numbers = {}  # rule -> rows, characters
        self.counts: Numbers = {}  # name -> whatever is counted there
        self.series: Numbers = {}  # histogram -> series -> counts
        self.edges: dict[str, list[float]] = {}  # histogram -> edges of its bins
        self.examples: dict[str, list[dict[str, Any]]] = {}  # rule -> the first ones

    # --- counting ---

    def step(
        self, name: str, rows_in: int, rows_out: int, characters_in: int, characters_out: int, seconds: float
    ) -> None:
        """Add to a step; steps are reported in the order in which they first appear. seconds: of processor time."""
        counted = dict(rows_in=rows_in, rows_out=rows_out, characters_in=characters_in)
        add(self.steps, {name: {**counted, "characters_out": characters_out, "seconds": seconds}})

    def add_seconds(self, name: str, seconds: float) -> None:
        """Processor time of a step that lets all documents through."""
        self.step(name, 0, 0, 0, 0, seconds)

    def count(self, name: str, counts: Mapping[str, int]) -> None:
        """Add to counts of any kind, e.g. of what was masked."""
        add(self.counts, {name: dict(counts)})

    def count_read(self, texts: Texts, sources: Iterable[str]) -> int:
        """Count texts as read; returns their characters. sources: (n,) names of data sets."""
        return self._count_texts(texts, sources, "in", "清洗前")

    def count_kept(self, texts: Texts, sources: Iterable[str]) -> int:
        """Count texts as written; returns their characters."""
        return self._count_texts(texts, sources, "out", "清洗后")

    def _count_texts(self, texts: Texts, sources: Iterable[str], way: str, series: str) -> int:
        characters = texts.characters
        self.histogram("每篇字符数", characters, LENGTHS, series)
        for name, rows, total in by_source(sources, characters):
            add(self._source(name), {f"rows_{way}": rows, f"characters_{way}": total})
        return int(characters.sum())

    def drop(
        self,
        rule: str,
        texts: Texts,
        sources: np.ndarray,
        indices: np.ndarray,
        values: np.ndarray | None = None,
    ) -> None:
        """Count the texts at these positions as dropped, with the first of them as examples.

        sources: (n,) names of data sets. values: (n,) what the rule measured, to be shown with the examples.
        """
        self._count_dropped(rule, sources[indices], texts.take(indices).characters)
        examples = []
        for index in indices[: EXAMPLES.get(rule, FEW)].tolist():
            examples.append({"source": sources[index], "text": beginning(texts, index)})
            if values is not None:
                examples[-1]["value"] = round(float(values[index]), 4)
        self._add_examples(rule, examples)

    def drop_contaminated(
        self, texts: Texts, sources: np.ndarray, hits: np.ndarray, benchmarks: Benchmarks
    ) -> None:
        """Count the texts that contain an item of a benchmark, (n,) `hits` as of Benchmarks, and list the first."""
        indices = np.flatnonzero(hits >= 0)
        self._count_dropped(CONTAMINATED, sources[indices], texts.take(indices).characters)
        files = Counter(benchmarks.describe(item)["file"] for item in hits[indices].tolist())
        self.count("各评测文件剔除的文档", files)
        self._add_examples(
            CONTAMINATED,
            (
                {
                    "source": sources[index],
                    "text": benchmarks.excerpt(texts.text(index)),
                    "benchmark": benchmarks.describe(hits[index]),
                }
                for index in indices[: EXAMPLES[CONTAMINATED]].tolist()
            ),
        )

    def add_duplicates(
        self, corpus: Corpus, clusters: Clusters, keep: np.ndarray, seconds: float, settings: Settings
    ) -> None:
        """Count the documents that go because another one of their cluster stays.

        keep: (documents,) bool, those that would stay without that. settings: what similarity means.
        """
        gone = (clusters.members != clusters.kept) & keep[clusters.members]
        # Of a cluster another document than its equal may stay: as examples of equal ones such pairs would confuse.
        rules = ((EXACT, gone & clusters.is_exact, 1.0), (NEAR, gone & ~clusters.is_exact, 0.0))
        for rule, chosen, least in rules:
            dropped, kept = clusters.members[chosen], clusters.kept[chosen]
            for start in range(0, len(dropped), BLOCK):
                block = dropped[start : start + BLOCK]
                self._count_dropped(rule, corpus.source_names(block), corpus.rows("length", block))
            if len(dropped):
                pairs = example_pairs(corpus, dropped, kept, settings.ngram, EXAMPLES[rule], least)
                self._add_examples(rule, pairs)
        _, sizes = np.unique(clusters.kept, return_counts=True)
        self.histogram("重复的一组有几篇", sizes, SIZES)
        characters = sum(
            int(shard.column("length")[keep[first : first + shard.count]].sum(dtype=np.int64))
            for shard, first in zip(corpus.shards, corpus.firsts, strict=False)
        )
        lost = sum(self.rules.get(rule, {}).get("characters", 0) for rule in (EXACT, NEAR))
        rows, gone = int(keep.sum()), int(gone.sum())
        self.step("近似去重", rows, rows - gone, characters, characters - lost, seconds)

    def histogram(self, name: str, values: np.ndarray, edges: list[float], series: str = "") -> None:
        """Count values (n,) by bins, those beyond the ends in the first and the last; NaN is left out.

        series: several histograms of one name, with the same edges, are drawn into one picture.
        """
        self._set_edges(name, edges)
        values = np.asarray(values, float)
        values = np.clip(values[~np.isnan(values)], edges[0], edges[-1])
        add(self.series, {name: {series: np.histogram(values, edges)[0].tolist()}})

    def _set_edges(self, name: str, edges: list[float]) -> None:
        if self.edges.setdefault(name, edges) != edges:
            raise ValueError(f"histogram {name} has other edges already")

    def _count_dropped(self, rule: str, sources: Iterable[str], characters: np.ndarray) -> None:
        for name, rows, total in by_source(sources, characters):
            counted = {"rows": rows, "characters": total}
            add(self.rules, {rule: counted})
            add(self._source(name), {"dropped": {rule: counted}})

    def _add_examples(self, rule: str, examples: Iterable[dict[str, Any]]) -> None:
        present = self.examples.setdefault(rule, [])
        most = EXAMPLES.get(rule, FEW)
        for example in examples:
            if len(present) >= most:
                break
            present.append(example)

    def _source(self, name: str) -> Numbers:
        """The account of a data set, or of all beyond the first MOST_SOURCES."""
        is_full = name not in self.sources and len(self.sources) >= MOST_SOURCES
        return self.sources.setdefault(OTHERS if is_full else name, {})

    # --- bringing together ---

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, for `merge`."""
        return dict(vars(self))

    def merge(self, account: dict[str, Any]) -> None:
        """Add what another process counted; call it in the order of the work, for examples of the same order."""
        for name, edges in account["edges"].items():
            self._set_edges(name, edges)
        for name in ("steps", "rules", "counts", "series"):
            add(getattr(self, name), account[name])
        for name, numbers in account["sources"].items():
            add(self._source(name), numbers)
        for rule, examples in account["examples"].items():
            self._add_examples(rule, examples)

    # --- the result ---

    @property
    def kept_rows(self) -> int:
        return sum(source.get("rows_out", 0) for source in self.sources.values())

    @property
    def kept_characters(self) -> int:
        return sum(source.get("characters_out", 0) for source in self.sources.values())

    def report(self, descriptions: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Everything for the JSON report. descriptions: what a rule drops, by its name."""
        rules = {
            name: {**numbers, "examples": self.examples.get(name, [])} for name, numbers in self.rules.items()
        }
        for name, description in (descriptions or {}).items():
            if name in rules:
                rules[name]["description"] = description
        return {
            "steps": [self._step_report(name) for name in self.steps],
            "sources": {name: self._source_report(name) for name in self.sources},
            "rules": rules,
            "counts": self.counts,
            "histograms": {
                name: {"edges": self.edges[name], "series": series} for name, series in self.series.items()
            },
        }

    def _step_report(self, name: str) -> dict[str, Any]:
        step = self.steps[name]
        speed = round(step["rows_in"] / step["seconds"]) if step["seconds"] > 0 else None
        return {"step": name, **step, "seconds": round(step["seconds"], 3), "documents_per_second": speed}

    def _source_report(self, name: str) -> dict[str, Any]:
        source = self.sources[name]
        dropped = source.get("dropped", {})
        return {
            **{key: source.get(key, 0) for key in ("rows_in", "rows_out", "characters_in", "characters_out")},
            "dropped": {rule: numbers["rows"] for rule, numbers in dropped.items()},
            "dropped_characters": {rule: numbers["characters"] for rule, numbers in dropped.items()},
        }

    def show(self) -> None:
        """Print what each step let through, and what became of the largest data sets."""
        report = self.report()
        rows = [
            [s["step"], s["rows_in"], s["rows_out"], s["characters_out"], f"{s['seconds']:.1f}",
             s["documents_per_second"] or "-"]
            for s in report["steps"]
        ]  # fmt: skip
        print(table(["步骤", "输入行", "输出行", "输出字符", "处理器秒", "篇/秒"], rows))
        columns = column_per_source(report["sources"])
        lines = [["读入", *(c["rows_in"] for c in columns.values())]]
        lines += [[rule, *(c["dropped"].get(rule, 0) for c in columns.values())] for rule in self.rules]
        lines += [["保留", *(c["rows_out"] for c in columns.values())]]
        print("\n" + table(["", *columns], lines))
        for name, counts in self.counts.items():
            if any(counts.values()):
                print(
                    f"{name}：" + "、".join(f"{key} {number:,}" for key, number in counts.items() if number)
                )


def add(total: Numbers, part: Numbers) -> None:
    """Add nested numbers to others; what is not there yet counts as 0."""
    for key, value in part.items():
        if isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        elif isinstance(value, list):
            total[key] = [a + b for a, b in zip(total.get(key, [0] * len(value)), value, strict=True)]
        else:
            total[key] = total.get(key, 0) + value


def by_source(sources: Iterable[str], characters: np.ndarray) -> list[tuple[str, int, int]]:
    """(name, rows, characters) of every data set, in the order in which they appear."""
    number: dict[str, int] = {}
    codes = np.array([number.setdefault(name, len(number)) for name in sources], np.int64)
    rows = np.bincount(codes, minlength=len(number))
    totals = np.bincount(codes, characters, len(number))  # exact up to 2^53
    return list(zip(number, rows.tolist(), map(int, totals), strict=True))


def column_per_source(sources: dict[str, Any], most: int = 6) -> dict[str, dict[str, Any]]:
    """The largest data sets by name, the rest as one, and all together, for a table."""
    names = sorted(sources, key=lambda name: -sources[name]["rows_in"])
    named = names if len(names) <= most else names[: most - 1]
    groups = {"合计": names} if len(names) > 1 else {}
    for name in named:
        label = name if len(name) <= 12 else f"{name[:11]}…"
        groups[label if label not in groups else f"{label}{len(groups)}"] = [name]
    if len(names) > len(named):
        groups[f"其余 {len(names) - len(named)} 个"] = names[len(named) :]
    columns: dict[str, dict[str, Any]] = {}
    for label, members in groups.items():
        columns[label] = {"rows_in": 0, "rows_out": 0, "dropped": {}}
        for name in members:
            add(columns[label], {key: sources[name][key] for key in columns[label]})
    return columns
