"""Put the pieces of another vocabulary behind those of one, and give a trained model rows for them.

python expand_vocab.py --base chatglm_tokenizer/tokenizer.model --add data/tokenizer.model --text data/clean
python expand_vocab.py --init out/pretrain --add data/tokenizer.model --out out/expanded
python data_process.py --tokenizer out/expanded/tokenizer.model
python pretrain.py --init out/expanded --out out/continued
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatglm_tokenizer.expansion import Expansion, Mode, expand
from chatglm_tokenizer.model_file import without_prefix
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from sources.aside import SetAside
from sources.pretrain_text import read_documents
from sources.records import read_records
from sources.report import settings, table, write_json
from stage import (
    DEMO_DIR,
    DEMO_OUT,
    ROOT,
    StageConfig,
    UserError,
    atomic_path,
    need,
    require,
    run_stage,
    sidecar_path,
)
from training import checkpoint
from training.plain import check_replaceable, write_plain
from training.vocabulary_rows import NewRows, add_rows

AT_ONCE = 1_000_000  # characters that are encoded together


@dataclass
class Config(StageConfig):
    """把另一个词表的条目追加到一个词表后面（原有编号不变），并给训练过的模型加上相应的行。"""

    add: Path = (
        ROOT / "data" / "tokenizer.model"
    )  # 从哪个 SentencePiece 词表取条目，如 train_tokenizer.py 的输出
    base: Path | None = (
        None  # 要扩充的 SentencePiece 词表；默认为 --init 的模型自带的，没有 --init 则为 ChatGLM2
    )
    mode: Mode = "cjk"  # cjk 只追加全由中日韩文字组成的条目，不含这些字的文本编号不变；all 全部追加
    init: Path | None = None  # 要扩充的模型：检查点、Hugging Face 模型文件夹或 .pth；默认只写词表
    n_heads: int | None = None  # --init 为 .pth 时的注意力头数；公布过的规模不必填
    new_rows: NewRows = "subtokens"  # 新行的初值：该条目原来各 token 的行的平均，或所有行的平均，或随机
    seed: int = 0  # random 的种子
    text: tuple[Path, ...] = ()  # 在这些文本或指令文件上报告每个 token 几个字
    out: Path | None = (
        None  # 词表文件，默认 data/expanded.model；有 --init 时是检查点文件夹，默认 out/expanded
    )

    DEMO = dict(
        add=DEMO_DIR / "medical.model",
        base=DEMO_DIR / "tokenizer.model",
        init=DEMO_OUT / "pretrain",
        text=(DEMO_DIR / "raw" / "medical",),
        out=DEMO_OUT / "expanded",
    )
    INPUT = "add"

    def check(self) -> None:
        require(self.n_heads is None or self.n_heads >= 1, "n_heads", self.n_heads, "至少为 1")
        require(0 <= self.seed < 2**31, "seed", self.seed, "在 0 与 2147483647 之间")
        if self.out is None:
            self.out = ROOT / "out" / "expanded" if self.init else ROOT / "data" / "expanded.model"
        if not self.init:
            sidecar_path(self.out)


def main(cfg: Config) -> None:
    if cfg.demo:
        make_demo_input(cfg)
    if cfg.init:
        check_replaceable(cfg.out)
    extra = ChatGLMTokenizer(cfg.add)
    start = checkpoint.load(cfg.init, "cpu", cfg.base, cfg.n_heads) if cfg.init else None
    base = base_vocabulary(cfg, start)
    expansion = expand(base, extra.content, cfg.mode)
    report_pieces(expansion)
    if not expansion.appended:
        raise UserError(
            f"{cfg.add} 没有可以追加的条目：都已在原词表里，或被 --mode {cfg.mode} 排除；没有写文件。"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(expansion.content)
        new = ChatGLMTokenizer(path)
    report = report_of(cfg, base, new, expansion)
    if start is None:
        with atomic_path(cfg.out) as temporary:
            temporary.write_bytes(expansion.content)
        write_json(sidecar_path(cfg.out), report)
    else:
        write_checkpoint(cfg, start, base, expansion, report)
    print(f"已写入 {cfg.out}：{new.vocab_size:,} 个条目，新条目的编号从 {expansion.first:,} 开始。")
    if new.vocab_size > 65_536 >= base.vocab_size:
        print("编号不再能用两个字节表示：data_process.py 写出的 token 文件会大一倍。")


def make_demo_input(cfg: Config) -> None:
    """The demo's model, and a vocabulary trained on its medical texts."""
    need(cfg.base, "train_tokenizer.py", cfg)
    need(cfg.init, "pretrain.py", cfg)
    if not cfg.add.exists():
        command = ["train_tokenizer.py", "--data", cfg.text[0], "--out", cfg.add, "--vocab_size", 4000]
        if subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
            raise UserError("演示的医学词表没有训练成功，见上面的输出。")


