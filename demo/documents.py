"""Pretraining documents: the same facts told in entries, comparisons, lists, talks, stories and leaflets."""

from __future__ import annotations

from dataclasses import dataclass

from demo.chance import Chance, Deck
from demo.facts import HERE, Fact, read_tsv
from demo.patterns import Speaker, expand, fill, load_frames

Section = tuple[str, str]
LETTERS = "ABCD"
INNER_QUOTES = str.maketrans("“”", "‘’")


@dataclass
class Document:
    """One clean text; `sections` are (title, content) pairs for the encyclopedia format."""

    title: str
    label: str
    text: str
    sections: list[Section]


def join_items(items: list[str]) -> str:
    """Join names as in 甲、乙和丙."""
    return items[0] if len(items) == 1 else "、".join(items[:-1]) + "和" + items[-1]


def quoted(name: str) -> str:
    """Return a name in quotation marks, unless it is a book title with marks of its own."""
    return name if name.startswith("《") else f"“{name}”"


class Author:
    """Writes documents about the facts; every fact and entity is dealt equally often."""

    def __init__(self, facts: list[Fact], speaker: Speaker, chance: Chance) -> None:
        self.speaker, self.chance = speaker, chance
        self.frames = load_frames("frames.txt")
        self.lists = {
            row["relation"]: expand(row["template"]) for row in read_tsv(HERE / "patterns" / "lists.tsv")
        }
        self.by_entity: dict[tuple[str, str], list[Fact]] = {}
        self.by_table: dict[str, list[tuple[str, str]]] = {}
        self.by_relation: dict[str, list[Fact]] = {}
        for fact in facts:
            key = (fact.table, fact.entity)
            if key not in self.by_entity:
                self.by_table.setdefault(fact.table, []).append(key)
            self.by_entity.setdefault(key, []).append(fact)
            self.by_relation.setdefault(fact.relation, []).append(fact)
        self.entities = Deck(list(self.by_entity), chance)
        self.facts = Deck(facts, chance)
        self.listable = Deck([name for name in self.lists if name in self.by_relation], chance)
        self.groups = self._groups()

    def _groups(self) -> dict[str, list[list[Fact]]]:
        """Group the facts of the listable relations by value, keeping groups of two or more."""
        result: dict[str, list[list[Fact]]] = {}
        for relation in self.listable.items:
            groups: dict[str, list[Fact]] = {}
            for fact in self.by_relation[relation]:
                groups.setdefault(fact.value, []).append(fact)
            result[relation] = [group for group in groups.values() if len(group) > 1]
        return result

    def frame(self, section: str, **slots: str) -> str:
        """Return a filled block of `frames.txt`; name, elder, place and time are drawn when missing."""
        cast = {key: self.chance.pick(self.frames[key])[0] for key in ("name", "elder", "place", "time")}
        return fill(self.chance.pick(self.chance.pick(self.frames[section])), {**cast, **slots})

    def label(self, table: str) -> str:
        """Return the subject name of a table."""
        return self.speaker.tables[table].label

    def about(self, key: tuple[str, str], known: bool = False) -> list[str]:
        """Return one or two statements for every relation of an entity, in random order."""
        facts = self.chance.shuffled(self.by_entity[key])
        sentences: list[str] = []
        for fact in facts:
            sentences.append(self.speaker.statement(fact, self.chance, known or bool(sentences)))
        if len(facts) == 1 and self.chance.hit(0.25):
            sentence = self.speaker.statement(facts[0], self.chance)
            if sentence != sentences[0]:
                sentences[0] += self.frame("again") + sentence
        return sentences

    def linked(self, sentences: list[str]) -> str:
        """Join sentences, some of them with a linking word."""
        parts = sentences[:1]
        for sentence in sentences[1:]:
            parts.append((self.frame("link") if self.chance.hit(0.4) else "") + sentence)
        return "".join(parts)

    def neighbours(self, key: tuple[str, str], count: int) -> list[tuple[str, str]]:
        """Return other entities of the same table."""
        return [other for other in self.chance.some(self.by_table[key[0]], count + 1) if other != key][:count]

    def aside(self, key: tuple[str, str]) -> str:
        """Return a passage that leads over to another entity and tells about it."""
        lead = self.frame("also", e=quoted(key[1]))
        return lead + ("" if lead.endswith(("：", "。")) else "。") + self.linked(self.about(key))

    def entry(self, key: tuple[str, str] | None = None) -> Document:
        """Write an encyclopedia entry, with a few words about related entities."""
        key = key or self.entities.deal()
        label, chance = self.label(key[0]), self.chance
        sections: list[Section] = [("概述", self.linked(self.about(key)))]
        wanted = chance.between(2, 4) if len(self.by_entity[key]) == 1 else chance.between(1, 3)
        sections += [(other[1], self.aside(other)) for other in self.neighbours(key, wanted)]
        opening = self.frame("entry_open", e=quoted(key[1]), label=label) if chance.hit(0.6) else ""
        closing = self.frame("entry_close", label=label) if chance.hit(0.5) else ""
        text = "\n".join(
            part for part in [opening + sections[0][1], *[s[1] for s in sections[1:]], closing] if part
        )
        return Document(key[1], label, text, sections)

    def comparison(self) -> Document:
        """Compare two or three entities of one table."""
        first = self.entities.deal()
        others = self.neighbours(first, 3 if len(self.by_entity[first]) == 1 else self.chance.between(1, 2))
        if not others:
            return self.entry(first)
        second, *more = others
        label, slots = self.label(first[0]), {"e": quoted(first[1]), "f": quoted(second[1])}
        parts = [self.frame("compare_open", label=label, **slots), self.linked(self.about(first))]
        parts.append(self.frame("compare_link") + self.linked(self.about(second)))
        if self.chance.hit(0.6):
            parts.append(self.frame("compare_close", **slots))
        parts += [self.aside(other) for other in more]
        return Document(f"{first[1]}和{second[1]}", label, "".join(parts), [])

    def listing(self) -> Document:
        """List entities that share a value, then say a little more about some of them."""
        relation = self.listable.deal()
        groups = self.chance.some(self.groups[relation], self.chance.between(1, 3))
        label = self.label(relation.split(".")[0])
        parts, shown = [self.frame("list_open", label=label)], []
        for group in groups:
            members = self.chance.some(group, self.chance.between(2, 7))
            shown += members
            names = join_items([fact.entity for fact in members])
            more = "等" if len(members) < len(group) else ""
            parts.append(
                fill(self.chance.pick(self.lists[relation]), {"v": group[0].value, "list": names})
                + more
                + "。"
            )
        for fact in self.chance.some(shown, self.chance.between(2, 4)):
            parts += self.about((fact.table, fact.entity))
        return Document(f"{label}分类", label, "\n".join(parts), [])

    def related_facts(self, low: int, high: int) -> list[Fact]:
        """Return facts of one subject most of the time, of any subject otherwise."""
        first, count = self.facts.deal(), self.chance.between(low, high)
        if self.chance.hit(0.35):
            return [first] + [self.facts.deal() for _ in range(count - 1)]
        result = [first]
        for key in self.chance.some(self.by_table[first.table], count - 1):
            fact = self.chance.pick(self.by_entity[key])
            if fact not in result:
                result.append(fact)
        return result

    def subject(self, facts: list[Fact]) -> str:
        """Return the subject name of a group of facts."""
        labels = [self.label(fact.table) for fact in facts]
        return labels[0] if all(label == labels[0] for label in labels) else "百科"

    def answers(self) -> Document:
        """Write questions with their answers."""
        facts = self.related_facts(4, 7)
        label = self.subject(facts)
        marks = self.chance.pick(
            [("问：", "答："), ("问题：", "回答："), ("甲：", "乙："), ("题目：", "答案：")]
        )
        parts = [self.frame("qa_open", label=label)]
        for fact in facts:
            question = self.speaker.question(fact, self.chance)
            parts.append(f"{marks[0]}{question}\n{marks[1]}{self.speaker.answer(fact)}")
        return Document(f"{label}问答", label, "\n".join(parts), [])

    def dialog(self) -> Document:
        """Write a talk between a child and an adult in which facts come up."""
        facts = self.related_facts(4, 6)
        label = self.subject(facts)
        cast = {"name": self.frame("name"), "elder": self.frame("elder"), "place": self.frame("place")}
        parts = [self.frame("dialog_open", label=label, **cast)]
        for fact in facts:
            said = {
                "Q": self.speaker.plain_question(fact, self.chance),
                "A": self.speaker.answer(fact),
                "S": self.speaker.statement(fact, self.chance),
            }
            said = {key: text.translate(INNER_QUOTES) for key, text in said.items()}
            parts.append(self.frame("dialog_turn", **cast, **said))
        if self.chance.hit(0.6):
            parts.append(self.frame("dialog_close", **cast))
        return Document(f"{cast['name']}的{label}课", label, "".join(parts), [])

    def story(self) -> Document:
        """Write a small scene of somebody reading and finding facts."""
        facts = self.related_facts(4, 7)
        label = self.subject(facts)
        cast = {"name": self.frame("name"), "elder": self.frame("elder"), "place": self.frame("place")}
        parts = [self.frame("story_open", label=label, **cast)]
        links = self.chance.some(self.frames["story_link"], len(facts))
        for fact, readings in zip(facts, links, strict=True):
            link = fill(self.chance.pick(readings), cast) if self.chance.hit(0.7) else ""
            parts.append(link + self.speaker.statement(fact, self.chance))
        if self.chance.hit(0.7):
            parts.append(self.frame("story_close", **cast))
        return Document(f"{cast['name']}读书", label, "".join(parts), [])

    def notes(self) -> Document:
        """Write numbered study notes."""
        facts = self.related_facts(5, 9)
        label = self.subject(facts)
        style = self.chance.pick(["{i}. ", "（{i}）", "{i}、", "第{i}条：", "· "])
        parts = [self.frame("notes_open", label=label)]
        for number, fact in enumerate(facts, 1):
            parts.append(style.replace("{i}", str(number)) + self.speaker.statement(fact, self.chance))
        return Document(f"{label}笔记", label, "\n".join(parts), [])

    def quiz(self) -> Document:
        """Write multiple choice questions with the answer and the sentence that explains it."""
        facts = self.related_facts(2, 3)
        label = self.subject(facts)
        parts = [self.frame("quiz_open", label=label)]
        for fact in facts:
            options = choices(fact, self.by_relation[fact.relation], self.chance)
            if options:
                lines = [f"{letter}. {value}" for letter, value in zip(LETTERS, options, strict=True)]
                answer = self.frame("quiz_close", L=LETTERS[options.index(fact.value)])
                question = self.speaker.plain_question(fact, self.chance)
                parts.append("\n".join([question, *lines, answer + self.speaker.answer(fact)]))
            else:
                parts.append(self.speaker.statement(fact, self.chance))
        return Document(f"{label}选择题", label, "\n".join(parts), [])


def choices(fact: Fact, pool: list[Fact], chance: Chance) -> list[str]:
    """Return four different values of the relation, the right one included, or [] if there are too few."""
    values = list(dict.fromkeys(other.value for other in pool if other.value != fact.value))
    if len(values) < 3:
        return []
    return chance.shuffled([fact.value, *chance.some(values, 3)])
