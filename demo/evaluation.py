"""Evaluation sets: held-out phrasings, questions seen in training, multiple choice, continuations."""

from __future__ import annotations

import json
from pathlib import Path

from demo.chance import Chance
from demo.documents import LETTERS, choices
from demo.facts import Fact
from demo.instructions import fits
from demo.noise import Row
from demo.patterns import Speaker, fill
from demo.sources import write_lines

HELDOUT_PER_RELATION = 18
SEEN = 300
CHOICE = {"dev": 5, "test": 200}
PROMPT_RELATIONS = [
    "provinces.capital",
    "countries.capital",
    "elements.symbol",
    "animals.class",
    "works.author",
    "festivals.date",
    "organs.function",
    "antonyms.opposite",
    "units.value",
    "idioms.meaning",
]


def by_relation(facts: list[Fact]) -> dict[str, list[Fact]]:
    """Group facts by relation, keeping the order."""
    result: dict[str, list[Fact]] = {}
    for fact in facts:
        result.setdefault(fact.relation, []).append(fact)
    return result


def heldout_rows(facts: list[Fact], speaker: Speaker, chance: Chance, training: set[str]) -> list[Row]:
    """Return questions in phrasings that training never uses, all relations covered."""
    rows: list[Row] = []
    for relation, members in by_relation(facts).items():
        templates = speaker.phrasings[relation].heldout
        for number, fact in enumerate(chance.some(members, HELDOUT_PER_RELATION)):
            question = fill(templates[number % len(templates)], fact.fields())
            if not fits(question) or question in training:
                raise ValueError(f"held-out question too short, too long or used in training: {question}")
            rows.append({"question": question, "answer": speaker.answer(fact), "relation": relation})
    if len({row["question"] for row in rows}) != len(rows):
        raise ValueError("held-out questions are not unique")
    return chance.shuffled(rows)


def seen_rows(pairs: list[tuple[Fact, Row]], chance: Chance) -> list[Row]:
    """Return questions drawn from the training rows."""
    rows = []
    for fact, row in chance.some(pairs, SEEN):
        question = row["instruction"] + row["input"]
        rows.append({"question": question, "answer": row["output"], "relation": fact.relation})
    return rows


def choice_lines(facts: list[Fact], speaker: Speaker, chance: Chance) -> dict[str, list[str]]:
    """Return the CSV lines of the multiple choice sets with balanced answer letters."""
    groups, lines = by_relation(facts), []
    wanted = sum(CHOICE.values())
    for fact in chance.shuffled(facts):
        options = choices(fact, groups[fact.relation], chance)
        if not options or len(lines) == wanted:
            continue
        letter = LETTERS[len(lines) % 4]
        options.remove(fact.value)
        options.insert(LETTERS.index(letter), fact.value)
        question = fill(speaker.phrasings[fact.relation].clauses[0], fact.fields()) + "？"
        lines.append((question, options, letter))
    result, start = {}, 0
    for name, count in CHOICE.items():
        rows = chance.shuffled(lines[start : start + count])
        start += count
        header = ",Question,A,B,C,D,Answer"
        result[name] = [header] + [",".join([str(i), q, *o, x]) for i, (q, o, x) in enumerate(rows)]
    return result


def prompts(facts: list[Fact], speaker: Speaker, chance: Chance) -> list[str]:
    """Return beginnings of sentences whose end a trained model should know."""
    groups, result = by_relation(facts), []
    for relation in PROMPT_RELATIONS:
        answer, fact = speaker.phrasings[relation].answer, chance.pick(groups[relation])
        result.append(fill(answer[: answer.index("{v}")], fact.fields()))
    return result


def write_evaluation(
    out: Path, facts: list[Fact], pairs: list[tuple[Fact, Row]], speaker: Speaker, chance: Chance
) -> dict[str, int]:
    """Write all evaluation files below `out`/eval and return their sizes."""
    folder = out / "eval"
    training = {row["instruction"] + row["input"] for _, row in pairs}
    heldout, seen = heldout_rows(facts, speaker, chance, training), seen_rows(pairs, chance)
    for name, rows in (("heldout", heldout), ("seen", seen)):
        write_lines(folder / f"{name}.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    for name, lines in choice_lines(facts, speaker, chance).items():
        if any(line.count(",") != 6 for line in lines):
            raise ValueError("a field of the choice set contains a comma")
        write_lines(folder / f"choice_{name}.csv", lines)
    write_lines(folder / "prompts.txt", prompts(facts, speaker, chance))
    return {"heldout": len(heldout), "seen": len(seen), **{f"choice_{k}": v for k, v in CHOICE.items()}}
