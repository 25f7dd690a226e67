"""Question and answer rows for supervised fine-tuning, and the preference pairs."""

from __future__ import annotations

import json
from pathlib import Path

from demo.chance import Chance
from demo.facts import Fact
from demo.noise import Dirt, Row
from demo.patterns import QUESTION_LENGTH, Speaker, fill, load_frames
from demo.sources import write_array, write_lines

# How many rows of each kind of template a fact gets.
ROWS_PER_FACT = {"clause": 8, "complete": 5, "phrase": 2, "input": 2}


def fits(question: str) -> bool:
    """Tell whether a question has a length the pipeline keeps."""
    return QUESTION_LENGTH[0] <= len(question) <= QUESTION_LENGTH[1]


def training_rows(facts: list[Fact], speaker: Speaker, chance: Chance) -> list[tuple[Fact, Row]]:
    """Return the clean rows; questions are unique and belong to one answer."""
    rows, answers = [], {}
    for fact in facts:
        answer = speaker.answer(fact)
        for kind, count in ROWS_PER_FACT.items():
            taken = 0
            for template in chance.shuffled(speaker.questions[fact.relation][kind]):
                instruction, _, context = fill(template, fact.fields()).partition("||")
                question = instruction + context
                if taken == count:
                    break
                if not fits(question) or (question in answers and answers[question] == answer):
                    continue
                if question in answers:
                    raise ValueError(f"two answers to {question}: {answer} and {answers[question]}")
                answers[question] = answer
                rows.append((fact, {"instruction": instruction, "input": context, "output": answer}))
                taken += 1
    return rows


def dirty_rows(rows: list[Row], dirt: Dirt, chance: Chance, name: str) -> list[Row]:
    """Return the rows in random order with bad ones among them."""
    extra = []
    for kind, portion in (
        ("empty_output", 0.004),
        ("too_short", 0.004),
        ("too_long", 0.003),
        ("duplicate", 0.01),
    ):
        for row in chance.some(rows, max(1, int(len(rows) * portion))):
            changed = dict(row)
            if kind == "empty_output":
                changed["output"] = ""
            elif kind == "too_short":
                changed.update(instruction="你好", input="", output="好")
            elif kind == "too_long":
                changed["output"] = row["output"] * (300 // len(row["output"]) + 1)
            extra.append(changed)
            dirt.counts[f"{name}/{kind}"] += 1
    return chance.shuffled(rows + extra)


def write_sft(out: Path, pairs: list[tuple[Fact, Row]], speaker: Speaker, dirt: Dirt, chance: Chance) -> None:
    """Write the three fine-tuning files below `out`/sft."""
    groups: dict[str, list[Row]] = {"alpaca": [], "belle": [], "medical": []}
    for fact, row in pairs:
        if speaker.tables[fact.table].domain == "medical":
            groups["medical"].append(row)
        else:
            groups["alpaca" if row["input"] or chance.hit(0.45) else "belle"].append(row)
    sft = out / "sft"
    write_array(
        sft / "alpaca_gpt4_data_zh_demo.json", dirty_rows(groups["alpaca"], dirt, chance, "sft_alpaca")
    )
    for name, file in (("belle", "Belle_open_source_demo.json"), ("medical", "medical_train_zh_0_demo.json")):
        rows = dirty_rows(groups[name], dirt, chance, f"sft_{name}")
        write_lines(sft / file, dirt.broken_lines(rows, f"sft_{name}"))


def wrong_answer(fact: Fact, pool: list[Fact], speaker: Speaker, chance: Chance) -> str:
    """Return the canonical sentence with the value of another entity, or an unhelpful reply."""
    values = list(dict.fromkeys(other.value for other in pool if other.value != fact.value))
    if not values or chance.hit(0.2):
        return chance.pick(load_frames("frames.txt")["unhelpful"])[0]
    return fill(speaker.phrasings[fact.relation].answer, {**fact.fields(), "v": chance.pick(values)})


def write_preferences(
    out: Path, facts: list[Fact], speaker: Speaker, chance: Chance, count: int = 500
) -> None:
    """Write the pairs of a good and a bad answer below `out`/preference."""
    pools: dict[str, list[Fact]] = {}
    for fact in facts:
        pools.setdefault(fact.relation, []).append(fact)
    reward, preference, seen = [], [], set()
    while len(reward) + len(preference) < 2 * count:
        fact = chance.pick(facts)
        question, chosen = speaker.question(fact, chance), speaker.answer(fact)
        if not fits(question) or question in seen:
            continue
        seen.add(question)
        rejected = wrong_answer(fact, pools[fact.relation], speaker, chance)
        if len(reward) < count:
            reward.append({"question": question, "response_chosen": chosen, "response_rejected": rejected})
        else:
            human = {"from": "human", "value": question}
            good, bad = ({"from": "gpt", "value": text} for text in (chosen, rejected))
            preference.append({"conversations": [human], "chosen": good, "rejected": bad})
    folder = out / "preference"
    write_lines(folder / "reward_demo.json", [json.dumps(row, ensure_ascii=False) for row in reward])
    write_array(folder / "dpo_demo.json", preference)
