"""Facts of the demo: rows of `knowledge/*.tsv` plus facts that are computed (arithmetic, zodiac years)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ABSENT = "-"
ZODIAC = "鼠牛虎兔龙蛇马羊猴鸡狗猪"


@dataclass(frozen=True)
class Table:
    """How the entities of one table are named in a sentence."""

    name: str
    label: str
    pronouns: tuple[str, ...]
    domain: str
    subject: str


@dataclass(frozen=True)
class Fact:
    """One (entity, relation) -> value triple; `slots` holds everything a pattern may refer to."""

    table: str
    relation: str
    entity: str
    value: str
    slots: tuple[tuple[str, str], ...]

    def fields(self) -> dict[str, str]:
        """Return the slots as a dictionary."""
        return dict(self.slots)


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Read a tab separated file with a header row."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[0].split("\t")
    rows = [line.split("\t") for line in lines[1:] if line.strip()]
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"{path.name}: expected {len(header)} columns in {row}")
    return [dict(zip(header, row, strict=True)) for row in rows]


def load_tables() -> dict[str, Table]:
    """Load the table descriptions in a fixed order."""
    tables = {}
    for row in read_tsv(HERE / "patterns" / "tables.tsv"):
        pronouns = () if row["pronouns"] == ABSENT else tuple(row["pronouns"].split("|"))
        tables[row["table"]] = Table(row["table"], row["label"], pronouns, row["domain"], row["subject"])
    return tables


def computed_rows() -> dict[str, list[dict[str, str]]]:
    """Return the rows of the tables that need no file: arithmetic and the zodiac animals of years."""
    math = []
    for a in range(2, 10):
        for b in range(a, 10):
            math.append({"entity": f"{a}乘以{b}", "a": str(a), "b": str(b), "mul": str(a * b)})
    for a in range(4, 10):
        for b in range(2, a + 1):
            math.append({"entity": f"{a}加{b}", "a": str(a), "b": str(b), "add": str(a + b)})
    # 1984 was a year of the rat; the animals repeat every twelve years.
    years = [{"entity": f"{year}年", "zodiac": ZODIAC[(year - 1984) % 12]} for year in range(2001, 2025)]
    return {"math": math, "calendar": years}


def load_facts(relations: list[str]) -> list[Fact]:
    """Build the facts of the given `table.column` relations, in table order."""
    tables, computed = load_tables(), computed_rows()
    facts = []
    for relation in relations:
        name, column = relation.split(".")
        rows = computed.get(name) or read_tsv(HERE / "knowledge" / f"{name}.tsv")
        for row in rows:
            value = row.get(column, ABSENT)
            if value == ABSENT:
                continue
            slots = {**row, "e": row["entity"], "v": value, "s": tables[name].subject.format(e=row["entity"])}
            facts.append(Fact(name, relation, row["entity"], value, tuple(slots.items())))
    return facts
