"""Phrasings: loads `patterns/*.txt`, expands `[a|b]` alternatives and fills the slots."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from demo.chance import Chance
from demo.facts import HERE, Fact, Table

FILES = ["geography", "science", "history", "language", "health", "numbers"]
ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
PUNCTUATION = re.compile(r"[\s，。？！：；、“”‘’《》（）()?!,.:;_]|请问")
QUESTION_LENGTH = (10, 256)


@dataclass
class Phrasing:
    """All templates of one relation; statements and questions are already expanded."""

    relation: str
    answer: str = ""
    statements: list[list[str]] = field(default_factory=list)
    clauses: list[str] = field(default_factory=list)
    phrases: list[str] = field(default_factory=list)
    complete: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)


def expand(text: str) -> list[str]:
    """Return every reading of a text with `[a|b]` alternatives."""
    parts = ALTERNATIVES.split(text)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def read_sections(name: str) -> dict[str, list[str]]:
    """Read a file of `[[section]]` headers, each followed by one entry per line; # starts a comment."""
    sections: dict[str, list[str]] = {}
    for line in (HERE / "patterns" / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("[[") and line.endswith("]]"):
            current = sections.setdefault(line[2:-2], [])
        elif line.strip() and not line.startswith("#"):
            current.append(line)
    return sections


def load_frames(name: str) -> dict[str, list[list[str]]]:
    """Load a file of text blocks; every entry becomes the list of its readings."""
    return {key: [expand(line) for line in lines] for key, lines in read_sections(name).items()}


def load_phrasings() -> dict[str, Phrasing]:
    """Load the templates of all relations in a fixed order."""
    result = {}
    for name in FILES:
        for relation, lines in read_sections(f"{name}.txt").items():
            phrasing = Phrasing(relation)
            lists = {
                "Q": phrasing.clauses,
                "N": phrasing.phrases,
                "F": phrasing.complete,
                "I": phrasing.inputs,
                "H": phrasing.heldout,
            }
            for line in lines:
                kind, text = line[0], line[2:]
                if kind == "A":
                    phrasing.answer = text
                    phrasing.statements.append([text])
                elif kind == "S":
                    phrasing.statements.append(expand(text))
                else:
                    lists[kind].extend(expand(text))
            result[relation] = phrasing
    return result


class Speaker:
    """Turns facts into statements, questions and answers."""

    def __init__(self, tables: dict[str, Table]) -> None:
        self.tables = tables
        self.phrasings = load_phrasings()
        self.wrappers = read_sections("wrappers.txt")
        self.questions = {relation: self._training_templates(relation) for relation in self.phrasings}

    def _training_templates(self, relation: str) -> dict[str, list[str]]:
        """Return the training templates of a relation by kind; `||` separates instruction and input."""
        phrasing, wrap = self.phrasings[relation], self.wrappers
        return {
            "clause": [w.replace("{q}", q) for q in phrasing.clauses for w in wrap["question"]],
            "phrase": [w.replace("{n}", n) for n in phrasing.phrases for w in wrap["phrase"]],
            "complete": list(phrasing.complete),
            "input": list(phrasing.inputs)
            + [w.replace("{q}", q) for q in phrasing.clauses for w in wrap["input"]],
        }

    def answer(self, fact: Fact) -> str:
        """Return the canonical sentence of a fact."""
        return fill(self.phrasings[fact.relation].answer, fact.fields())

    def statement(self, fact: Fact, chance: Chance, known: bool = False) -> str:
        """Say a fact in one of many ways; `known` allows a pronoun for an entity named before."""
        template = chance.pick(chance.pick(self.phrasings[fact.relation].statements))
        slots = fact.fields()
        pronouns = self.tables[fact.table].pronouns
        if known and pronouns and template.startswith("{s}") and chance.hit(0.4):
            slots["s"] = chance.pick(pronouns)
        return fill(template, slots)

    def question(self, fact: Fact, chance: Chance) -> str:
        """Ask for a fact in one of the training phrasings."""
        kinds = self.questions[fact.relation]
        kind = "clause" if chance.hit(0.75) else "complete"
        return fill(chance.pick(kinds[kind]), fact.fields())

    def plain_question(self, fact: Fact, chance: Chance) -> str:
        """Ask for a fact with a bare clause."""
        return fill(chance.pick(self.phrasings[fact.relation].clauses), fact.fields()) + "？"


def fill(template: str, slots: dict[str, str]) -> str:
    """Replace the {slots} of a template."""
    if "{" not in template:
        return template
    return template.format_map(slots)


def skeleton(text: str) -> str:
    """Return a text without punctuation and polite prefix, to compare templates."""
    return PUNCTUATION.sub("", text)


def check_heldout(speaker: Speaker) -> None:
    """Assert that no held-out template equals a training template of its relation."""
    for relation, phrasing in speaker.phrasings.items():
        training = speaker.questions[relation]
        known = {skeleton(text) for texts in training.values() for text in texts}
        if len(phrasing.heldout) < 3 or sum(map(len, training.values())) < 14:
            raise ValueError(f"{relation}: too few question templates")
        if sum(map(len, phrasing.statements)) < 12 or not phrasing.answer:
            raise ValueError(f"{relation}: too few statements")
        for text in phrasing.heldout:
            if skeleton(text) in known:
                raise ValueError(f"{relation}: held-out template is used in training: {text}")
