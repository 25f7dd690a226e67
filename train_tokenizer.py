"""Train a SentencePiece vocabulary on a corpus: `python train_tokenizer.py --vocab_size 8000`.

Byte-pair pieces with byte fallback (no text is ever unknown), digits split, text left as it is (identity
normalisation, so decoding gives the text back), and ChatGLM2's ids: unk/pad 0, <bos> 1, <eos> 2.
"""

import heapq
import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from sources.aside import SetAside
from sources.files import check_kept, list_files
from sources.pretrain_text import read_documents
from sources.report import write_json
from stage import (
    DEMO_DIR,
    ROOT,
    StageConfig,
    UserError,
    atomic_path,
    check_writable,
    need,
    require,
    run_stage,
    sidecar_path,
)

HELD_OUT_EVERY = 50  # one document in so many measures the compression and is not trained on
HELD_OUT_CHARACTERS = 1_000_000
MAX_LINE = 1000  # characters; SentencePiece would skip lines that are much longer
LOWEST_COVERAGE = 0.98  # SentencePiece accepts no less


@dataclass
class Config(StageConfig):
    """用语料训练自己的 SentencePiece 词表，并报告压缩率（每个 token 几个字）。"""

    data: Path = ROOT / "data" / "clean"  # 语料：文件或文件夹（清洗后的 parquet，或任何支持的原始格式）
    out: Path = ROOT / "data" / "tokenizer.model"  # 词表保存到哪里
    vocab_size: int = 8000  # 词表大小（包括 256 个字节和 3 个特殊符号）
    sample_characters: int = 20_000_000  # 随机抽取多少字参与训练；内存只取决于它，与语料大小无关
    character_coverage: float = 0.9995  # 词表直接收录的字占全文的比例（放不下时自动降低），其余的字用字节表示
    compare: Path = CHATGLM2  # 压缩率与这个词表对照
    seed: int = 0  # 抽样的随机种子
    DEMO = dict(data=DEMO_DIR / "clean", out=DEMO_DIR / "tokenizer.model", vocab_size=5000)
    INPUT = "data"

    def check(self) -> None:
        sidecar_path(self.out)
        require(self.sample_characters > 0, "sample_characters", self.sample_characters, "必须大于 0")
        require(
            self.vocab_size > 300, "vocab_size", self.vocab_size, "必须大于 300（字节、特殊符号和常用字）"
        )
        coverage, range_ = self.character_coverage, f"在 {LOWEST_COVERAGE} 与 1 之间"
        require(LOWEST_COVERAGE <= coverage <= 1, "character_coverage", coverage, range_)


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.data, "data_clean/clear.py", cfg)
    check_writable(cfg.out)
    check_kept([sidecar_path(cfg.out)], list_files(cfg.data))
    corpus = Corpus(cfg.data)
    with atomic_path(cfg.out) as temporary:
        temporary.write_bytes(train(cfg, corpus))
    report = compression(cfg.out, cfg.compare, corpus.held_out or corpus.first)
    print("没有参与训练的文本上的压缩率：" if corpus.held_out else "语料太少，只能给出训练文本上的压缩率：")
    print_report(report)
    write_json(sidecar_path(cfg.out), report)


class Corpus:
    """The documents of a file or folder: most train the vocabulary, a few measure its compression."""

    def __init__(self, data: Path):
        self.data = data
        self.first: list[str] = []  # the beginning of the first document
        self.held_out: list[str] = []  # documents that the vocabulary was not trained on

    def lines(self) -> Iterator[str]:
        """The documents that train, line by line."""
        aside, characters = SetAside(), 0
        for number, document in enumerate(read_documents(self.data, aside), 1):
            if number % HELD_OUT_EVERY == 0 and characters < HELD_OUT_CHARACTERS:
                self.held_out.append(document.text[:HELD_OUT_CHARACTERS])
                characters += len(self.held_out[-1])
                continue
            self.first = self.first or [document.text[:HELD_OUT_CHARACTERS]]
            for line in document.text.splitlines():
                for start in range(0, len(line), MAX_LINE):
                    yield line[start : start + MAX_LINE].replace("\0", "")
        aside.show()


