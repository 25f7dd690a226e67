"""Stage 0: raw corpora -> clean, deduplicated, shuffled parquet.

    cd data_clean && python clear.py

Reads every file under data/ (any public format, gzip too), normalises, drops broken and worthless texts,
then exact and near duplicates, and writes data/clean/part-*.parquet with report.json beside them.
"""

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from this folder or from the root

from tqdm import tqdm

from data_clean.dedup import Pair, by_minhash, by_simhash, exact_duplicates
from data_clean.filters import RAW_RULES, Rule, broken_rule, clean_rules
from data_clean.normalise import comparison_key, normalise
from data_clean.tally import Documents, Tally, characters
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import OUR_OUTPUTS, list_files
from sources.pretrain_text import Document, read_documents
from sources.report import settings, write_json
from stage import DEMO_DIR, ROOT, StageConfig, UserError, atomic_path, check_writable, require, run_stage


@dataclass
class Config(StageConfig):
    """阶段 0：清洗、去重原始语料，写成 parquet。"""

    data: Path = ROOT / "data"  # 原始语料：一个文件，或一个文件夹（含子文件夹；跳过 clean、demo 和 .bin）
    out: Path = ROOT / "data" / "clean"  # 输出文件夹：part-*.parquet 和 report.json
    text_column: str | None = None  # 正文所在的字段；不填则按各公开数据集的格式识别
    min_chars: int = 10  # 文字（字母、汉字、数字）少于此数的文档丢弃；一首五绝有 20 字
    dedup: Literal["minhash", "simhash", "none"] = "minhash"  # 近似去重方法；simhash 较粗：不再逐对核实
    ngram: int = 3  # 近似去重比较的字符 n 元组长度
    threshold: float = 0.65  # minhash：n 元组集合的 Jaccard 相似度达到此值即为重复
    num_perm: int = 128  # minhash：哈希个数
    bands: int = 21  # minhash：LSH 分段数，每段 num_perm // bands 个哈希
    distance: int = 6  # simhash：64 位指纹至多相差几位即为重复
    shard_rows: int = 100_000  # 每个 parquet 文件的行数
    seed: int = 0  # 打乱顺序和哈希所用的随机种子

    DEMO = dict(data=DEMO_DIR / "raw", out=DEMO_DIR / "clean")
    INPUT = "data"

    def check(self) -> None:
        for name in ("ngram", "shard_rows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")
        require(1 <= self.num_perm <= 4096, "num_perm", self.num_perm, "在 1 与 4096 之间")
        require(1 <= self.bands <= self.num_perm, "bands", self.bands, "在 1 与 --num_perm 之间")
        require(0 < self.threshold <= 1, "threshold", self.threshold, "大于 0 且不大于 1")
        require(0 <= self.distance < 32, "distance", self.distance, "在 0 与 31 之间")
        require(0 <= self.seed < 2**31, "seed", self.seed, "在 0 与 2147483647 之间")
        others = [f for f in self.out.rglob("*") if f.name != "report.json" and not f.match("part-*.parquet")]
        if self.out.is_file() or others:
            name = (others or [self.out])[0].name
            raise UserError(f"--out {self.out} 里有别的文件（如 {name}），会被覆盖；请换一个空文件夹。")

    def has_input(self) -> bool:
        try:
            return bool(list_files(self.data))
        except UserError:
            return False


def read_all(cfg: Config, aside: SetAside, tally: Tally) -> Iterator[Document]:
    documents = read_documents(cfg.data, aside, cfg.text_column, skip=(*OUR_OUTPUTS, cfg.out))
    for document in tqdm(documents, desc="读取", unit=" 篇", disable=None):
        tally.count_read(document)
        yield document


def keep_by_rules(documents: Documents, rules: dict[str, Rule], tally: Tally) -> Documents:
    """The documents that no rule drops."""
    kept = []
    for document in tqdm(documents, desc="过滤", unit=" 篇", disable=None):
        rule = broken_rule(document.text, rules)
        if rule:
            tally.drop(rule, document)
        else:
            kept.append(document)
    return kept


def without(documents: Documents, pairs: list[Pair], rule: str, tally: Tally) -> Documents:
    """The documents that are not the dropped half of a duplicate pair."""
    for dropped, kept, similarity in pairs:
        tally.drop(rule, documents[dropped], documents[kept], similarity)
    gone = {dropped for dropped, _, _ in pairs}
    return [document for index, document in enumerate(documents) if index not in gone]


def drop_exact(documents: Documents, tally: Tally) -> Documents:
    keys = (comparison_key(document.text) for document in documents)
    return without(documents, exact_duplicates(keys), "完全重复", tally)


def drop_near(documents: Documents, cfg: Config, tally: Tally) -> Documents:
    keys = [comparison_key(document.text) for document in documents]
    lengths = [len(document.text) for document in documents]
    if cfg.dedup == "minhash":
        pairs = by_minhash(keys, lengths, cfg.ngram, cfg.num_perm, cfg.bands, cfg.threshold, cfg.seed)
    else:
        pairs = by_simhash(keys, lengths, cfg.ngram, cfg.distance)
    return without(documents, pairs, "近似重复", tally)


def shuffled(documents: Documents, seed: int) -> Documents:
    """Sources mixed, so that every part of training sees all of them."""
    return random.Random(seed).sample(documents, len(documents))


def write_shards(folder: Path, documents: Documents, shard_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("text", pa.large_string()), ("source", pa.string())])
    for number, start in enumerate(range(0, len(documents), shard_rows)):
        texts, sources = zip(*documents[start : start + shard_rows], strict=True)
        shard = pa.table({"text": texts, "source": sources}, schema)
        # Small row groups: readers stream, and never hold more than a few thousand documents.
        pq.write_table(shard, folder / f"part-{number:05d}.parquet", compression="zstd", row_group_size=5000)


def clean(cfg: Config, aside: SetAside, tally: Tally) -> Documents:
    """All the steps in order."""
    documents = tally.run("读取", [], lambda _: list(read_all(cfg, aside, tally)))
    tally.steps[0] |= {"rows_in": len(documents) + len(aside), "characters_in": characters(documents)}
    documents = tally.run("剔除乱码", documents, lambda d: keep_by_rules(d, RAW_RULES, tally))
    documents = tally.run("规范化", documents, lambda d: [Document(normalise(t), s) for t, s in d])
    rules = clean_rules(cfg.min_chars)
    documents = tally.run("过滤", documents, lambda d: keep_by_rules(d, rules, tally))
    documents = tally.run("完全去重", documents, lambda d: drop_exact(d, tally))
    if cfg.dedup != "none":
        documents = tally.run("近似去重", documents, lambda d: drop_near(d, cfg, tally))
    return tally.run("合并打乱", documents, lambda d: shuffled(d, cfg.seed))


def main(cfg: Config) -> None:
    if cfg.demo:
        ensure_demo()
    check_writable(cfg.out)
    aside, tally = SetAside(), Tally()
    documents = clean(cfg, aside, tally)
    tally.count_kept(documents)
    tally.show()
    aside.show()
    if not documents:
        raise UserError(f"{cfg.data} 里没有一篇可用的文档；原因见上表。")
    with atomic_path(cfg.out) as folder:
        folder.mkdir()
        write_shards(folder, documents, cfg.shard_rows)
        report = {**tally.report(), "set_aside": aside.report(), "settings": settings(cfg)}
        write_json(folder / "report.json", report)
    print(f"\n已写入 {cfg.out}：{len(documents):,} 篇，{characters(documents):,} 字符")


if __name__ == "__main__":
    run_stage(Config, main)
