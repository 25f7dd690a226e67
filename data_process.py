"""Stage 1: clean parquet or raw corpora -> data/pretrain_data.bin and data/valid_data.bin.

Token files are flat, little-endian uint16 (uint32 for vocabularies over 65,536), `<eos>` after every
document, without a header; the .json beside each says what is in it.

Worker processes tokenise pieces of the corpus into sorted runs (sources/tokenise.py); this process then chooses
the validation documents (sources/validation.py) and puts the runs together, shuffled (sources/token_runs.py).
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.load import load_tokenizer
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import check_kept, list_files
from sources.pieces import Piece, split_into_pieces
from sources.published_tokens import TokenPiece, published_bins, split_published
from sources.report import settings, table
from sources.token_files import TokenFile, open_token_files
from sources.token_runs import Run, documents_below, gather, in_order, run_paths, starts_of
from sources.tokenise import Options, make_tasks, tokenise
from sources.validation import HASHES, choose_limit, highest_limit
from sources.weights import check_names, parse_weights
from stage import (
    DEMO_DIR,
    ROOT,
    StageConfig,
    UserError,
    check_writable,
    need,
    require,
    run_stage,
    sidecar_path,
)
from workers import WorkFolder, file_key

Counts = dict[str, dict[str, int]]  # of each source: documents, characters
# Bytes of corpus from which more costs less: compiled code takes about a second to start, processes two.
COMPILED_FROM, PROCESSES_FROM = 32 << 20, 96 << 20


@dataclass
class Config(StageConfig):
    """阶段 1：把语料分词成 .bin。

    已分好词的 uint16 .bin（ChatGLM2 词表）不需要这一步：python pretrain.py --data 甲.bin 乙.bin 可直接读。
    """

    data: Path = ROOT / "data" / "clean"  # 语料文件或文件夹；没有 data/clean 时用 data/ 下的原始语料
    tokenizer: Path = (
        ROOT / "chatglm_tokenizer" / "tokenizer.model"
    )  # SentencePiece 词表，或 Hugging Face 模型文件夹
    text_column: str | None = None  # 正文所在的字段；不填则按各公开数据集的格式识别
    bin: tuple[Path, ...] = ()  # 并入这些已分好词的 .bin（无文件头 uint16，ChatGLM2 词表），会复制一份
    find_bin: bool = True  # 也并入 data/ 下找到的这种 .bin；文件很大、不想复制时用 --no_find_bin
    weights: tuple[str, ...] = ()  # 各来源训练几遍，如 wiki=3 C4_zh=0.5（抽一半）；没写的 1 遍
    out: Path = ROOT / "data" / "pretrain_data.bin"  # 训练集；统计写在同名 .json
    valid: Path = ROOT / "data" / "valid_data.bin"  # 验证集；统计写在同名 .json
    valid_fraction: float = 0.005  # 验证集占文档的比例，按内容的哈希选，追加语料不改变原有划分；0 为不留
    valid_documents: int = 50  # 小语料的验证集至少这么多篇（但不超过约十分之一）
    valid_tokens: int = 1_000_000  # 验证集至多这么多 token，超过则比例减半
    shuffle: bool = True  # 打乱训练文档的顺序；--no_shuffle 保持语料的顺序
    seed: int = 0  # 打乱顺序的随机种子
    workers: int = 0  # 分词的进程数，0 为全部处理器；结果与它无关

    DEMO = dict(
        data=DEMO_DIR / "clean",
        tokenizer=DEMO_DIR / "tokenizer.model",
        out=DEMO_DIR / "pretrain_data.bin",
        valid=DEMO_DIR / "valid_data.bin",
    )
    INPUT = "data"

    def check(self) -> None:
        require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "不小于 0 且小于 1")
        for name in ("valid_documents", "valid_tokens", "seed", "workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")
        parse_weights(self.weights)
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


def open_tokenizer(cfg: Config) -> Tokenizer:
    if cfg.demo and cfg.tokenizer == cfg.DEMO["tokenizer"]:
        need(cfg.tokenizer, "train_tokenizer.py", cfg)
    return load_tokenizer(cfg.tokenizer)


def find_pieces(cfg: Config, tokenizer: Tokenizer) -> list[Piece | TokenPiece]:
    """All input in pieces: the text, then published tokens."""
    pieces: list[Piece | TokenPiece] = []
    if path := corpus(cfg):
        print(f"语料：{path}")
        pieces += split_into_pieces(path)
    files = bins(cfg)
    for file in files:
        print(f"并入：{file}")
    return pieces + split_published(files, tokenizer, cfg.out)


def main(cfg: Config) -> None:
    if cfg.demo and not cfg.data.exists():
        ensure_demo()
        need(cfg.data, "data_clean/clear.py", cfg)
    for path in (cfg.out, cfg.valid):
        check_writable(path)
    tokenizer = open_tokenizer(cfg)
    pieces = find_pieces(cfg, tokenizer)
    weights = parse_weights(cfg.weights)
    if not any(piece.file.suffix == ".parquet" for piece in pieces):  # their rows may name their own sources
        check_names(weights, {piece.source for piece in pieces})
    seed = cfg.seed if cfg.shuffle else None
    options = Options(cfg.tokenizer, cfg.text_column, weights, seed, highest_limit(cfg.valid_fraction))
    inputs = list(dict.fromkeys(piece.file for piece in pieces))
    check_kept(map(sidecar_path, (cfg.out, cfg.valid)), inputs)
    files = file_key(inputs)
    key = {"options": options, "pieces": pieces, "files": files, "tokenizer": tokenizer.sha256}
    size = sum(piece.size for piece in pieces)
    tasks = make_tasks(pieces, options, compiled=size >= COMPILED_FROM)
    start = time.perf_counter()
    with WorkFolder(cfg.out.with_name(f".{cfg.out.name}.work"), key) as work:
        sizes = [task.size for task in tasks]
        workers = cfg.workers if size >= PROCESSES_FROM else 1
        results = work.run("tokenise", tokenise, tasks, sizes, workers, "分词")
        read = read_counts(results)
        check_names(weights, read)
        train, valid, report = write(cfg, tokenizer, list_runs(work, results, list(read)), read)
    show(train, valid, report, time.perf_counter() - start)


def read_counts(results: list[dict[str, Any]]) -> Counts:
    """What the tasks read of each source; also prints what they set aside."""
    read: Counts = {}
    aside = SetAside()
    for result in results:
        aside.merge(result["set_aside"])
        for name, counts in result["sources"].items():
            total = read.setdefault(name, dict.fromkeys(counts, 0))
            total.update({what: total[what] + count for what, count in counts.items()})
    aside.show()
    return read


def list_runs(work: WorkFolder, results: list[dict[str, Any]], names: list[str]) -> list[Run]:
    """The runs of all tasks; their entries number the sources by `names`."""
    runs, codes = [], {name: code for code, name in enumerate(names)}
    for task, result in enumerate(results):
        positions = np.array([codes[name] for name in result["sources"]], np.uint32)
        folder = work.folder("tokenise", task)
        runs += [Run(*run_paths(folder, number), positions) for number in range(result["runs"])]
    return runs


def write(
    cfg: Config, tokenizer: Tokenizer, runs: list[Run], read: Counts
) -> tuple[TokenFile, TokenFile, dict[str, Any]]:
    """Write both token files with their sidecars; returns them and what the sidecars say besides counts."""
    limit = choose_limit(runs, cfg.valid_fraction, cfg.valid_documents, cfg.valid_tokens)
    report: dict[str, Any] = {"settings": settings(cfg)}
    with open_token_files((cfg.out, cfg.valid), tokenizer, list(read), report) as (train, valid):
        repeated = write_validation(valid, runs, limit)
        write_training(train, runs, limit)
        if not train.total("documents"):
            raise UserError(
                "没有一篇文档留给训练：全部进了验证集或没被抽中；请减小 --valid_fraction，或加大 --weights。"
                if read
                else f"{cfg.data} 里没有一篇可用的文档，请检查 --data。"
            )
        report["validation"] = {"fraction": limit / HASHES, "repeated_documents": repeated}
        report["weights"] = {
            name: {"weight": weight, "read": read[name], "trained": train.sources().get(name, {})}
            for name, weight in parse_weights(cfg.weights).items()
        }
    return train, valid, report


def write_validation(valid: TokenFile, runs: list[Run], limit: int) -> int:
    """Write the documents whose hash is below the limit, by hash; returns how many were there repeatedly."""
    parts = list(documents_below(runs, limit, valid.dtype))
    if not parts:
        return 0
    entries, ids = (np.concatenate(part) for part in zip(*parts, strict=True))
    _, first = np.unique(entries["hash"], return_index=True)
    valid.write(entries[first], gather(ids, starts_of(entries["tokens"]), first))
    return len(entries) - len(first)


def write_training(train: TokenFile, runs: list[Run], limit: int) -> None:
    """Write all other documents in their final order."""
    total = sum(run.ids.stat().st_size for run in runs) // train.dtype.itemsize
    with tqdm(total=total, desc="合并打乱", unit=" token", unit_scale=True, disable=None) as progress:
        for entries, ids in in_order(runs, limit, train.dtype):
            train.write(entries, ids)
            progress.update(len(ids))


def show(train: TokenFile, valid: TokenFile, report: dict[str, Any], seconds: float) -> None:
    files = (train, valid)
    rows = [
        [f.path.name, *(f.total(what) for what in ("documents", "tokens", "characters")), f.dtype.name]
        for f in files
    ]
    print(table(["文件", "文档", "token", "字符", "类型"], rows))
    trained, validated = train.sources(), valid.sources()
    rows = [
        [
            name,
            *(
                part.get(name, {}).get(what, 0)
                for part in (trained, validated)
                for what in ("documents", "tokens")
            ),
        ]
        for name in dict.fromkeys([*trained, *validated])
    ]
    print("\n" + table(["来源", "训练文档", "训练 token", "验证文档", "验证 token"], rows))
    rows = [
        [name, w["weight"], w["read"]["documents"], w["trained"].get("documents", 0)]
        for name, w in report["weights"].items()
    ]
    if rows:
        print("\n" + table(["来源", "训练遍数", "读入文档", "训练文档"], rows))
    if repeated := report["validation"]["repeated_documents"]:
        print(f"\n验证集里每篇只留一份，略去重复的 {repeated:,} 篇。")
    tokens, characters = (sum(f.total(what) for f in files) for what in ("tokens", "characters"))
    print(f"\n用时 {seconds:.1f} 秒，{tokens / max(seconds, 1e-9):,.0f} token/秒", end="")
    print(f"，每 token {characters / max(tokens, 1):.2f} 字符")
    print(f"已写入 {train.path} 和 {valid.path}")


if __name__ == "__main__":
    run_stage(Config, main)
