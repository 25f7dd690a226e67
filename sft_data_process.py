"""Stage 3: instruction sets of any public format -> sft_data/sft_data.csv.

Put the files (alpaca, BELLE, medical, sharegpt … as JSON, JSON lines, parquet or CSV) into sft_data/raw.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.instructions import read_instructions
from sources.report import settings, table, write_json
from sources.sft_csv import write_sft_csv
from stage import DEMO_DIR, ROOT, StageConfig, UserError, run_stage, sidecar_path


@dataclass
class Config(StageConfig):
    """阶段 3：把各种公开格式的指令、对话数据整理成 sft_data.csv。"""

    data: Path = ROOT / "sft_data" / "raw"  # 指令数据：一个文件，或一个文件夹（含子文件夹）
    out: Path = ROOT / "sft_data" / "sft_data.csv"  # 输出；统计写在旁边的同名 .json
    min_question: int = 10  # 问题至少多少字符（多轮对话看最长的一问）
    max_question: int = 256  # 问题至多多少字符（多轮对话每一问都算）
    min_answer: int = 5  # 回答至少多少字符（多轮对话看最长的一答）
    max_answer: int = 256  # 回答至多多少字符（多轮对话每一答都算）

    DEMO = dict(data=DEMO_DIR / "sft", out=DEMO_DIR / "sft_data.csv")
    INPUT = "data"

    def check(self) -> None:
        sidecar_path(self.out)


def to_row(instruction: dict[str, Any]) -> dict[str, Any]:
    """The last question and answer as prompt and answer, what came before as history."""
    texts = [message["content"] for message in instruction["messages"]]
    pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    prompt, answer = pairs.pop()
    return {"prompt": prompt, "answer": answer, "system": instruction.get("system", ""), "history": pairs}


def drop_reason(row: dict[str, Any], cfg: Config) -> str:
    """Why the lengths of a row rule it out; empty if they do not."""
    turns = [*row["history"], [row["prompt"], row["answer"]]]
    questions, answers = ([len(turn[side]) for turn in turns] for side in (0, 1))
    if max(questions) < cfg.min_question:
        return "问题过短"
    if max(questions) > cfg.max_question:
        return "问题过长"
    if max(answers) < cfg.min_answer:
        return "回答过短"
    return "回答过长" if max(answers) > cfg.max_answer else ""


def collect(cfg: Config, aside: SetAside) -> tuple[list[dict[str, Any]], dict[str, Counter[str]]]:
    """The rows that are kept, in order, and for every source how many were kept or dropped and why."""
    rows, counts = [], defaultdict(Counter)
    seen: set[bytes] = set()
    for instruction in tqdm(read_instructions(cfg.data, aside), unit=" 条", disable=None):
        row = to_row(instruction)
        reason = drop_reason(row, cfg)
        if not reason:
            identity = hashlib.blake2b(repr(row).encode(), digest_size=16).digest()
            reason = "完全重复" if identity in seen else "保留"
            seen.add(identity)
        counts[instruction["source"]][reason] += 1
        if reason == "保留":
            rows.append(row)
    return rows, counts


def main(cfg: Config) -> None:
    if cfg.demo:
        ensure_demo()
    aside = SetAside()
    rows, counts = collect(cfg, aside)
    reasons = ["保留", "问题过短", "问题过长", "回答过短", "回答过长", "完全重复"]
    total = sum(counts.values(), Counter())
    lines = [[name, c.total(), *(c[r] for r in reasons)] for name, c in [*counts.items(), ("合计", total)]]
    print(table(["来源", "读入", *reasons], lines))
    aside.show()
    if not rows:
        raise UserError(
            f"{cfg.data} 里没有一条可用的指令；原因见上表，长度限制可用 --max_question、--max_answer 等放宽。"
        )
    write_sft_csv(cfg.out, rows)
    report = {
        "rows": len(rows),
        "dialogues": sum(bool(row["history"]) for row in rows),
        "sources": {name: {"读入": c.total(), **{r: c[r] for r in reasons}} for name, c in counts.items()},
        "set_aside": aside.report(),
        "settings": settings(cfg),
    }
    write_json(sidecar_path(cfg.out), report)
    print(f"\n已写入 {cfg.out}：{len(rows):,} 条（其中多轮 {report['dialogues']:,} 条）")


if __name__ == "__main__":
    run_stage(Config, main)
