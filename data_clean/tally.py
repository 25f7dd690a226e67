"""What cleaning did: rows, characters and seconds of every step, and what each rule dropped."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from sources.pretrain_text import Document
from sources.report import table

EXAMPLES = 5
EXCERPT = 120
Documents = list[Document]


class Tally:
    """Runs the steps and keeps their counts; `report` gives them as JSON, `show` as two tables."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.rules: dict[str, dict[str, Any]] = {}
        self.read: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.read_characters: Counter[str] = Counter()
        self.kept: dict[str, dict[str, int]] = {}

    def run(self, name: str, documents: Documents, step: Callable[[Documents], Documents]) -> Documents:
        """Run one step over the documents, timed and counted."""
        start = time.perf_counter()
        result = step(documents)
        self.steps.append(
            {
                "step": name,
                "rows_in": len(documents),
                "rows_out": len(result),
                "characters_in": characters(documents),
                "characters_out": characters(result),
                "seconds": round(time.perf_counter() - start, 3),
            }
        )
        return result

    def count_read(self, document: Document) -> None:
        self.read[document.source] += 1
        self.read_characters[document.source] += len(document.text)

    def drop(
        self, rule: str, document: Document, kept: Document | None = None, similarity: float = 0
    ) -> None:
        """Count a dropped document under its rule, with the kept one that it duplicates."""
        entry = self.rules.setdefault(rule, {"rows": 0, "characters": 0, "examples": []})
        entry["rows"] += 1
        entry["characters"] += len(document.text)
        self.dropped[document.source][rule] += 1
        if len(entry["examples"]) < EXAMPLES * (4 if kept else 1):
            example = {"source": document.source, "text": document.text[:EXCERPT]}
            if kept:
                example |= {"kept_source": kept.source, "kept": kept.text[:EXCERPT]}
                example["similarity"] = round(similarity, 4)
            entry["examples"].append(example)

    def count_kept(self, documents: Documents) -> None:
        rows, chars = Counter(), Counter()
        for document in documents:
            rows[document.source] += 1
            chars[document.source] += len(document.text)
        self.kept = {name: {"rows": rows[name], "characters": chars[name]} for name in self.read}

    def report(self) -> dict[str, Any]:
        """Everything counted, for the JSON report."""
        sources = {
            name: {
                "rows_in": self.read[name],
                "rows_out": self.kept[name]["rows"],
                "characters_in": self.read_characters[name],
                "characters_out": self.kept[name]["characters"],
                "dropped": dict(self.dropped[name]),
            }
            for name in self.read
        }
        return {"steps": self.steps, "sources": sources, "rules": self.rules}

    def show(self) -> None:
        """Print what each step and each source let through."""
        rows = [
            [s["step"], s["rows_in"], s["rows_out"], s["characters_out"], f"{s['seconds']:.1f}"]
            for s in self.steps
        ]
        print(table(["步骤", "输入行", "输出行", "输出字符", "秒"], rows))
        names = list(self.rules)
        lines = [
            [name, self.read[name], self.kept[name]["rows"], *(self.dropped[name][rule] for rule in names)]
            for name in self.read
        ]
        print("\n" + table(["来源", "读入", "保留", *names], lines))


def characters(documents: Documents) -> int:
    return sum(len(document.text) for document in documents)
