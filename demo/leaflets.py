"""Health documents: leaflets about an ailment, textbook passages about the body and nutrition."""

from __future__ import annotations

from demo.documents import Author, Document

HEADINGS = {
    "ailments.symptoms": "症状",
    "ailments.department": "就诊",
    "ailments.prevention": "预防",
}
LINKS = {
    "ailments.symptoms": ["说到表现，", "先看症状：", "怎样识别？", "它有哪些表现呢？"],
    "ailments.department": ["关于就诊，", "去哪里看病？", "挂号时请注意：", "就医提示："],
    "ailments.prevention": ["日常保健方面，", "怎样预防？", "说到预防，", "平时的做法："],
}


def leaflet(author: Author, key: tuple[str, str]) -> Document:
    """Write a leaflet about one ailment and a short passage about another topic of health."""
    chance, speaker = author.chance, author.speaker
    parts, sections = [author.frame("leaflet_open", e=key[1])], []
    for fact in chance.shuffled(author.by_entity[key]):
        link = chance.pick(LINKS[fact.relation]) if chance.hit(0.5) else ""
        content = link + speaker.statement(fact, chance, known=chance.hit(0.5))
        parts.append(content)
        sections.append((HEADINGS[fact.relation], content))
    for _ in range(chance.between(0, 2)):
        other = author.entities.deal()
        parts.append(author.frame("leaflet_link") + author.linked(author.about(other)))
    parts.append(author.frame("leaflet_close"))
    separator = chance.pick(["", "\n"])
    return Document(key[1], "疾病", separator.join(parts), sections)


def medical_document(author: Author) -> Document:
    """Write one health document; `author` must hold medical facts only."""
    key = author.entities.deal()
    if key[0] == "ailments" and author.chance.hit(0.6):
        return leaflet(author, key)
    kinds = [author.comparison, author.answers, author.dialog, author.notes, author.story, author.listing]
    return author.chance.pick([lambda: author.entry(key), *kinds])()
