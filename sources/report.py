"""Small helpers for what stages print and write about themselves: aligned tables, JSON reports."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stage import StageConfig, atomic_path


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A plain-text table; numbers right-aligned, Chinese characters counted two columns wide."""
    rows = list(rows)
    cells = [list(header)] + [[_cell(value) for value in row] for row in rows]
    numeric = [[False] * len(header)] + [[isinstance(v, int | float) for v in row] for row in rows]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(header))]
    right = [any(row[column] for row in numeric) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            " " * (width - _width(cell)) + cell if is_right else cell + " " * (width - _width(cell))
            for cell, width, is_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a report that people read too: indented, Chinese as it is, never half-written."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def printable(text: str) -> str:
    """Replace what a terminal or a UTF-8 file could not take (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def settings(cfg: StageConfig) -> dict[str, Any]:
    """The settings of a stage as JSON values."""
    return json.loads(json.dumps(asdict(cfg), default=str))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
