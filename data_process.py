"""Stage 1: clean parquet or raw corpora -> data/pretrain_data.bin and data/valid_data.bin.

Token files are flat, little-endian uint16 (uint32 for vocabularies over 65,536), `<eos>` after every
document, without a header; the .json beside each says what is in it.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import list_files
from sources.pretrain_text import Document, read_documents
from sources.report import settings, table, write_json
from sources.token_files import TokenFile, Validation, merge, open_token_files, published_bins
from stage import DEMO_DIR, ROOT, StageConfig, UserError, need, require, run_stage, sidecar_path

if TYPE_CHECKING:
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

BATCH_CHARS = 1_000_000  # characters tokenised at a time: enough for all cores, little memory
BATCH_DOCUMENTS = 2_000


@dataclass
class Config(StageConfig):
    """阶段 1：把语料分词成 .bin。

    已分好词的 uint16 .bin（ChatGLM2 词表）不需要这一步：python pretrain.py --data 甲.bin 乙.bin 可直接读。
    """

    data: Path = ROOT / "data" / "clean"  # 语料文件或文件夹；没有 data/clean 时用 data/ 下的原始语料
    tokenizer: Path = ROOT / "chatglm_tokenizer" / "tokenizer.model"  # SentencePiece 词表
    text_column: str | None = None  # 正文所在的字段；不填则按各公开数据集的格式识别
    bin: tuple[Path, ...] = ()  # 并入这些已分好词的 .bin（无文件头 uint16，ChatGLM2 词表），会复制一份
    find_bin: bool = True  # 也并入 data/ 下找到的这种 .bin；文件很大、不想复制时用 --no_find_bin
    out: Path = ROOT / "data" / "pretrain_data.bin"  # 训练集；统计写在同名 .json
    valid: Path = ROOT / "data" / "valid_data.bin"  # 验证集；统计写在同名 .json
    valid_fraction: float = 0.005  # 验证集占文档的比例，按内容的哈希选：追加语料不会打乱原有划分
    valid_documents: int = 50  # 验证集至少这么多篇（但不超过十分之一）
    valid_tokens: int = 1_000_000  # 验证集至多这么多 token

    DEMO = dict(
        data=DEMO_DIR / "clean",
        tokenizer=DEMO_DIR / "tokenizer.model",
        out=DEMO_DIR / "pretrain_data.bin",
        valid=DEMO_DIR / "valid_data.bin",
    )
    INPUT = "data"

    def check(self) -> None:
        require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "不小于 0 且小于 1")
        for name in ("valid_documents", "valid_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")
        if sidecar_path(self.out).resolve() == sidecar_path(self.valid).resolve():
            raise UserError(f"--out {self.out} 和 --valid {self.valid} 会互相覆盖；请用不同的名字。")

    def has_input(self) -> bool:
        return corpus(self) is not None or bool(bins(self))


def corpus(cfg: Config) -> Path | None:
    """The folder or file of text; None if the default one is missing and data/ holds no raw corpora."""
    if cfg.data != Config.data or cfg.data.exists():
        return cfg.data
    try:
        list_files(ROOT / "data")
    except UserError:
        return None
    return ROOT / "data"


def bins(cfg: Config) -> list[Path]:
    """The token files to merge: those named, and unless told otherwise those lying in data/."""
    found = published_bins(ROOT / "data", {cfg.out, cfg.valid}) if cfg.find_bin and not cfg.demo else []
    return list(dict.fromkeys([*cfg.bin, *found]))


def load_tokenizer(cfg: Config) -> "ChatGLMTokenizer":
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer

    if cfg.demo and cfg.tokenizer == cfg.DEMO["tokenizer"]:
        need(cfg.tokenizer, "train_tokenizer.py", cfg)
    return ChatGLMTokenizer(str(cfg.tokenizer))


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in groups of bounded size."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenize(
    cfg: Config, path: Path, tokenizer: "ChatGLMTokenizer", train: TokenFile, valid: TokenFile
) -> None:
    """Tokenise every document and send it to the training or the validation file."""
    aside = SetAside()
    choice = Validation(cfg.valid_fraction, cfg.valid_documents, cfg.valid_tokens)
    with tqdm(desc="分词", unit=" 字符", unit_scale=True, disable=None) as progress:
        for batch in batches(read_documents(path, aside, cfg.text_column)):
            ids = tokenizer.encode_batch([document.text for document in batch])
            for document, document_ids in zip(batch, ids, strict=True):
                for leftover in choice.offer(train.encoded(document, document_ids)):
                    train.write(leftover)
            progress.update(sum(len(document.text) for document in batch))
    chosen, others = choice.settle()
    for document in others:
        train.write(document)
    for document in chosen:
        valid.write(document)
    aside.show()


def main(cfg: Config) -> None:
    if cfg.demo and not cfg.data.exists():
        ensure_demo()
        need(cfg.data, "data_clean/clear.py", cfg)
    tokenizer = load_tokenizer(cfg)
    path, token_files = corpus(cfg), bins(cfg)
    start = time.perf_counter()
    with ExitStack() as stack:
        train, valid = open_token_files(stack, (cfg.out, cfg.valid), tokenizer)
        if path:
            print(f"语料：{path}")
            tokenize(cfg, path, tokenizer, train, valid)
        for file in token_files:
            print(f"并入：{file}")
            merge(file, tokenizer, train, valid, cfg.valid_fraction, cfg.valid_tokens)
        if not train.tokens:
            raise UserError(f"{path} 里没有一篇可用的文档，请检查 --data。")
    seconds = time.perf_counter() - start
    for file in (train, valid):
        write_json(sidecar_path(file.path), {**file.sidecar(tokenizer), "settings": settings(cfg)})
    show(train, valid, seconds)


def show(train: TokenFile, valid: TokenFile, seconds: float) -> None:
    rows = [[f.path.name, f.documents, f.tokens, f.characters, f.dtype.name] for f in (train, valid)]
    print(table(["文件", "文档", "token", "字符", "类型"], rows))
    names = dict.fromkeys([*train.sources, *valid.sources])
    rows = [
        [
            name,
            *(
                f.sources.get(name, {}).get(what, 0)
                for f in (train, valid)
                for what in ("documents", "tokens")
            ),
        ]
        for name in names
    ]
    print("\n" + table(["来源", "训练文档", "训练 token", "验证文档", "验证 token"], rows))
    tokens, text_tokens = (train.tokens + valid.tokens, train.text_tokens + valid.text_tokens)
    print(f"\n用时 {seconds:.1f} 秒，{tokens / max(seconds, 1e-9):,.0f} token/秒", end="")
    if text_tokens:
        print(f"，每 token {(train.characters + valid.characters) / text_tokens:.2f} 字符", end="")
    print(f"\n已写入 {train.path} 和 {valid.path}")


if __name__ == "__main__":
    run_stage(Config, main)
