"""Records and rows in files: JSON lines, or a JSON array where the name ends in .json; never half-written."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import orjson

from stage import UserError, atomic_path

Style = Literal["alpaca", "sharegpt", "openai"]
OTHER_CONTAINERS = {".csv", ".tsv", ".parquet", ".gz", ".zst", ".zip"}
SHAREGPT = {"user": "human", "assistant": "gpt"}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows one by one; returns how many. UserError for names that promise what is not written."""
    if path.suffix.lower() in OTHER_CONTAINERS:
        raise UserError(f"{path}：输出是 JSON，文件名请以 .jsonl 或 .json 结尾。")
    count, is_array = 0, path.suffix.lower() == ".json"
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        for row in rows:
            handle.write((b"[\n" if is_array and not count else b",\n" if is_array else b"") + to_json(row))
            handle.write(b"" if is_array else b"\n")
            count += 1
        if is_array:
            handle.write(b"\n]\n" if count else b"[]\n")
    return count


def to_json(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON that every reader takes: NaN is null, what JSON has no form for its text."""
    try:
        return orjson.dumps(row, default=str)
    except TypeError:  # integers beyond 64 bits, deep nesting, keys that are no text
        try:
            return json.dumps(_plain(row), ensure_ascii=False, default=str).encode("utf-8", "replace")
        except RecursionError:
            return orjson.dumps({"text": "嵌套过深"})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_style(record: dict[str, Any], style: Style) -> dict[str, Any]:
    """A record (see preferences.py) in one of the three formats that other programs read.

    Answers with a verdict, pairs and references keep the fields that tell them. Reading the result gives the
    record back.
    """
    more = {key: record[key] for key in ("chosen", "rejected", "label", "reference") if key in record}
    if style == "alpaca":
        return {**_alpaca(record), **more}
    if style == "sharegpt":
        turns = [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in record["messages"]]
        system = {"system": record["system"]} if record.get("system") else {}
        for key in ("chosen", "rejected"):
            if key in more:
                more[key] = {"from": "gpt", "value": more[key]}
        return {"conversations": turns, **system, **more}
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    return {"messages": [*system, *record["messages"]], **more}


def _alpaca(record: dict[str, Any]) -> dict[str, Any]:
    texts = [message["content"] for message in record["messages"]]
    answer = {} if len(texts) % 2 else {"output": texts.pop()}
    question = texts.pop()
    row = {"instruction": question, "input": "", **answer}
    if record.get("system"):
        row["system"] = record["system"]
    if texts:
        row["history"] = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
    return row
