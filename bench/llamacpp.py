"""What llama.cpp makes of our GGUF files: `python bench/llamacpp.py --model out/sft --texts FOLDER`.

llama.cpp is asked through the Python that LLAMA_CPP_PYTHON names, or this one (docs/serving.md). For each type of
weights the checkpoint is exported, and compared with model.py in fp32 are

    the ids of every line of the texts (once: all types have the same vocabulary);
    greedy continuations of their beginnings: how many are equal to the last id;
    the next token's distribution over windows of the texts: mean KL divergence, and the perplexity's drift.

Checked: ids are equal, and greedy continuations of f32 too.
"""

import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from chatglm_tokenizer.chat import CHAT_TEMPLATE
from exchange import llamacpp
from exchange.check import divergence, logits_of
from exchange.gguf_file import FILE_TYPES, write_gguf
from sources.files import list_files
from sources.report import table
from stage import DEMO_DIR, DEMO_OUT, ROOT, StageConfig, UserError, need, require, run_stage
from training import checkpoint

LOGITS = 50_000_000  # of the windows, held at once: 200 MB each of ours and theirs
MINE = "model.py，fp32"


@dataclass
class Config(StageConfig):
    """用 llama.cpp 读导出的 GGUF：token id、贪心解码、困惑度与自己的比较。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹
    texts: Path = DEMO_DIR / "eval"  # 用哪些文本（文件或文件夹，逐行）
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
    lines = read_lines(cfg.texts)
    ids = tokenizer.encode_batch(lines)
    windows = cut(ids, model.args.max_seq_len, LOGITS // model.args.vocab_size)
    prompts = [row[:8] for row in ids if len(row) > 8][:: max(1, len(ids) // cfg.prompts)][: cfg.prompts]
    new = min(cfg.max_new_tokens, model.args.max_seq_len - 8)
    expected = model.generate(prompts, new, temperature=0)
    ours = logits_of(model, windows)
    base = perplexity(ours, windows)
    rows, failures = [[MINE, model.num_params() * 4 / 1e6, "-", "-", base, "-"]], []
    with tempfile.TemporaryDirectory() as folder:
        for dtype in cfg.dtypes:
            path = Path(folder) / f"{dtype}.gguf"
            write_gguf(path, model, tokenizer, CHAT_TEMPLATE, "bench", dtype)
            if dtype == cfg.dtypes[0]:
                failures += compare_ids(python, path, lines, ids)
            theirs = llamacpp.ask(python, path, prompts=[*prompts, *windows], new=new)
            equal = sum(a == b for a, b in zip(theirs.greedy, expected, strict=False))
            if dtype == "f32" and equal < len(prompts):
                failures.append(f"f32 的贪心解码只有 {equal}/{len(prompts)} 相同")
            found = theirs.logits[len(prompts) :]
            drift = f"{perplexity(found, windows) / base - 1:+.3%}"
            size = path.stat().st_size / 1e6
            rows.append(
                [
                    dtype,
                    size,
                    f"{equal}/{len(prompts)}",
                    f"{divergence(ours, found):.1e}",
                    perplexity(found, windows),
                    drift,
                ]
            )
    print(f"贪心解码 {new} 个 token；困惑度在 {len(windows)} 段、{sum(map(len, windows)):,} 个 token 上：")
    print(table(["权重", "MB", "贪心相同", "KL 散度", "困惑度", "变化"], rows))
    if failures:
        raise UserError("；".join(failures))


def read_lines(path: Path) -> list[str]:
    """The lines of text files, without those that hold a NUL, which ends a text in C."""
    texts = [
        file.read_text(encoding="utf-8")
        for file in list_files(path)
        if file.suffix.startswith((".js", ".txt"))
    ]
    lines = [line for text in texts for line in text.splitlines() if line and "\0" not in line]
    if not lines:
        raise UserError(f"{path} 里没有 .json、.jsonl 或 .txt 文本。")
    return lines


def compare_ids(python: str, path: Path, lines: Sequence[str], ids: Sequence[list[int]]) -> list[str]:
    """Ask for the ids of all lines; returns what is wrong."""
    start = perf_counter()
    theirs = llamacpp.ask(python, path, lines).ids
    different = [i for i, (a, b) in enumerate(zip(theirs, ids, strict=True)) if a != b]
    print(
        f"{len(lines):,} 行的 token id：{len(different)} 行不同（llama.cpp 用时 {perf_counter() - start:.0f} 秒）",
        flush=True,
    )
    return [f"{len(different)} 行的 id 不同，如 {lines[different[0]][:60]!r}"] if different else []


def cut(ids: Sequence[list[int]], length: int, most: int) -> list[list[int]]:
    """Windows of the lines one after the other, of `length` ids, together at most `most`."""
    stream = [i for row in ids for i in row][:most]
    windows = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [window for window in windows if len(window) > 1]


def perplexity(logits: Sequence[np.ndarray], windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean loss of every id but each window's first."""
    losses = [
        torch.nn.functional.cross_entropy(
            torch.from_numpy(rows[:-1]), torch.tensor(window[1:]), reduction="sum"
        )
        for rows, window in zip(logits, windows, strict=True)
    ]
    return math.exp(float(sum(losses)) / sum(len(window) - 1 for window in windows))


if __name__ == "__main__":
    run_stage(Config, main)
