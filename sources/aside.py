"""Rows that do not fit are set aside: counted, exemplified and reported, never silently lost."""

from collections import Counter
from pathlib import Path
from typing import Any

from sources.report import printable, table

EXCERPT = 80  # characters of a row shown beside its reason
MAX_KINDS = 5000  # files and reasons told apart; beyond, what a reason says in brackets is left out


class SetAside:
    """Collects what could not be used: how often, in which file, why, and the first few examples."""

    def __init__(self, max_examples: int = 20) -> None:
        self.rows = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: list[dict[str, Any]] = []
        self.remedies: dict[str, str] = {}
        self.max_examples = max_examples

    def __len__(self) -> int:
        return self.rows

    def add(
        self,
        file: Path,
        row: int | None,
        reason: str,
        excerpt: Any = "",
        remedy: str = "",
        *,
        offset: int | None = None,
        rows: int = 1,
    ) -> None:
        """Count one row (or with `rows` so many, from `row` on) under its reason.

        row: its number from 1; None for what remains of a file, or where only its first byte, `offset`, is known.
        """
        key = printable(str(file)), reason
        if key not in self.counts and len(self.counts) >= MAX_KINDS:
            key = key[0], reason.partition("（")[0]
        self.counts[key] += rows
        self.rows += rows
        if remedy:
            self.remedies.setdefault(key[1], remedy)
        if self._has_room(is_first=self.counts[key] == rows):
            example = {"file": key[0], "row": row, "reason": key[1], "excerpt": _excerpt(excerpt)}
            self.examples.append(example if offset is None else {**example, "offset": offset})

    def _has_room(self, is_first: bool) -> bool:
        """The first example of every file and reason is kept (within bounds), others while there is room."""
        return len(self.examples) < self.max_examples * (10 if is_first else 1)

    def merge(self, report: dict[str, Any]) -> None:
        """Add what another process collected, given as its `report()`; in order of the work, not of its end."""
        known = set(self.counts)
        self.rows += report["rows"]
        for entry in report["counts"]:
            self.counts[entry["file"], entry["reason"]] += entry["rows"]
        for example in report["examples"]:
            key = example["file"], example["reason"]
            if self._has_room(is_first=key not in known):
                self.examples.append(example)
            known.add(key)
        for reason, remedy in report["remedies"].items():
            self.remedies.setdefault(reason, remedy)

    def report(self) -> dict[str, Any]:
        """The whole collection for a JSON report."""
        counts = [{"file": f, "reason": r, "rows": n} for (f, r), n in self.counts.most_common()]
        return {"rows": len(self), "counts": counts, "examples": self.examples, "remedies": self.remedies}

    def show(self, most: int = 15) -> None:
        """Print a short table of files, reasons and remedies; nothing when nothing was set aside."""
        if not self.counts:
            return
        first = {}
        for example in self.examples:
            first.setdefault((example["file"], example["reason"]), _position(example))
        rows = [
            (Path(file).name, reason, count, first.get((file, reason), "-"))
            for (file, reason), count in self.counts.most_common(most)
        ]
        print(f"\n有 {len(self):,} 处内容读不了，已搁置（其余照常处理）：")
        print(table(["文件", "原因", "行数", "首例位置"], rows))
        if len(self.counts) > most:
            print(f"…另有 {len(self.counts) - most} 类，见 JSON 报告")
        shown = [reason for (_, reason), _ in self.counts.most_common(most)]
        advice = {self.remedies[reason]: reason for reason in reversed(shown) if reason in self.remedies}
        for remedy, reason in reversed(advice.items()):
            print(f"  「{reason.partition('（现有')[0]}」的处理办法：{remedy}")


class FileAside:
    """Rows of one file that are set aside."""

    def __init__(self, aside: SetAside, file: Path, by_offset: bool = False) -> None:
        """by_offset: positions are first bytes instead of row numbers."""
        self.aside, self.file, self.by_offset = aside, file, by_offset

    def add(
        self, position: int | None, reason: str, excerpt: Any = "", remedy: str = "", rows: int = 1
    ) -> None:
        """As SetAside.add; None is no row but what remains of the file."""
        row, offset = (None, position) if self.by_offset else (position, None)
        self.aside.add(self.file, row, reason, excerpt, remedy, offset=offset, rows=rows)


def _position(example: dict[str, Any]) -> str:
    """Where an example is, as users read it."""
    if example.get("offset") is not None:
        return f"字节 {example['offset']:,}"
    return f"第 {example['row']:,} 行" if example["row"] else "-"


def _excerpt(content: Any) -> str:
    """The beginning of a row; nothing of one that is nested too deep to be shown."""
    try:
        text = content if isinstance(content, str) else repr(content)
    except RecursionError:
        return ""
    return printable(text[:EXCERPT])
