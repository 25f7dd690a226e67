"""Daily work on instruction files of any format (docs/instructions.md):

python sft_tools.py validate a.json b.jsonl
python sft_tools.py count sft_data/raw --tokenizer data/tokenizer.model
python sft_tools.py dedup a.json b.jsonl --out clean.jsonl
python sft_tools.py sample a.json --rows 1000 --out small.json
python sft_tools.py convert a.json --to sharegpt --out b.jsonl

`dedup` and `sample` leave the rows as they are, other fields too; `convert` writes the messages alone. Rows that
are no instruction are counted and shown, never written. Output is JSON lines, or an array for names in .json.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from tqdm import tqdm
from tyro.conf import Positional
from xxhash import xxh3_64_intdigest, xxh3_128_intdigest

from sources.aside import SetAside
from sources.lengths import token_counts, whole_dialogue
from sources.preferences import as_dialogue
from sources.record_files import Style, in_style, write_rows
from sources.records import Record, data_sets
from sources.report import table
from sources.turns import Row
from stage import UserError, require, run

KINDS = {"chosen": "偏好", "label": "评判", "reference": "参考答案"}
BATCH = 2000  # records whose tokens are counted together


@dataclass
class Validate:
    """检查：每个文件读到什么、哪些行用不了、为什么；有用不了的行时以状态码 1 结束。"""

    files: Positional[tuple[Path, ...]]  # 文件或文件夹，任何支持的格式

    def run(self) -> None:
        aside, lines = SetAside(), []
        changes: Counter[str] = Counter()
        for path in self.files:
            for data_set in data_sets(path):
                before, kinds = len(aside), Counter()
                for _, record in data_set.read(aside):
                    kinds[kind(record)] += 1
                    changes.update(record.get("changes", ()))
                kinds["搁置"] = len(aside) - before
                columns = ("单轮", "多轮", *KINDS.values(), "搁置")
                lines.append([data_set.path.name, kinds.total(), *(kinds[name] for name in columns)])
        print(table(["文件", "读入", "单轮", "多轮", *KINDS.values(), "搁置"], lines))
        for change, count in changes.items():
            print(f"  {change}：{count:,} 条")
        aside.show()
        if len(aside):
            raise SystemExit(1)


@dataclass
class Count:
    """统计：条数、轮数、字数；给了词表时还有 token 数，以及其中计损失的。"""

    files: Positional[tuple[Path, ...]]  # 文件或文件夹，任何支持的格式
    tokenizer: Path | None = None  # 词表：SentencePiece 文件或 Hugging Face 文件夹

    def run(self) -> None:
        from chatglm_tokenizer.load import load_tokenizer

        tokenizer = load_tokenizer(self.tokenizer) if self.tokenizer else None
        aside, lines = SetAside(), []
        for path in self.files:
            for data_set in data_sets(path):
                totals = np.zeros(5 if tokenizer else 3, np.int64)
                records = (as_dialogue(record) for _, record in data_set.read(aside))
                for batch in batches(tqdm(records, data_set.path.name, unit=" 条", disable=None), BATCH):
                    dialogues = [whole_dialogue(record) for record in batch]
                    answers = sum(m["role"] == "assistant" for d in dialogues for m in d)
                    characters = sum(len(m["content"]) for d in dialogues for m in d)
                    tokens = token_counts(dialogues, tokenizer).sum(0).tolist() if tokenizer else []
                    totals += [len(batch), answers, characters, *tokens]
                lines.append([data_set.path.name, *totals.tolist()])
        header = ["文件", "条", "轮", "字", *(["token", "其中回答"] if tokenizer else [])]
        print(table(header, lines))
        aside.show()


@dataclass
class Dedup:
    """去重：内容（对话与回答）完全相同的只留第一条；--by question 时提问相同就算重复。"""

    files: Positional[tuple[Path, ...]]  # 文件或文件夹，任何支持的格式
    out: Path  # 输出：.json 为数组，其余为 JSON lines；各行原样写出
    by: Literal["all", "question"] = "all"  # 按整条还是只按提问判断

    def run(self) -> None:
        aside, seen, read = SetAside(), set(), Counter()

        def unique() -> Iterator[Row]:
            for row, record in all_rows(self.files, aside):
                read.update(["读入"])
                identity = xxh3_128_intdigest(orjson.dumps(self.identity(record)))
                if identity not in seen:
                    seen.add(identity)
                    yield row

        written = write_some(self.out, unique(), aside)
        print(
            f"读入 {read['读入']:,} 条，重复 {read['读入'] - written:,} 条；已写入 {self.out}：{written:,} 条"
        )

    def identity(self, record: Record) -> Any:
        if self.by == "question":
            return [m["content"] for m in record["messages"] if m["role"] == "user"]
        return {key: value for key, value in record.items() if key != "changes"}


@dataclass
class Sample:
    """抽样：按内容的哈希抽出若干条或一部分；同样的输入与种子总是同样的结果。"""

    files: Positional[tuple[Path, ...]]  # 文件或文件夹，任何支持的格式
    out: Path  # 输出：.json 为数组，其余为 JSON lines；各行原样写出，保持原来的顺序
    rows: int | None = None  # 抽多少条（内存里只放这么多）
    share: float | None = None  # 或抽多大一部分，如 0.1
    seed: int = 0  # 换一个种子就换一批

    def run(self) -> None:
        if (self.rows is None) == (self.share is None):
            raise UserError("请给出 --rows（多少条）或 --share（多大一部分）之一。")
        require(self.rows is None or self.rows > 0, "rows", self.rows, "必须大于 0")
        require(self.share is None or 0 < self.share <= 1, "share", self.share, "在 0 与 1 之间")
        aside = SetAside()
        rows = self.drawn(all_rows(self.files, aside))
        print(f"已写入 {self.out}：{write_some(self.out, rows, aside):,} 条")

    def drawn(self, rows: Iterable[tuple[Row, Record]]) -> Iterator[Row]:
        """Those with the least hashes, or those whose hash is below the share; in order."""
        numbered = ((self.hash_of(record), place, row) for place, (row, record) in enumerate(rows))
        if self.share is not None:
            yield from (row for number, _, row in numbered if number < self.share * 2**64)
            return
        least = heapq.nsmallest(self.rows, numbered, key=lambda entry: entry[:2])
        yield from (row for _, _, row in sorted(least, key=lambda entry: entry[1]))

    def hash_of(self, record: Record) -> int:
        return xxh3_64_intdigest(orjson.dumps(record), self.seed & (2**64 - 1))


@dataclass
class Convert:
    """转换：任何支持的格式 -> alpaca、sharegpt 或 openai；再转回来，各轮文字不变。"""

    files: Positional[tuple[Path, ...]]  # 文件或文件夹，任何支持的格式
    to: Style  # 目标格式
    out: Path  # 输出：.json 为数组，其余为 JSON lines

    def run(self) -> None:
        aside, changes = SetAside(), Counter()

        def converted() -> Iterator[Row]:
            for _, record in all_rows(self.files, aside):
                changes.update(record.get("changes", ()))
                yield in_style(record, self.to)

        print(f"已写入 {self.out}：{write_some(self.out, converted(), aside):,} 条（{self.to}）")
        for change, count in changes.items():
            print(f"  {change}：{count:,} 条")


def all_rows(files: Iterable[Path], aside: SetAside) -> Iterator[tuple[Row, Record]]:
    """(row as it stands there, record) of all files."""
    for path in files:
        for data_set in data_sets(path):
            yield from tqdm(data_set.read(aside), data_set.path.name, unit=" 条", disable=None)


def write_some(out: Path, rows: Iterator[Row], aside: SetAside) -> int:
    """Write rows, show what was set aside; UserError, and nothing written, where there is none."""
    first = next(rows, None)
    if first is None:
        aside.show()
        raise UserError(f"没有一条可写，{out} 未改动。")
    written = write_rows(out, (row for part in ([first], rows) for row in part))
    aside.show()
    return written


def batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of at most so many records."""
    records = iter(records)
    while batch := list(islice(records, size)):
        yield batch


def kind(record: Record) -> str:
    """What a record is, as `validate` counts it."""
    special = next((name for key, name in KINDS.items() if key in record), None)
    return special or ("多轮" if len(record["messages"]) > 2 else "单轮")


def main() -> None:
    """Run the tool that the command line names."""
    import tyro

    tools = {tool.__name__.lower(): tool for tool in (Validate, Count, Dedup, Sample, Convert)}
    tool = tyro.extras.subcommand_cli_from_dict(tools, description=__doc__, use_underscores=True)
    if not tool.files:
        raise UserError("请给出至少一个文件，如 python sft_tools.py validate 文件.json。")
    tool.run()


if __name__ == "__main__":
    run(main)