def train(cfg: Config, corpus: Corpus) -> bytes:
    """The serialised SentencePiece model.

    A small vocabulary has no room for every rare character of a large corpus: the coverage is then lowered,
    and the characters left out are spelt in bytes.
    """
    lines = sample(corpus.lines(), cfg.sample_characters, cfg.seed)
    if not lines:
        raise UserError(f"{cfg.data} 里没有可用的文本。")
    lower = [c for c in (0.999, 0.998, 0.995, 0.99, LOWEST_COVERAGE) if c < cfg.character_coverage]
    for coverage in [cfg.character_coverage, *lower]:
        try:
            return run_trainer(cfg, coverage, lines)
        except RuntimeError as error:
            message = str(error).splitlines()[-1]
            if "too high" in message:
                raise UserError(
                    f"语料太少，凑不出 {cfg.vocab_size} 个条目：请减小 --vocab_size，或增加语料。"
                ) from error
            needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
            if not needed:
                raise UserError(f"SentencePiece 训练失败：{message}") from error
            print(
                f"覆盖 {coverage:.2%} 的字需要至少 {needed[1]} 个条目，--vocab_size {cfg.vocab_size} 放不下。",
                flush=True,
            )
    raise UserError(f"--vocab_size {cfg.vocab_size} 太小；请用至少 {needed[1]}，最好是它的两倍。")


def run_trainer(cfg: Config, coverage: float, lines: list[str]) -> bytes:
    """Run SentencePiece's trainer; raises its RuntimeError."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=cfg.vocab_size,
        character_coverage=coverage,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * MAX_LINE,  # bytes
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=os.cpu_count() or 1,
        minloglevel=2,
    )
    return model.getvalue()


def sample(lines: Iterable[str], characters: int, seed: int) -> list[str]:
    """A random sample of lines of about so many characters, in their order; memory is bounded by it.

    Every line draws a number, and those with the least numbers that fit stay (a reservoir in a heap).
    """
    rng = random.Random(seed)
    heap: list[tuple[float, int, str]] = []  # the greatest number on top
    size = 0
    for order, line in enumerate(lines):
        draw = rng.random()
        if size >= characters and draw > -heap[0][0]:
            continue
        heapq.heappush(heap, (-draw, order, line))
        size += len(line)
        while size - len(heap[0][2]) >= characters:
            size -= len(heapq.heappop(heap)[2])
    return [line for _, line in sorted((order, line) for _, order, line in heap)]


def compression(out: Path, compare: Path, texts: list[str]) -> dict:
    """Characters and bytes per token of the new vocabulary, and of the other one if it is there."""
    report = {}
    for name, path in (("own", out), ("compare", compare)):
        if path.is_file():
            tokenizer = ChatGLMTokenizer(path)
            tokens = sum(map(len, tokenizer.encode_batch(texts)))
            report[name] = {
                "vocab_size": tokenizer.vocab_size,
                "characters_per_token": sum(map(len, texts)) / max(tokens, 1),
                "bytes_per_token": sum(len(text.encode()) for text in texts) / max(tokens, 1),
                "sha256": tokenizer.sha256,
            }
    return report


def print_report(report: dict) -> None:
    labels = {"own": "新词表", "compare": "对照词表（ChatGLM2）"}
    for name, row in report.items():
        print(
            f"  {labels[name]}（{row['vocab_size']:,} 个条目）：每个 token "
            f"{row['characters_per_token']:.3f} 字、{row['bytes_per_token']:.3f} 字节"
        )
    if "compare" not in report:
        print("  （ChatGLM2 词表未下载，无法对照：python chatglm_tokenizer/download.py）")


if __name__ == "__main__":
    run_stage(Config, main)
