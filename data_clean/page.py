"""report.html: what cleaning did, on one page that works without a network, for whoever wants to look at it."""

from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import jinja2

from data_clean.plot import plot
from stage import atomic_path

MOST_SOURCES = 100  # rows of the table of data sets; the rest are added up
# A browser would show nothing for control characters.
CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"}
Segment = tuple[str, bool]  # a piece of a text, and whether the other text lacks it


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write a report, as of `Tally.report` with what the stage adds to it, as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not of Markup
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "compact": compact, "percent": percent}
    rules = sorted(report["rules"].items(), key=lambda rule: -rule[1]["rows"])
    rows, total = by_source(report["sources"])
    plots = [plot(name, histogram) for name, histogram in report.get("histograms", {}).items()]
    html = environment.get_template("page.html").render(
        report=report,
        rules=rules,
        sources=rows,
        total=total,
        plots=[svg for svg in plots if svg],
        differences=differences,
        set_aside=set_aside_rows(report.get("set_aside", {})),
    )
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def by_source(sources: dict[str, Any]) -> tuple[list[tuple[str, dict[str, Any]]], dict[str, Any]]:
    """The largest data sets with the sum of all others, and the sum of all."""
    ordered = sorted(sources.items(), key=lambda source: -source[1]["rows_in"])
    rows, others = ordered[:MOST_SOURCES], ordered[MOST_SOURCES:]
    if others:
        rows.append((f"其余 {len(others)} 个来源", added(account for _, account in others)))
    return rows, added(sources.values())


def added(accounts: Any) -> dict[str, Any]:
    """The sum of the accounts of several data sets."""
    total: dict[str, Any] = {
        "rows_in": 0,
        "rows_out": 0,
        "characters_in": 0,
        "characters_out": 0,
        "dropped": {},
    }
    for account in accounts:
        for key in ("rows_in", "rows_out", "characters_in", "characters_out"):
            total[key] += account[key]
        for rule, rows in account["dropped"].items():
            total["dropped"][rule] = total["dropped"].get(rule, 0) + rows
    return total


def set_aside_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What could not be read: file, reason, rows, remedy, examples."""
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for example in report.get("examples", []):
        examples.setdefault((example["file"], example["reason"]), []).append(example)
    return [
        {
            **count,
            "remedy": report["remedies"].get(count["reason"], ""),
            "examples": examples.get((count["file"], count["reason"]), []),
        }
        for count in report.get("counts", [])
    ]


def differences(one: str, other: str) -> tuple[list[Segment], list[Segment]]:
    """Two texts in segments, those marked that the other one lacks."""
    one, other = visible(one), visible(other)
    left, right = [], []
    for kind, a, b, c, d in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        left.append((one[a:b], kind != "equal"))
        right.append((other[c:d], kind != "equal"))
    return [s for s in left if s[0]], [s for s in right if s[0]]


def visible(text: str) -> str:
    """The text with control characters as \\x00 and so on."""
    return text.translate(CONTROLS)


def number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def compact(value: float) -> str:
    """A number as Chinese says large ones: 1.23亿, 45.6万."""
    for unit, name in ((10**8, "亿"), (10**4, "万")):
        if abs(value) >= unit:
            digits = 2 if value < 10 * unit else 1 if value < 100 * unit else 0
            return f"{value / unit:,.{digits}f}{name}"
    return f"{value:,.0f}"


def percent(part: float, whole: float) -> str:
    """A share in percent; small ones are not rounded to nothing."""
    share = 100 * part / whole if whole else 0
    return f"{share:.0f}%" if share in (0, 100) else f"{share:.1f}%" if share >= 0.1 else f"{share:.2g}%"
