"""Planted dirt: everything a cleaner has to find, counted by kind."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable

from demo.chance import Chance
from demo.patterns import read_sections

Row = dict
RARE = "的一是了在不有人上大中小天地水火山石田木日月东南西北"


class Dirt:
    """Adds bad rows to a list of clean rows; `field` names the main text of a row."""

    def __init__(self, chance: Chance) -> None:
        self.chance, self.counts = chance, Counter()
        self.lines = read_sections("dirt.txt")

    def edited(self, text: str) -> str:
        """Return a near-duplicate: a sentence appended or 2 to 5 % of the characters changed."""
        chance = self.chance
        if chance.hit(0.4) or len(text) < 60:
            return text + chance.pick(self.lines["appended"])
        letters = list(text)
        for _ in range(max(1, len(letters) * chance.between(2, 5) // 100)):
            place = chance.below(len(letters))
            if chance.hit(0.3):
                letters.insert(place, chance.pick(RARE))
            else:
                letters[place] = chance.pick(RARE)
        return "".join(letters)

    def garbled(self, text: str) -> str:
        """Return a text as it looks after a wrong decoding, or sprinkled with control characters."""
        part = text[:120]
        kind = self.chance.below(3)
        if kind == 0:
            return part.encode("utf-8").decode("latin-1")
        if kind == 1:
            return "".join("\ufffd" if self.chance.hit(0.5) else letter for letter in part)
        return "".join(
            letter + ("\x00\x08\x1b"[self.chance.below(3)] if self.chance.hit(0.4) else "") for letter in part
        )

    def plant(self, rows: list[Row], field: str, name: str, share: float = 1.0) -> list[Row]:
        """Return the rows in random order together with bad ones."""
        chance, extra = self.chance, []
        usable = [row for row in rows if isinstance(row.get(field), str)]
        texts = [row[field] for row in usable]

        def add(kind: str, portion: float, make: Callable[[Row], object]) -> None:
            for row in chance.some(usable, max(1, int(len(rows) * portion * share))):
                changed = copy.deepcopy(row)
                changed[field] = make(changed)
                if "sections" in changed and not kind.endswith("duplicate"):
                    changed["sections"] = []
                extra.append(changed)
                self.counts[f"{name}/{kind}"] += 1

        add("exact_duplicate", 0.02, lambda row: row[field])
        add("near_duplicate", 0.02, lambda row: self.edited(row[field]))
        add("spam", 0.01, lambda row: "".join(chance.some(self.lines["spam"], chance.between(1, 3))))
        add("garbled", 0.005, lambda row: self.garbled(chance.pick(texts)))
        add("too_short", 0.005, lambda row: chance.pick(self.lines["short"]))
        add("empty", 0.003, lambda row: "")
        add("null", 0.002, lambda row: None)
        add("wrong_type", 0.002, lambda row: chance.pick([0, 3.5, True, ["一", "二"], {"text": "文字"}]))
        for row in chance.some(usable, max(1, int(len(rows) * 0.002 * share))):
            extra.append({key: value for key, value in row.items() if key not in (field, "sections")})
            self.counts[f"{name}/missing_field"] += 1
        return chance.shuffled(rows + extra)

    def broken_lines(self, rows: list[Row], name: str) -> list[str]:
        """Serialise rows one per line and put some lines among them that are not JSON."""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        for _ in range(max(1, len(rows) // 500)):
            line = self.chance.pick(lines)
            bad = self.chance.pick(
                [line[: (len(line) + 1) // 2], line[:-1] + ",", "没有括号的一行", "{坏掉的行}"]
            )
            lines.insert(self.chance.below(len(lines)), bad)
            self.counts[f"{name}/not_json"] += 1
        return lines
