"""Generate the demo corpus: `python -m demo.make --out DIR --seed 0 --size_mb 10`."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from demo.chance import Chance
from demo.documents import Author, Document
from demo.evaluation import write_evaluation
from demo.facts import Fact, load_facts, load_tables
from demo.instructions import training_rows, write_preferences, write_sft
from demo.noise import Dirt
from demo.patterns import Speaker, check_heldout
from demo.sources import write_documents, write_raw
from demo.sums import Calculator


def build_documents(
    facts: list[Fact], speaker: Speaker, seed: int, size_mb: float
) -> dict[str, list[Document]]:
    """Write the clean pretraining documents of all sources."""
    medical = [fact for fact in facts if speaker.tables[fact.table].domain == "medical"]
    author = Author(facts, speaker, Chance(seed, 1))
    healer = Author(medical, speaker, Chance(seed, 2))
    return write_documents(author, healer, Calculator(facts, Chance(seed, 3)), size_mb * 1_000_000)


def write_manifest(out: Path, seed: int, size_mb: float, counts: dict[str, object], planted: Counter) -> None:
    """Write the counts and the checksum of every file."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    sums = {
        path.relative_to(out).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }
    manifest = {"seed": seed, "size_mb": size_mb, "counts": counts, "planted": dict(sorted(planted.items()))}
    text = json.dumps({**manifest, "files": sums}, ensure_ascii=False, indent=2) + "\n"
    (out / "manifest.json").write_bytes(text.encode("utf-8"))


def fill_folder(out: Path, seed: int, size_mb: float) -> None:
    """Write the whole demo corpus into an existing empty folder."""
    speaker = Speaker(load_tables())
    check_heldout(speaker)
    facts = load_facts(list(speaker.phrasings))
    documents = build_documents(facts, speaker, seed, size_mb)
    dirt = Dirt(Chance(seed, 4))
    write_raw(out, documents, dirt, Chance(seed, 5))
    pairs = training_rows(facts, speaker, Chance(seed, 6))
    write_sft(out, pairs, speaker, dirt, Chance(seed, 7))
    write_preferences(out, facts, speaker, Chance(seed, 8))
    sizes = write_evaluation(out, facts, pairs, speaker, Chance(seed, 9))
    counts = {
        "facts": len(facts),
        "relations": len(speaker.phrasings),
        "clean_documents": {name: len(items) for name, items in documents.items()},
        "clean_text_bytes": sum(len(d.text.encode("utf-8")) for items in documents.values() for d in items),
        "clean_sft_rows": len(pairs),
        **sizes,
    }
    write_manifest(out, seed, size_mb, counts, dirt.counts)


def make_demo(out: Path, seed: int = 0, size_mb: float = 10) -> None:
    """Generate the demo corpus in `out`; the folder appears only when everything is written.

    An earlier result in `out` is replaced; any other non-empty folder is left alone with an error.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").exists():
        raise FileExistsError(f"{out} is not empty and holds no demo corpus")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill_folder(temporary, seed, size_mb)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def main() -> None:
    """Read the command line and generate the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size_mb", type=float, default=10, help="megabytes of clean pretraining text")
    arguments = parser.parse_args()
    make_demo(arguments.out, arguments.seed, arguments.size_mb)


if __name__ == "__main__":
    main()
