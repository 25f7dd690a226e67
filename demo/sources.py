"""Writes the pretraining documents in the formats of the public corpora the pipeline reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from demo.chance import Chance
from demo.documents import Author, Document
from demo.leaflets import medical_document
from demo.noise import Dirt, Row
from demo.sums import Calculator

SHARES = {"wiki": 0.24, "baidu": 0.24, "c4": 0.26, "wudao": 0.16, "medical": 0.10}
LENGTHS = (40, 600)


def collect(make: Callable[[], Document], size: float, seen: set[str]) -> list[Document]:
    """Write different documents of allowed length until they hold `size` bytes of text."""
    documents, total = [], 0
    while total < size:
        document = make()
        if not LENGTHS[0] <= len(document.text) <= LENGTHS[1] or document.text in seen:
            continue
        seen.add(document.text)
        documents.append(document)
        total += len(document.text.encode("utf-8"))
    return documents


def write_documents(
    author: Author, healer: Author, calculator: Calculator, size: float
) -> dict[str, list[Document]]:
    """Write the clean documents of every source."""
    chance, seen = author.chance, set()

    def from_calculator() -> Document:
        title, text = calculator.document()
        return Document(title, "数学", text, [])

    makers = {
        "wiki": [author.entry, author.entry, author.comparison, author.notes],
        "baidu": [author.entry],
        "c4": [author.dialog, author.story, author.answers, author.quiz, from_calculator],
        "wudao": [author.listing, author.comparison, author.notes, author.story, from_calculator],
        "medical": [lambda: medical_document(healer)],
    }
    return {
        name: collect(lambda kinds=kinds: chance.pick(kinds)(), size * SHARES[name], seen)
        for name, kinds in makers.items()
    }


def baidu_row(document: Document, number: int, chance: Chance) -> Row:
    """Return an encyclopedia row; about a third has no summary, some have no sections."""
    sections = [{"title": title, "content": content} for title, content in document.sections]
    row: Row = {"title": document.title, "summary": document.text, "sections": [], "tags": [document.label]}
    row["url"] = f"http://example.com/item/{number}"
    if chance.hit(0.34):
        if chance.hit(0.5):
            row["summary"] = None
        else:
            del row["summary"]
        row["sections"] = sections
    elif chance.hit(0.6):
        row["summary"], row["sections"] = document.sections[0][1], sections[1:]
    elif chance.hit(0.5):
        row["sections"] = None
    return row


def wudao_row(document: Document, number: int) -> Row:
    """Return a row of the web text corpus."""
    row: Row = {"id": number, "uniqueKey": f"demo{number:08d}", "titleUkey": f"title{number:08d}"}
    return {**row, "dataType": document.label, "title": document.title, "content": document.text}


def write_array(path: Path, rows: list[Row]) -> None:
    """Write a JSON array, one row per line."""
    body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"[\n{body}\n]\n".encode())


def write_lines(path: Path, lines: list[str]) -> None:
    """Write lines with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))


def split(rows: list, parts: int) -> list[list]:
    """Cut a list into contiguous parts of about equal length."""
    size = -(-len(rows) // parts)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def write_raw(out: Path, documents: dict[str, list[Document]], dirt: Dirt, chance: Chance) -> None:
    """Write all raw corpora with planted dirt below `out`/raw."""
    raw = out / "raw"
    wiki = [{"completion": d.text, "source": "wikipedia.zh2307"} for d in documents["wiki"]]
    write_array(raw / "wikipedia-cn-demo.json", dirt.plant(wiki, "completion", "wiki"))
    baidu = [baidu_row(d, number, chance) for number, d in enumerate(documents["baidu"], 1)]
    lines = dirt.broken_lines(dirt.plant(baidu, "summary", "baidu"), "baidu")
    write_lines(raw / "563w_baidubaike_demo.json", lines)
    web = dirt.plant([{"text": d.text} for d in documents["c4"]], "text", "c4")
    for number, part in enumerate(split(web, 3)):
        write_lines(raw / "C4_zh" / f"part-{number:03d}.jsonl", dirt.broken_lines(part, "c4"))
    wudao = [wudao_row(d, number) for number, d in enumerate(documents["wudao"], 1)]
    for number, part in enumerate(split(dirt.plant(wudao, "content", "wudao"), 2), 1):
        write_array(raw / "WuDaoCorpus_demo" / f"part-{number:04d}.json", part)
    health = dirt.plant([{"text": d.text} for d in documents["medical"]], "text", "medical")
    names = ["medical_book_zh.json", "train_encyclopedia.json"]
    for name, part in zip(names, split(health, 2), strict=True):
        write_lines(raw / "medical" / name, dirt.broken_lines(part, "medical"))
