"""Stage 3: instruction sets of any public format -> sft_data/sft_data.csv.

Put the files (alpaca, BELLE, medical, sharegpt … as JSON, JSON lines, parquet or CSV) into sft_data/raw, or name
data sets of a dataset_info.json or of the hub: --datasets. Preferences found among them go to preference.jsonl,
judged answers (KTO) to kto.jsonl beside it. docs/instructions.md lists the formats.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from tqdm import tqdm
from xxhash import xxh3_128_intdigest

from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import check_kept
from sources.lengths import HEADER, draw_lengths, summary, token_counts, whole_dialogue
from sources.preferences import as_dialogue
from sources.record_files import write_rows
from sources.records import DataSet, Record, data_sets
from sources.registry import find_data_sets
from sources.report import settings, table, write_json
from sources.sft_csv import write_sft_csv
from sources.weights import check_names, draw_copies, parse_weights
from stage import DEMO_DIR, ROOT, StageConfig, UserError, require, run_stage, sidecar_path

COUNTED_TOKENS = 20_000  # samples whose tokens are counted; more would tell nothing new
LENGTHS = ["问题过短", "问题过长", "回答过短", "回答过长"]
DROPPED = [*LENGTHS, "完全重复", "近似重复", "未抽中"]
OTHER_FILES = {
    "chosen": "preference.jsonl",
    "label": "kto.jsonl",
}  # by the field that tells the kind of a record


@dataclass
class Config(StageConfig):
    """阶段 3：把各种公开格式的指令、对话数据整理成 sft_data.csv（偏好数据写到旁边的 preference.jsonl）。"""

    data: Path = ROOT / "sft_data" / "raw"  # 指令数据：一个文件，或一个文件夹（含子文件夹）
    datasets: tuple[
        str, ...
    ] = ()  # 改读这些数据集：注册表里的名字、文件或文件夹、Hugging Face 上的 作者/名字
    registry: Path = ROOT / "sft_data" / "dataset_info.json"  # 数据集注册表（CareGPT、LLaMA-Factory 的格式）
    weights: tuple[str, ...] = ()  # 各来源取几遍，如 medical=2 alpaca=0.5（抽一半）；没写的 1 遍
    out: Path = ROOT / "sft_data" / "sft_data.csv"  # 输出；统计与长度分布图写在旁边（.json、.png）
    min_question: int = 2  # 问题至少多少字符（多轮对话看最长的一问）
    max_question: int = 4096  # 问题至多多少字符（多轮对话每一问都算）；0 为不限
    min_answer: int = 1  # 回答至少多少字符（多轮对话看最长的一答）
    max_answer: int = 4096  # 回答至多多少字符（多轮对话每一答都算）；0 为不限
    near_duplicates: bool = False  # 也去掉提问近似重复的（MinHash，与语料清洗同一套；每组留最先读到的）
    tokenizer: Path | None = (
        None  # 按这个词表统计 token 数；默认用 ChatGLM2 词表或 data/tokenizer.model（若有）
    )

    # The original project's limits: the demo's facts are short, and its planted long rows are to be dropped.
    DEMO = dict(
        data=DEMO_DIR / "sft",
        out=DEMO_DIR / "sft_data.csv",
        tokenizer=DEMO_DIR / "tokenizer.model",
        min_question=10,
        max_question=256,
        min_answer=5,
        max_answer=256,
    )
    INPUT = "data"

    def has_input(self) -> bool:
        return bool(self.datasets) or super().has_input()

    def check(self) -> None:
        sidecar_path(self.out)
        parse_weights(self.weights)
        for name in ("min_question", "max_question", "min_answer", "max_answer"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")


@dataclass
class Collected:
    """What is kept of all sources, in order, and what became of every row that was read."""

    records: list[Record] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # of each
    digests: list[int] = field(default_factory=list)  # of each one's content, 128 bits
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    changes: Counter[str] = field(default_factory=Counter)

    def keep_only(self, keep: np.ndarray, reason: str) -> None:
        """Drop the records that are not to be kept, (n,) bool, for a reason."""
        for index in np.flatnonzero(~keep).tolist():
            self.counts[self.sources[index]].update({"保留": -1, reason: 1})
        for name in ("records", "sources", "digests"):
            values = getattr(self, name)
            setattr(self, name, [values[index] for index in np.flatnonzero(keep).tolist()])


def questions_answers(record: Record) -> tuple[list[str], list[str]]:
    """The texts of both sides; of a preference both answers."""
    texts = [message["content"] for message in record["messages"]]
    return texts[::2], texts[1::2] + [record[key] for key in ("chosen", "rejected") if key in record]


def drop_reason(record: Record, cfg: Config) -> str:
    """Why the lengths of a record rule it out; empty if they do not."""
    questions, answers = ([len(text) for text in texts] for texts in questions_answers(record))
    if max(questions) < cfg.min_question:
        return "问题过短"
    if cfg.max_question and max(questions) > cfg.max_question:
        return "问题过长"
    if max(answers) < cfg.min_answer:
        return "回答过短"
    return "回答过长" if cfg.max_answer and max(answers) > cfg.max_answer else ""


def collect(cfg: Config, sets: list[DataSet], aside: SetAside) -> Collected:
    """Read everything; keep what fits and is no exact duplicate."""
    found, seen = Collected(), set()
    with tqdm(unit=" 条", disable=None) as progress:
        for data_set in sets:
            before, counts = len(aside), found.counts[data_set.name]
            for _, record in data_set.read(aside):
                progress.update()
                found.changes.update(record.pop("changes", ()))
                record = as_dialogue(record)
                reason = drop_reason(record, cfg)
                if not reason:
                    digest = xxh3_128_intdigest(orjson.dumps(record))
                    reason = "完全重复" if digest in seen else "保留"
                    seen.add(digest)
                counts[reason] += 1
                if reason == "保留":
                    found.records.append(record)
                    found.sources.append(data_set.name)
                    found.digests.append(digest)
            counts["搁置"] += len(aside) - before
    return found


def drop_near_duplicates(found: Collected) -> None:
    """Keep one record of those whose questions are nearly the same."""
    from data_clean.duplicates import deduplicate  # compiled code takes seconds to load
    from data_clean.signatures import Settings

    texts = ["\n".join(questions_answers(record)[0]) for record in found.records]
    cluster = deduplicate(texts, Settings()).cluster
    _, first = np.unique(cluster, return_index=True)
    keep = np.zeros(len(texts), bool)
    keep[first] = True
    found.keep_only(keep, "近似重复")


def sample(found: Collected, sets: list[DataSet], weights: dict[str, float]) -> np.ndarray:
    """Draw what sources are to give: `num_samples` of the registry, then weights. Returns copies (n,) int64, > 0.

    The hash of a record draws, so that the choice is the same in every run and whatever else there is.
    """
    hashes = np.array([digest & (2**64 - 1) for digest in found.digests], np.uint64)
    names, keep = np.array(found.sources), np.ones(len(hashes), bool)
    for name, most in {data_set.name: data_set.num_samples for data_set in sets}.items():
        rows = np.flatnonzero(names == name)
        if most is not None and most < len(rows):
            keep[rows[np.argsort(hashes[rows])[most:]]] = False
    copies = draw_copies(hashes, np.array([weights.get(name, 1.0) for name in found.sources], float))
    keep &= copies > 0
    found.keep_only(keep, "未抽中")
    return copies[keep]


def to_csv_row(record: Record) -> dict[str, Any]:
    """The last question and answer as prompt and answer, what came before as history."""
    questions, answers = questions_answers(record)
    pairs = [list(pair) for pair in zip(questions, answers, strict=True)]
    prompt, answer = pairs.pop()
    return {"prompt": prompt, "answer": answer, "system": record.get("system", ""), "history": pairs}


def write(cfg: Config, found: Collected, copies: np.ndarray, inputs: set[Path]) -> dict[str, int]:
    """Write the records by their kinds; returns how many rows each file got."""
    kinds: dict[str, list[Record]] = {cfg.out.name: []}
    for record, count in zip(found.records, copies.tolist(), strict=True):
        name = next((name for key, name in OTHER_FILES.items() if key in record), cfg.out.name)
        kinds.setdefault(name, []).extend([record] * count)
    # --out may name its input, which is replaced then; what is written beside it has no such leave.
    check_kept((cfg.out.with_name(name) for name in kinds if name != cfg.out.name), inputs)
    written = {}
    for name, records in kinds.items():
        if not records:
            continue
        if name == cfg.out.name:
            write_sft_csv(cfg.out, [to_csv_row(record) for record in records])
        else:
            write_rows(cfg.out.with_name(name), records)
        written[name] = len(records)
    return written


def earlier_outputs(cfg: Config) -> list[Path]:
    """What an earlier run wrote under the same name; the statistics beside tell."""
    try:
        earlier = set(json.loads(sidecar_path(cfg.out).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return []
    return [cfg.out.with_name(name) for name in (cfg.out.name, *OTHER_FILES.values()) if name in earlier]


def remove_stale(cfg: Config, written: dict[str, int], inputs: set[Path]) -> None:
    """Remove what an earlier run wrote here and this one did not: the next stage would train on it.

    Other files, and what this run has read, are left alone.
    """
    for path in {cfg.out, *earlier_outputs(cfg)}:
        if path.name not in written and path.is_file() and path.resolve() not in inputs:
            path.unlink()
            print(f"已删去以前写的 {path}：这次没有这一类数据。")


def measure(cfg: Config, found: Collected) -> dict[str, Any]:
    """Print and draw how long the kept records are; returns the figures."""
    questions, answers = zip(*map(questions_answers, found.records), strict=True)
    characters = {
        "longest question": np.array([max(map(len, texts)) for texts in questions]),
        "longest answer": np.array([max(map(len, texts)) for texts in answers]),
    }
    panels, lines = {"characters": characters}, {}
    lines["最长一问（字）"], lines["最长一答（字）"] = map(summary, characters.values())
    if path := vocabulary(cfg):
        step = -(-len(found.records) // COUNTED_TOKENS)
        counts = token_counts(list(map(whole_dialogue, found.records[::step])), load_tokenizer(path))
        panels["tokens"] = {"whole sample": counts[:, 0], "answers": counts[:, 1]}
        lines["整条（token）"], lines["其中回答（token）"] = map(summary, counts.T)
        note = f"；每 {step} 条数 1 条" if step > 1 else ""
        print(f"\n长度（token 按 {path} 统计{note}）：")
    else:
        print("\n长度（没有词表，未统计 token；用 --tokenizer 指定）：")
    print(table(HEADER, [[name, *line.values()] for name, line in lines.items()]))
    draw_lengths(panels, cfg.out.with_suffix(".png"))
    return lines


def vocabulary(cfg: Config) -> Path | None:
    """The vocabulary that tokens are counted with; None where there is none yet."""
    if cfg.tokenizer and (cfg.tokenizer != cfg.DEMO["tokenizer"] or cfg.tokenizer.exists()):
        return cfg.tokenizer
    usual = () if cfg.demo else (CHATGLM2, ROOT / "data" / "tokenizer.model")
    return next((path for path in usual if path.exists()), None)


def show_counts(cfg: Config, found: Collected) -> None:
    """Print what became of every row; how to loosen the limits where they cost much."""
    total = sum(found.counts.values(), Counter())
    reasons = ["保留", *(reason for reason in DROPPED if total[reason]), "搁置"]
    lines = [
        [name, c.total(), *(c[r] for r in reasons)] for name, c in [*found.counts.items(), ("合计", total)]
    ]
    print(table(["来源", "读入", *reasons], lines))
    for change, count in found.changes.items():
        print(f"  {change}：{count:,} 条")
    too_long, lost = total["问题过长"] + total["回答过长"], sum(total[reason] for reason in LENGTHS)
    if lost:
        share = 100 * lost / max(1, total.total())
        print(
            f"  长度限制（问题 {cfg.min_question}～{cfg.max_question or '不限'} 字，"
            f"回答 {cfg.min_answer}～{cfg.max_answer or '不限'} 字）去掉了 {lost:,} 条（{share:.1f}%）。"
            + ("都留下：--max_question 0 --max_answer 0；" if too_long else "")
            + "下限：--min_question、--min_answer。"
        )


def main(cfg: Config) -> None:
    if cfg.demo:
        ensure_demo()
    weights, aside = parse_weights(cfg.weights), SetAside()
    if cfg.datasets:
        sets = find_data_sets(cfg.datasets, cfg.registry)
    else:  # a folder that holds the outputs, too, is read without them
        sets = data_sets(cfg.data, skip=earlier_outputs(cfg))
    inputs = {data_set.path.resolve() for data_set in sets}
    check_kept([sidecar_path(cfg.out)], inputs)
    check_names(weights, dict.fromkeys(data_set.name for data_set in sets))
    found = collect(cfg, sets, aside)
    if cfg.near_duplicates and found.records:
        drop_near_duplicates(found)
    copies = sample(found, sets, weights)
    show_counts(cfg, found)
    aside.show()
    if not found.records:
        raise UserError(
            f"{'、'.join(cfg.datasets) or cfg.data} 里没有一条可用的指令；原因见上表，"
            "长度限制可用 --max_question、--max_answer 等放宽。"
        )
    written = write(cfg, found, copies, inputs)
    remove_stale(cfg, written, inputs)
    report = {
        "rows": written.get(cfg.out.name, 0),
        "dialogues": sum(len(record["messages"]) > 2 for record in found.records),
        "written": written,
        "sources": {
            name: {"读入": c.total(), **{r: c[r] for r in ["保留", *DROPPED, "搁置"]}}
            for name, c in found.counts.items()
        },
        "weights": weights,
        "changes": dict(found.changes),
        "lengths": measure(cfg, found),
        "set_aside": aside.report(),
        "settings": settings(cfg),
    }
    write_json(sidecar_path(cfg.out), report)
    print()
    for name, rows in written.items():
        print(f"已写入 {cfg.out.with_name(name)}：{rows:,} 条")
    print(f"统计：{sidecar_path(cfg.out)}；长度分布图：{cfg.out.with_suffix('.png')}")


if __name__ == "__main__":
    run_stage(Config, main)
