"""Stage 0: raw corpora -> clean, deduplicated, shuffled parquet.

    cd data_clean && python clear.py

Reads every file under data/ (any public format), normalises, drops broken and worthless texts, then exact and
near duplicates, and writes data/clean/part-*.parquet with report.json and report.html beside them. Pieces of the
corpus are worked on in parallel and their results kept on disk: a run that was interrupted goes on where it was,
and memory does not grow with the corpus. The order of the steps is `main`; what they do is in steps.py.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from this folder or from the root

import numpy as np

from data_clean.benchmarks import NGRAM, Benchmarks
from data_clean.boilerplate import frequent_lines
from data_clean.duplicates import Join, find_clusters, join_near
from data_clean.page import write_page
from data_clean.rules import check_limit, check_preset, descriptions
from data_clean.shards import SLOTS, Corpus, Shard
from data_clean.signatures import Settings
from data_clean.steps import (
    KEEP,
    PART,
    ExtractJob,
    PartJob,
    Recipe,
    ScoreJob,
    StripJob,
    extract,
    score,
    strip_lines,
    write_part,
)  # fmt: skip
from data_clean.tally import Tally
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import OUR_OUTPUTS, list_files
from sources.pieces import grouped, split_into_pieces
from sources.report import settings, write_json
from stage import DEMO_DIR, ROOT, StageConfig, UserError, atomic_path, check_writable, require, run_stage
from workers import WorkFolder, file_key, processors

JOB_BYTES, MANY_JOBS = 1 << 20, 256  # small files are worked on together up to this size, if there are many


@dataclass
class Config(StageConfig):
    """阶段 0：清洗、去重原始语料，写成 parquet，并写一份说明做了什么的报告（report.html）。"""

    data: Path = ROOT / "data"  # 原始语料：一个文件，或一个文件夹（含子文件夹；跳过 clean、demo 和 .bin）
    out: Path = ROOT / "data" / "clean"  # 输出文件夹：part-*.parquet、report.json、report.html
    text_column: str | None = None  # 正文所在的字段；不填则按各公开数据集的格式识别
    preset: tuple[
        str, ...
    ] = ()  # 质量规则的预设：一个名字，或若干 来源=名字；不填则按来源的名字选，见 docs/cleaning_rules.md
    rule: tuple[str, ...] = ()  # 改动单条规则的阈值：规则=阈值，例如 过短=20
    block_words: Path | None = None  # 屏蔽词表，一行一个；命中的句子占一半以上的文档丢弃
    mask_private: bool = True  # 把邮箱、手机号、身份证号等换成 <邮箱> 这样的占位
    to_simplified: bool = False  # 繁体转简体（OpenCC，按词转换）
    half_width: bool = False  # 全角字母、数字转半角（中文标点不变）
    boilerplate: int = 0  # 至少在这么多篇文档里出现的相同的行（页眉、声明之类）删去；0 为不删
    benchmarks: tuple[Path, ...] = ()  # 评测题（C-Eval、CMMLU、CMB 等文件或文件夹）：与之雷同的文档删去并列出
    benchmark_ngram: int = (
        NGRAM  # 比对评测题的字符 n 元组长度；越短越能认出改动过的题，也越容易误删被题目引用的原文
    )
    model: Path | None = None  # 用这个检查点给去重之后的文档打分（每字节比特数），在下面两个界限之外的丢弃
    min_bits: float = 0.0  # 每字节比特数低于此的丢弃：模型觉得太容易，多半是套话
    max_bits: float = 100.0  # 每字节比特数高于此的丢弃：模型觉得太难，多半是噪声
    dedup: Literal["minhash", "simhash", "none"] = "minhash"  # 近似去重方法；simhash 较粗：不逐对核实
    engine: Literal["fast", "reference"] = (
        "fast"  # reference：用 datasketch、simhash 包的直白实现，供对照，慢几百倍
    )
    ngram: int = 3  # 近似去重比较的字符 n 元组长度
    threshold: float = 0.65  # minhash：n 元组集合的 Jaccard 相似度达到此值即为重复
    num_perm: int = 128  # minhash：哈希个数
    bands: int = 21  # minhash：LSH 分段数，每段 num_perm // bands 个哈希
    distance: int = 6  # simhash：64 位指纹至多相差几位即为重复
    prefer: tuple[str, ...] = ()  # 重复时优先保留哪些来源（从高到低）；其次留较长的，再次留先出现的
    against: tuple[Path, ...] = ()  # 已清洗的语料（文件夹）：与其中重复的新文档丢弃，它们本身不再输出
    part_mb: int = 256  # 每个 parquet 文件约多少 MB 文本；打乱一份时它全部在内存里
    workers: int = 0  # 工作进程数；0 为所有的核。结果与它无关
    seed: int = 0  # 打乱顺序和哈希所用的随机种子

    DEMO = dict(data=DEMO_DIR / "raw", out=DEMO_DIR / "clean")
    INPUT = "data"

    def check(self) -> None:
        for name in ("ngram", "part_mb"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")
        for name in ("workers", "boilerplate"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")
        require(self.benchmark_ngram >= 8, "benchmark_ngram", self.benchmark_ngram, "至少为 8")
        require(1 <= self.num_perm <= 4096, "num_perm", self.num_perm, "在 1 与 4096 之间")
        require(1 <= self.bands <= self.num_perm, "bands", self.bands, "在 1 与 --num_perm 之间")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "大于 0 且不大于 1")
        require(0 <= self.distance < 32, "distance", self.distance, "在 0 与 31 之间")
        require(0 <= self.seed < 2**31, "seed", self.seed, "在 0 与 2147483647 之间")
        ours = ("report.json", "report.html")
        others = [f for f in self.out.rglob("*") if f.name not in ours and not f.match("part-*.parquet")]
        if self.out.is_file() or others:
            name = (others or [self.out])[0].name
            raise UserError(f"--out {self.out} 里有别的文件（如 {name}），会被覆盖；请换一个空文件夹。")

    @property
    def duplicates(self) -> Settings:
        return Settings(
            self.dedup, self.ngram, self.num_perm, self.bands, self.threshold, self.distance, self.seed
        )

    def has_input(self) -> bool:
        try:
            return bool(list_files(self.data))
        except UserError:
            return False


def main(cfg: Config) -> None:
    if cfg.demo:
        ensure_demo()
    check_writable(cfg.out)
    jobs = extract_jobs(cfg)
    tally, aside, begin = Tally(), SetAside(), time.perf_counter()
    report = begin_report(cfg, aside)
    with WorkFolder(cfg.out.with_name(f".{cfg.out.name}.work"), work_key(cfg, jobs)) as work:
        shards = extract_all(cfg, jobs, work, tally, aside)
        if cfg.boilerplate:
            shards = strip_all(cfg, jobs[0].recipe, shards, work, tally)
        corpus = Corpus(shards)
        keep = without_duplicates(cfg, corpus, tally, near_engine(cfg))
        if cfg.model:
            keep = without_outliers(cfg, corpus, keep, work, tally)
        parts = write_parts(cfg, corpus, keep, work, tally)
        finish_report(cfg, report, parts, tally, aside, time.perf_counter() - begin)
    if not parts:
        raise UserError(f"{cfg.data} 里没有一篇可用的文档；原因见上表。")
    print(f"\n已写入 {cfg.out}：{tally.kept_rows:,} 篇，{tally.kept_characters:,} 字符")
    print(f"每一步做了什么、删了哪些：{cfg.out / 'report.html'}")


def extract_jobs(cfg: Config) -> list[ExtractJob]:
    """The pieces of the corpora to compare with, then those of the corpus."""
    pieces = split_into_pieces(cfg.data, (*OUR_OUTPUTS, cfg.out, *cfg.against))
    others = [piece for folder in cfg.against for piece in split_into_pieces(folder, ())]
    recipe = make_recipe(cfg)
    limit = min(JOB_BYTES, sum(piece.size for piece in others + pieces) // MANY_JOBS)
    both = [(group, True) for group in grouped(others, limit)]
    both += [(group, False) for group in grouped(pieces, limit)]
    return [ExtractJob(number, group, recipe, old) for number, (group, old) in enumerate(both)]


def make_recipe(cfg: Config) -> Recipe:
    """What every process needs to know."""
    return Recipe(
        text_column=cfg.text_column,
        presets=chosen_presets(cfg),
        limits=chosen_limits(cfg),
        block_words=read_words(cfg.block_words),
        mask_private=cfg.mask_private,
        to_simplified=cfg.to_simplified,
        half_width=cfg.half_width,
        benchmarks=cfg.benchmarks,
        benchmark_ngram=cfg.benchmark_ngram,
        boilerplate=cfg.boilerplate,
        duplicates=cfg.duplicates,
        seed=cfg.seed,
    )


def work_key(cfg: Config, jobs: list[ExtractJob]) -> dict[str, Any]:
    """All that intermediate results depend on."""
    others = [file for path in cfg.benchmarks for file in list_files(path)]
    others += [cfg.block_words] if cfg.block_words else []
    others += sorted(cfg.model.rglob("*.*")) if cfg.model else []
    files = sorted({piece.file for job in jobs for piece in job.pieces}) + others
    return {**settings(cfg), "workers": None, "files": file_key(files)}


def extract_all(
    cfg: Config, jobs: list[ExtractJob], work: WorkFolder, tally: Tally, aside: SetAside
) -> list[Shard]:
    """Read and clean all pieces."""
    sizes = [job.size for job in jobs]
    results = work.run("extract", extract, jobs, sizes, cfg.workers, "读取与清洗")
    shards = []
    for job, result in zip(jobs, results, strict=True):
        tally.merge(result["tally"])
        aside.merge(result["aside"])
        shards += result_shards(work, "extract", job.number, result, job.is_reference)
    tally.step("读取", len(aside), 0, 0, 0, 0)  # rows that could not be used
    return shards


def strip_all(
    cfg: Config, recipe: Recipe, shards: list[Shard], work: WorkFolder, tally: Tally
) -> list[Shard]:
    """Remove the lines that many documents share from every shard of the corpus."""
    own = [shard for shard in shards if not shard.is_reference]
    lines = work.path / "lines.npy"
    np.save(lines, frequent_lines(own, cfg.boilerplate))
    jobs = [StripJob(shard, recipe, lines) for shard in own]
    sizes = [shard.bytes for shard in own]
    results = work.run("strip", strip_lines, jobs, sizes, cfg.workers, "剔除公共行")
    stripped = [shard for shard in shards if shard.is_reference]
    for number, result in enumerate(results):
        tally.merge(result["tally"])
        stripped += result_shards(work, "strip", number, result)
    return stripped


def result_shards(
    work: WorkFolder, step: str, number: int, result: dict[str, Any], is_reference: bool = False
) -> list[Shard]:
    """The shards that a task wrote."""
    folder = work.folder(step, number)
    return [Shard(folder / f"{i:03d}", names, is_reference) for i, names in enumerate(result["shards"])]


def near_engine(cfg: Config) -> Join:
    """What finds near duplicates."""
    if cfg.engine == "reference":
        from data_clean.reference import join_near as reference

        return reference
    return partial(join_near, threads=cfg.workers or processors())


def without_duplicates(cfg: Config, corpus: Corpus, tally: Tally, join: Join) -> np.ndarray:
    """Which documents are written, (n,) bool: those of the corpus that are no duplicates."""
    own = [np.full(shard.count, not shard.is_reference) for shard in corpus.shards]
    keep = np.concatenate([np.empty(0, bool), *own])
    if not len(corpus):
        return keep
    start = time.process_time()
    clusters = find_clusters(corpus, cfg.duplicates, join, source_rank(cfg, corpus))
    tally.add_duplicates(corpus, clusters, keep, time.process_time() - start, cfg.duplicates)
    keep[clusters.members[clusters.members != clusters.kept]] = False
    return keep


def source_rank(cfg: Config, corpus: Corpus) -> Callable[[str], int]:
    """The preference among data sets: those of --prefer in their order, then all others alike."""
    known = {name for shard in corpus.shards for name in shard.sources}
    for name in cfg.prefer:
        require(name in known, "prefer", name, f"应为来源的名字（{'、'.join(sorted(known)[:20])}）")
    return lambda name: cfg.prefer.index(name) if name in cfg.prefer else len(cfg.prefer)


def without_outliers(
    cfg: Config, corpus: Corpus, keep: np.ndarray, work: WorkFolder, tally: Tally
) -> np.ndarray:
    """The documents that a model finds neither too easy nor too hard, (n,) bool; one process, which uses all cores."""
    np.save(work.path / "unique.npy", keep)
    jobs = score_jobs(cfg, corpus, work.path / "unique.npy")
    sizes = [shard.bytes for shard in corpus.shards]
    for result in work.run("score", score, jobs, sizes, 1, "困惑度"):
        tally.merge(result["tally"])
    return np.concatenate([np.load(work.folder("score", n) / KEEP) for n in range(len(jobs))] or [keep])


def score_jobs(cfg: Config, corpus: Corpus, unique: Path) -> list[ScoreJob]:
    """A job for every shard. unique: where it is written which documents are to be judged."""
    return [
        ScoreJob(shard, int(first), unique, cfg.model, cfg.min_bits, cfg.max_bits)
        for shard, first in zip(corpus.shards, corpus.firsts, strict=False)
    ]


def write_parts(cfg: Config, corpus: Corpus, keep: np.ndarray, work: WorkFolder, tally: Tally) -> list[Path]:
    """Write the kept documents, shuffled; returns the files."""
    if not keep.any():
        return []
    np.save(work.path / "keep.npy", keep)
    size, parts = count_parts(cfg, corpus, keep)
    jobs = [
        PartJob(number, parts, corpus.shards, work.path / "keep.npy", cfg.seed) for number in range(parts)
    ]
    results = work.run("write", write_part, jobs, [size // parts] * parts, cfg.workers, "打乱与写出")
    for result in results:
        tally.merge(result["tally"])
    return [work.folder("write", number) / PART for number in range(parts)]


def count_parts(cfg: Config, corpus: Corpus, keep: np.ndarray) -> tuple[int, int]:
    """Bytes of the documents to write, and how many files they go to."""
    size = sum(int(shard.sizes()[kept].sum()) for shard, kept in corpus.by_shard(keep))
    return size, min(size // (cfg.part_mb << 20) + 1, SLOTS)


def begin_report(cfg: Config, aside: SetAside) -> dict[str, Any]:
    """What is known before the work: settings, and what the benchmark files hold."""
    report: dict[str, Any] = {"settings": settings(cfg)}
    if cfg.benchmarks:  # read in every process; what is wrong with the files is said here, and now
        report["benchmarks"] = Benchmarks.read(cfg.benchmarks, aside, cfg.benchmark_ngram).report()
    return report


def finish_report(
    cfg: Config, report: dict[str, Any], parts: list[Path], tally: Tally, aside: SetAside, seconds: float
) -> None:
    """Show what was done, and publish it if anything is left."""
    tally.show()
    aside.show()
    if parts:
        report |= tally.report(descriptions()) | {"set_aside": aside.report(), "seconds": round(seconds, 3)}
        publish(cfg.out, parts, report)


def publish(out: Path, parts: list[Path], report: dict[str, Any]) -> None:
    """Give the finished files their final names, all at once."""
    with atomic_path(out) as folder:
        folder.mkdir()
        for number, part in enumerate(parts):
            final = folder / f"part-{number:05d}.parquet"
            try:
                os.link(part, final)  # the work folder keeps its own, should what follows fail
            except OSError:  # a file system without links
                shutil.copyfile(part, final)
        write_json(folder / "report.json", report)
        write_page(folder / "report.html", report)


def chosen_presets(cfg: Config) -> tuple[tuple[str, str], ...]:
    """--preset as (pattern of data sets, preset)."""
    pairs = [value.rpartition("=") for value in cfg.preset]
    for _, _, preset in pairs:
        check_preset(preset)
    return tuple((source if equals else "*", preset) for source, equals, preset in pairs)


def chosen_limits(cfg: Config) -> tuple[tuple[str, float], ...]:
    """--rule as (rule, limit)."""
    limits = []
    for value in cfg.rule:
        name, _, limit = value.rpartition("=")
        try:
            limits.append((name, float(limit)))
        except ValueError:
            raise UserError(f"--rule 应写成 规则=阈值，例如 过短=20，现在是 {value}。") from None
        check_limit(*limits[-1])
    return tuple(limits)


def read_words(path: Path | None) -> tuple[str, ...]:
    """The lines of a word list."""
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} 不是 UTF-8 编码；请转码：iconv -f GBK -t UTF-8 原文件 > 新文件") from error
    return tuple(line.strip() for line in lines if line.strip())


if __name__ == "__main__":
    run_stage(Config, main)
