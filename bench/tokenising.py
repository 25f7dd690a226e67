"""How fast a corpus becomes a token file, against the plain way: `python bench/tokenising.py`.

The plain way is one process that gives SentencePiece one text after the other, collects all ids in a Python
list, and writes `np.array(ids).tofile(...)`. It and data_process.py, with one and with several processes, start
afresh on the same JSON lines, in turn, for several rounds. Printed are the median megabytes of UTF-8 text a
second with all that a run needs (starting Python, loading the vocabulary, compiled code, writing), the ratio to
the plain way, processor seconds, and the most memory that a run and its processes had resident at once.

Checked for every size: all numbers of processes write the same bytes, and without shuffling these are the bytes
of the plain way.
"""

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from bench.measure import Cost, run_measured
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.pretrain_text import read_documents
from sources.report import table
from stage import DEMO_DIR, ROOT, StageConfig, UserError, need, require, run_stage

PLAIN = "逐篇分词，汇成列表"


@dataclass
class Config(StageConfig):
    """把语料分词成 .bin 的速度和内存，与最简单的做法对照。"""

    data: Path | None = None  # 用哪份语料的文本（文件或文件夹，不够大就重复）；不填则用内置演示语料
    tokenizer: Path | None = None  # SentencePiece 词表；不填则用 ChatGLM2 词表，没有就用演示的词表
    sizes: tuple[int, ...] = (20, 100)  # 文本的大小，MB；如 100 1000
    workers: tuple[int, ...] = (1, 2)  # 进程数
    rounds: int = 3  # 每种做法跑几遍，取中位数
    plain_up_to: int = 300  # 更大的语料（MB）不用最简单的做法：每 GB 文本它要约 10 GB 内存
    plain: tuple[str, ...] = ()  # （内部）按最简单的做法处理：语料 词表 输出

    def check(self) -> None:
        for name in ("sizes", "workers"):
            require(min(getattr(self, name), default=0) > 0, name, getattr(self, name), "必须都大于 0")
        require(self.rounds > 0, "rounds", self.rounds, "必须大于 0")


def main(cfg: Config) -> None:
    if cfg.plain:
        return tokenise_plainly(*map(Path, cfg.plain))
    vocabulary = find_vocabulary(cfg)
    print(f"词表 {vocabulary}；语料 {cfg.data or '内置演示'}；{os.cpu_count()} 个处理器")
    for size in cfg.sizes:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            written = write_corpus(cfg, corpus, size * 1_000_000)
            costs = measure(cfg, corpus, vocabulary, with_plain=size <= cfg.plain_up_to)
        show(written, costs)


def find_vocabulary(cfg: Config) -> Path:
    if cfg.tokenizer:
        return cfg.tokenizer
    demo = StageConfig(demo=True)
    return CHATGLM2 if CHATGLM2.exists() else need(DEMO_DIR / "tokenizer.model", "train_tokenizer.py", demo)


def texts(cfg: Config) -> Iterator[str]:
    """The texts of the corpus again and again, each time with another first line."""
    if not cfg.data:
        ensure_demo()
    for number in count():
        is_empty = True
        for document in read_documents(cfg.data or DEMO_DIR / "raw", SetAside()):
            is_empty = False
            yield f"第{number}遍\n{document.text}" if number else document.text
        if is_empty:
            raise UserError(f"{cfg.data} 里没有可用的文本。")


def write_corpus(cfg: Config, path: Path, size: int) -> int:
    """Write JSON lines with so many bytes of text; returns how many exactly."""
    written = 0
    with open(path, "w", encoding="utf-8") as handle:
        for text in texts(cfg):
            if written >= size:
                return written
            handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
    return written


def measure(cfg: Config, corpus: Path, vocabulary: Path, with_plain: bool) -> dict[str, list[Cost]]:
    """The costs of every way, round by round; UserError if their outputs differ."""
    out = corpus.with_suffix(".bin")
    plain = ["bench/tokenising.py", "--plain", corpus, vocabulary, out]
    ours = ["data_process.py", "--data", corpus, "--tokenizer", vocabulary, "--out", out, "--no_find_bin"]
    ours += ["--valid", corpus.with_name("valid.bin")]
    ways = {PLAIN: plain} if with_plain else {}
    ways |= {f"data_process.py，{n} 进程": [*ours, "--workers", n] for n in cfg.workers}
    run([*ours, "--workers", 1])  # compiles on a fresh machine, and brings the corpus into the system's cache
    expected = out.read_bytes()
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for _ in range(cfg.rounds):
        for name, command in ways.items():
            costs[name].append(run(command))
            if name != PLAIN and out.read_bytes() != expected:
                raise UserError(f"{name} 的输出与一个进程的不同。")
    if with_plain:
        run(plain)
        expected = out.read_bytes()
        run([*ours, "--no_shuffle", "--valid_fraction", 0])
        if out.read_bytes() != expected:
            raise UserError("不打乱时的输出与最简单的做法不同。")
    return costs


def run(command: list) -> Cost:
    script, *arguments = command
    return run_measured([sys.executable, ROOT / script, *arguments])[1]


def tokenise_plainly(corpus: Path, vocabulary: Path, out: Path) -> None:
    import numpy as np
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    ids: list[int] = []
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            ids += [*sp.encode(json.loads(line)["text"]), sp.eos_id()]
    np.array(ids, dtype="<u2" if sp.vocab_size() <= 65_000 else "<u4").tofile(out)


def show(size: int, costs: dict[str, list[Cost]]) -> None:
    rows = []
    walls = {name: statistics.median(cost.wall for cost in values) for name, values in costs.items()}
    for name, values in costs.items():
        seconds = [cost.wall for cost in values]
        rows.append(
            [
                name,
                size / 1e6 / walls[name],
                walls[PLAIN] / walls[name] if PLAIN in walls else "-",
                f"{min(seconds):.1f} 至 {max(seconds):.1f}",
                statistics.median(cost.cpu for cost in values),
                max(cost.memory for cost in values) / 1e6,
            ]
        )
    print(f"\n{size / 1e6:,.0f} MB 文本，输出逐字节相同：")
    print(table(["做法", "MB/s", "倍数", "秒", "处理器秒", "内存峰值 MB"], rows), flush=True)


if __name__ == "__main__":
    run_stage(Config, main)
