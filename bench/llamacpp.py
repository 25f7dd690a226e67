"""What llama.cpp makes of our GGUF files: `python bench/llamacpp.py --model out/sft --texts FOLDER`.

llama.cpp is asked through the Python that LLAMA_CPP_PYTHON names, or this one (docs/export.md). For each type of
weights the checkpoint is exported, and compared with model.py in fp32 are

    the ids of every text in the files (once: all types have the same vocabulary);
    greedy continuations of their beginnings: how many are equal to the last id;
    the next token over windows of the texts in the chat format: mean KL divergence, and the drift of the perplexity
    of the answers.

Checked: ids are equal, and greedy continuations of f32 too.
"""

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import CHAT_TEMPLATE, encode_chat
from exchange import llamacpp
from exchange.check import divergence, logits_of
from exchange.gguf_file import FILE_TYPES, write_gguf
from generation.batch import generate
from generation.sampling import Sampling
from sources.aside import SetAside
from sources.containers import read_rows
from sources.files import list_files
from sources.instructions import Unusable, to_messages
from sources.report import table
from stage import DEMO_DIR, DEMO_OUT, ROOT, StageConfig, UserError, need, require, run_stage
from training import checkpoint

LOGITS = 50_000_000  # of the windows, held at once: 200 MB each of ours and theirs
MINE = "model.py，fp32"


@dataclass
class Config(StageConfig):
    """用 llama.cpp 读导出的 GGUF：token id、贪心解码、困惑度与自己的比较。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹
    texts: Path = DEMO_DIR / "sft"  # 用哪些文本（文件或文件夹）
    dtypes: tuple[str, ...] = ("f32", "f16", "bf16", "q8_0", "q4_0")  # 哪些权重类型
    prompts: int = 10  # 几个开头做贪心解码
    max_new_tokens: int = 200  # 每个最多多少 token

    DEMO = dict(model=DEMO_OUT / "sft")
    INPUT = "model"

    def check(self) -> None:
        known = set(self.dtypes) <= set(FILE_TYPES)
        require(known, "dtypes", self.dtypes, f"只能是 {'、'.join(FILE_TYPES)}")
        for name in ("prompts", "max_new_tokens"):
            require(getattr(self, name) > 0, name, getattr(self, name), "必须大于 0")


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.model, "sft.py", cfg)
    if (python := llamacpp.find_python()) is None:
        raise UserError(
            f"没有 llama-cpp-python；请 pip install 它，或把装了它的 Python 写进 {llamacpp.VARIABLE}。"
        )
    loaded = checkpoint.load(cfg.model)
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    rows = read_all(cfg.texts)
    texts = list(strings(rows))
    ids = tokenizer.encode_batch(texts)
    windows = cut(documents(rows, tokenizer), model.args.max_seq_len, LOGITS // model.args.vocab_size)
    long = [row[:8] for row in ids if len(row) > 8]
    prompts = long[:: -(-len(long) // cfg.prompts)]
    new = min(cfg.max_new_tokens, model.args.max_seq_len - 8)
    expected = generate(model, prompts, Sampling(max_new_tokens=new, temperature=0))
    inputs = [ids for ids, _ in windows]
    ours = logits_of(model, inputs)
    base = perplexity(ours, windows)
    table_rows, failures = [[MINE, model.num_params() * 4 / 1e6, "-", "-", base, "-"]], []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in cfg.dtypes:
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(path, model, tokenizer, CHAT_TEMPLATE, "bench", dtype)
            if dtype == cfg.dtypes[0]:
                failures += compare_ids(python, path, texts, ids)
            theirs = llamacpp.ask(python, path, prompts=[*prompts, *inputs], new=new)
            equal = sum(a == b for a, b in zip(theirs.greedy, expected, strict=False))
            if dtype == "f32" and equal < len(prompts):
                failures.append(f"f32 的贪心解码只有 {equal}/{len(prompts)} 相同")
            found = theirs.logits[len(prompts) :]
            drift = f"{perplexity(found, windows) / base - 1:+.3%}"
            size = path.stat().st_size / 1e6
            table_rows.append(
                [
                    dtype,
                    size,
                    f"{equal}/{len(prompts)}",
                    f"{divergence(ours, found):.1e}",
                    perplexity(found, windows),
                    drift,
                ]
            )
    scored = sum(sum(bears) for _, bears in windows)
    print(f"贪心解码 {new} 个 token；困惑度在 {len(windows)} 段里回答的 {scored:,} 个 token 上：")
    print(table(["权重", "MB", "贪心相同", "KL 散度", "困惑度", "变化"], table_rows))
    if failures:
        raise UserError("；".join(failures))


def read_all(path: Path) -> list[Any]:
    """The rows of a file or a folder."""
    aside = SetAside()
    rows = [row for file in list_files(path) for _, row in read_rows(file, aside)]
    aside.show()
    if not rows:
        raise UserError(f"{path} 里没有文本。")
    return rows


def strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and dicts, but those with a NUL, which ends a text in C."""
    if isinstance(value, str):
        if value and "\0" not in value:
            yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def documents(rows: Sequence[Any], tokenizer: Tokenizer) -> Iterator[tuple[int, bool]]:
    """Ids as the model knows them, and whether each bears loss: dialogues, or texts that end with <eos>."""
    for row in rows:
        try:
            found = to_messages(row)
        except Unusable:
            for text in strings(row):
                yield from ((i, True) for i in [*tokenizer.encode(text), tokenizer.stop_ids[0]])
            continue
        system = [{"role": "system", "content": found["system"]}] if "system" in found else []
        if encoded := encode_chat(system + found["messages"], tokenizer, sys.maxsize):
            yield from zip(*encoded, strict=True)


def compare_ids(python: str, path: Path, lines: Sequence[str], ids: Sequence[list[int]]) -> list[str]:
    """Ask for the ids of all lines; returns what is wrong."""
    start = perf_counter()
    theirs = llamacpp.ask(python, path, lines).ids
    different = [i for i, (a, b) in enumerate(zip(theirs, ids, strict=True)) if a != b]
    print(
        f"{len(lines):,} 段的 token id：{len(different)} 段不同（llama.cpp 用时 {perf_counter() - start:.0f} 秒）",
        flush=True,
    )
    return [f"{len(different)} 段的 id 不同，如 {lines[different[0]][:60]!r}"] if different else []


def cut(stream: Iterable[tuple[int, bool]], length: int, most: int) -> list[tuple[list[int], list[bool]]]:
    """Windows of `length` ids, together at most `most`, and which of each bear loss."""
    pairs = list(islice(stream, most))
    windows = [pairs[start : start + length] for start in range(0, len(pairs), length)]
    return [tuple(map(list, zip(*window, strict=True))) for window in windows if len(window) > 1]


def perplexity(logits: Sequence[np.ndarray], windows: Sequence[tuple[list[int], list[bool]]]) -> float:
    """exp of the mean loss of every id that bears one, but each window's first."""
    losses = []
    for rows, (ids, bears) in zip(logits, windows, strict=True):
        loss = cross_entropy(torch.from_numpy(rows[:-1]), torch.tensor(ids[1:]), reduction="none")  # (T - 1,)
        losses.append(loss[torch.tensor(bears[1:])])
    return math.exp(float(torch.cat(losses).mean()))


if __name__ == "__main__":
    run_stage(Config, main)
