"""Stage 0 on many machines: the steps of clear.py, run by datatrove on this machine, on Slurm or on Ray.

    python -m data_clean.on_datatrove --executor slurm --partition cpu --tasks 200

Every machine must see this repository, the data and --out under the same paths. The same command goes on where
an earlier run has stopped. docs/cluster.md explains it all.
"""

import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_clean.signatures import Method, Settings
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from sources.files import OUR_OUTPUTS, list_files
from sources.pieces import Piece, split_into_pieces
from sources.report import read_json, settings, table
from stage import DEMO_DIR, ROOT, StageConfig, UserError, check_writable, require, run_stage
from workers import WorkFolder, file_key, processors

PART_BYTES = 256 << 20  # of the input for a file of the output


@dataclass
class Config(StageConfig):
    """阶段 0 的多机版：用 datatrove 清洗、去重原始语料，结果与 clear.py 相同。"""

    data: Path = ROOT / "data"  # 原始语料：一个文件，或一个文件夹（各机器须能以同一路径访问）
    out: Path = ROOT / "data" / "clean"  # 输出文件夹；中间结果在它旁边的 .<名字>.datatrove 里
    text_column: str | None = None  # 正文所在的字段；不填则按各公开数据集的格式识别
    min_chars: int = 10  # 文字（字母、汉字、数字）少于此数的文档丢弃
    dedup: Method = "minhash"  # 近似去重方法
    ngram: int = 3  # 近似去重比较的字符 n 元组长度
    threshold: float = 0.65  # minhash：n 元组集合的 Jaccard 相似度达到此值即为重复
    num_perm: int = 128  # minhash：哈希个数
    bands: int = 21  # minhash：LSH 分段数，每段 num_perm // bands 个哈希
    distance: int = 6  # simhash：64 位指纹至多相差几位即为重复
    seed: int = 0  # 打乱顺序和哈希所用的随机种子

    executor: Literal["local", "slurm", "ray"] = "local"  # 在本机、Slurm 集群还是 Ray 集群上运行
    tasks: int = 0  # 把工作分成多少份（Slurm 为数组作业的大小）；0 为每 64 MB 输入一份
    workers: int = 0  # 同时运行多少份；0 为本机的处理器数，集群上不限
    mem_gb: int = 4  # slurm、ray：每份的内存
    partition: str = ""  # slurm：分区
    time: str = "24:00:00"  # slurm：每份的时限
    sbatch: tuple[str, ...] = ()  # slurm：其他 sbatch 选项，如 account=lab qos=high

    DEMO = dict(data=DEMO_DIR / "raw", out=DEMO_DIR / "clean")
    INPUT = "data"