def base_vocabulary(cfg: Config, start: checkpoint.Checkpoint | None) -> ChatGLMTokenizer:
    """The SentencePiece vocabulary that is expanded; a Hugging Face folder has it beside its tokenizer.json."""
    if start is None:
        return ChatGLMTokenizer(cfg.base or CHATGLM2)
    if isinstance(start.tokenizer, ChatGLMTokenizer):
        return start.tokenizer
    path = start.path / "tokenizer.model"
    if cfg.base or not path.is_file():
        raise UserError(f"{cfg.base or start.path} 不是 SentencePiece 词表（tokenizer.model），不能扩充。")
    print(f"只扩充 {path}：{start.path} 的对话模板和另加的特殊符号不带到新的检查点里。")
    return ChatGLMTokenizer(path)


def write_checkpoint(
    cfg: Config, start: checkpoint.Checkpoint, base: ChatGLMTokenizer, expansion: Expansion, report: dict
) -> None:
    """Write the model with rows for the new pieces, and its vocabulary."""
    model = start.model
    if model.args.vocab_size > expansion.first:
        print(f"模型的词嵌入比词表多 {model.args.vocab_size - expansion.first} 行，它们由新条目取代。")
    subtokens = encode_pieces(base, expansion.appended)
    weights, args = add_rows(
        model.state_dict(), model.args, expansion.first, subtokens, cfg.new_rows, cfg.seed
    )
    vocabulary = {"tokenizer.model": expansion.content}
    write_plain(cfg.out, args, weights, vocabulary, {**settings(cfg), "expansion": report})


def encode_pieces(base: ChatGLMTokenizer, pieces: list[str]) -> list[list[int]]:
    """The base's ids of each piece's own text, without a space before it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(base.content))
    return sp.encode([piece.replace("▁", " ") for piece in pieces])


def report_pieces(expansion: Expansion) -> None:
    """Say what became of the other vocabulary's pieces."""
    rows = [
        ["追加", len(expansion.appended) - expansion.bridges],
        ["为使长条目能合并出来而另加的中间条目", expansion.bridges],
        ["已在原词表里", expansion.present],
        ["不全是中日韩文字（--mode cjk）", expansion.not_cjk],
        ["控制符号与字节", expansion.reserved],
        ["任何文本都不会产生，舍去", len(expansion.unreachable)],
    ]
    print(table(["条目", "个数"], rows), flush=True)


def report_of(cfg: Config, base: ChatGLMTokenizer, new: ChatGLMTokenizer, expansion: Expansion) -> dict:
    """The report beside the vocabulary: what was appended, and on every text characters per token."""
    texts = {str(path): compare(path, base, new, expansion.first) for path in cfg.text}
    if texts:
        head = ["文本", "字", "原词表 字/token", "新词表 字/token", "token 减少", "用到的新条目"]
        rows = [
            [
                Path(name).name,
                row["characters"],
                f"{row['characters'] / max(1, row['tokens_before']):.3f}",
                f"{row['characters'] / max(1, row['tokens_after']):.3f}",
                f"{1 - row['tokens_after'] / max(1, row['tokens_before']):.1%}",
                row["new_pieces_used"],
            ]
            for name, row in texts.items()
        ]
        print(table(head, rows), flush=True)
    return {
        "own": {"vocab_size": new.vocab_size, "sha256": new.sha256},
        "base": {"path": str(base.vocab_file), "vocab_size": base.vocab_size, "sha256": base.sha256},
        "add": str(cfg.add),
        "mode": cfg.mode,
        "first_new_id": expansion.first,
        "appended": len(expansion.appended),
        "bridges": expansion.bridges,
        "present": expansion.present,
        "not_cjk": expansion.not_cjk,
        "reserved": expansion.reserved,
        "unreachable": expansion.unreachable,
        "texts": texts,
    }


def compare(path: Path, base: ChatGLMTokenizer, new: ChatGLMTokenizer, first: int) -> dict[str, Any]:
    """Characters, tokens before and after, and how many of the new pieces (ids from `first` on) come up."""
    counts, used = {"characters": 0, "tokens_before": 0, "tokens_after": 0}, set()
    for texts in batches(read_texts(path)):
        after = new.encode_batch(texts)
        counts["characters"] += sum(map(len, texts))
        counts["tokens_before"] += sum(map(len, base.encode_batch(texts)))
        counts["tokens_after"] += sum(map(len, after))
        used.update(i for row in after for i in row if i >= first)
    return {**counts, "new_pieces_used": len(used)}


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a file or folder; if it has none, the messages of its instructions."""
    aside, empty = SetAside(), True
    for document in read_documents(path, aside):
        empty = False
        yield document.text
    if empty:
        aside = SetAside()
        for instruction in read_records(path, aside):
            yield from (message["content"] for message in instruction["messages"])
    aside.show()


def batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """The texts in lists of about AT_ONCE characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    run_stage(Config, main)
