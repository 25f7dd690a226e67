"""The instruction file between stages, `sft_data.csv`: written and read here and nowhere else.

Columns `prompt`, `answer`, and for dialogues `system`, `history` (JSON [[question, answer], …]). Every
cell is text: "NA" stays "NA", and an empty cell is set aside instead of becoming NaN.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sources.aside import SetAside
from sources.containers import read_rows
from stage import UserError, atomic_path

COLUMNS = ["prompt", "answer"]
DIALOGUE_COLUMNS = ["system", "history"]


def write_sft_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of prompt, answer, system, history; the last two columns only if any row uses them."""
    is_plain = not any(row["system"] or row["history"] for row in rows)
    columns = COLUMNS if is_plain else COLUMNS + DIALOGUE_COLUMNS
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            history = json.dumps(row["history"], ensure_ascii=False) if row["history"] else ""
            writer.writerow({**row, "history": history})


def read_sft_csv(path: Path, aside: SetAside) -> Iterator[dict[str, Any]]:
    """Yield {"row", "prompt", "answer", "system", "history": [[question, answer], …]} of every usable row."""
    if not path.is_file():
        raise UserError(f"找不到 {path}；请先运行 python sft_data_process.py，或用参数指定别的路径。")
    for number, row in read_rows(path, aside, as_csv=True):
        missing = [column for column in COLUMNS if column not in row]
        if missing:
            raise UserError(
                f"{path} 缺少列 {'、'.join(missing)}；表头应为 prompt,answer[,system,history]，"
                "可用 python sft_data_process.py 重新生成。"
            )
        empty = [column for column in COLUMNS if not (row[column] or "").strip()]
        history = _history(row.get("history"))
        if empty:
            aside.add(path, number, f"单元格为空：{'、'.join(empty)}", row)
        elif history is None:
            aside.add(path, number, "history 不是 JSON [[问, 答], …]", row)
        else:
            yield {
                "row": number,
                "prompt": row["prompt"],
                "answer": row["answer"],
                "system": row.get("system") or "",
                "history": history,
            }


def _history(cell: str | None) -> list[list[str]] | None:
    """The earlier turns; None if the cell is not what it should be."""
    try:
        turns = json.loads(cell) if cell and cell.strip() else []
    except (ValueError, RecursionError):
        return None
    is_pairs = isinstance(turns, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    )
    return turns if is_pairs else None
