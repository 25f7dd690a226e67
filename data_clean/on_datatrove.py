"""Stage 0 on many machines: the steps of clear.py, run by datatrove on this machine, on Slurm or on Ray.

    python -m data_clean.on_datatrove --executor slurm --partition cpu --tasks 200

Every machine must see this repository, the data and --out under the same paths. The same command, given again,
goes on where an earlier run has stopped. docs/cluster.md explains it all.
"""

import math
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from data_clean.signatures import Method, Settings
from sources.demo_corpus import ensure_demo
from sources.files import OUR_OUTPUTS, list_files
from sources.pieces import split_into_pieces
from sources.report import settings
from stage import DEMO_DIR, ROOT, StageConfig, UserError, check_writable, require, run_stage
from workers import WorkFolder, file_key, processors

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

INSTALL = "pip install -r requirements-cluster.txt"
ELSEWHERE = dict(
    executor="", workers=0, mem_gb=0, partition="", time="", sbatch=()
)  # does not change the result


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
    part_mb: int = 256
    seed: int = 0  # 打乱顺序和哈希所用的随机种子

    executor: Literal["local", "slurm", "ray"] = "local"  # 在本机、Slurm 集群还是 Ray 集群上运行
    tasks: int = 0  # 把工作分成多少份（Slurm：数组作业的大小）；0 为每 64 MB 输入一份
    workers: int = 0  # 同时运行多少份；0 为本机的处理器数，集群上不限
    mem_gb: int = 4  # slurm、ray：每份的内存
    partition: str = ""  # slurm：分区
    time: str = "24:00:00"  # slurm：每份的时限
    sbatch: tuple[str, ...] = ()  # slurm：其他 sbatch 选项，如 account=lab qos=high

    DEMO = dict(data=DEMO_DIR / "raw", out=DEMO_DIR / "clean")
    INPUT = "data"

    def check(self) -> None:
        for name in ("tasks", "workers"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")
        require(self.mem_gb >= 1, "mem_gb", self.mem_gb, "至少为 1")
        for option in self.sbatch:
            require("=" in option, "sbatch", option, "应写成 选项=值")
        if self.executor == "slurm" and not self.partition:
            raise UserError("--executor slurm 需要 --partition（分区名，见 sinfo）。")

    def has_input(self) -> bool:
        try:
            return bool(list_files(self.data))
        except UserError:
            return False


class Stage(NamedTuple):
    """A pipeline of datatrove; every task runs it on its part of the work."""

    name: str
    label: str
    pipeline: "list[PipelineStep]"
    tasks: int


def stages(cfg: Config, work: Path, pieces) -> list[Stage]:
    """All pipelines, each of which needs what the one before has written."""
    from data_clean import datatrove_blocks as blocks

    method = Settings(cfg.dedup, cfg.ngram, cfg.num_perm, cfg.bands, cfg.threshold, cfg.distance, cfg.seed)
    tasks = cfg.tasks or len(pieces)
    shares = math.ceil(tasks / cfg.bands)
    parts = max(1, sum(piece.size for piece in pieces) // (cfg.part_mb << 20))
    read = [
        blocks.PieceReader(pieces, cfg.text_column, work),
        blocks.RulesFilter(cfg.min_chars, work),
        blocks.ShardWriter(method, parts, cfg.seed, work),
    ]
    near = [blocks.SimilarDocuments(method, work)]
    return [
        Stage("1-read", "读取、清洗、签名", read, min(tasks, len(pieces))),
        Stage("2-equal", "完全重复", [blocks.EqualDocuments(work)], 1),
        Stage("3-similar", "近似重复", near, shares * cfg.bands if cfg.dedup == "minhash" else 1),
        Stage("4-choose", "选出保留的文档", [blocks.ChosenDocuments(work)], 1),
        Stage("5-write", "打乱、写出", [blocks.PartWriter(cfg.seed, work)], parts),
        Stage("6-finish", "报告", [blocks.Finish(work, cfg.out, settings(cfg))], 1),
    ]


def main(cfg: Config) -> None:
    need_packages(cfg)
    if cfg.demo:
        ensure_demo()
    check_writable(cfg.out)
    cfg = replace(cfg, data=cfg.data.resolve(), out=cfg.out.resolve())  # the tasks run elsewhere
    pieces = split_into_pieces(cfg.data, (*OUR_OUTPUTS, cfg.out))
    key = settings(replace(cfg, **ELSEWHERE)) | {"files": file_key([piece.file for piece in pieces])}
    work = cfg.out.with_name(f".{cfg.out.name}.datatrove")
    # It stays when this process ends: on a cluster the work only begins then.
    WorkFolder(work, key).__enter__()
    run = {"local": run_local, "slurm": submit_to_slurm, "ray": run_on_ray}[cfg.executor]
    run(cfg, stages(cfg, work, pieces), work)


def need_packages(cfg: Config) -> None:
    """Raise UserError unless datatrove (and ray) are installed."""
    for package in ("datatrove", "regex", *(["ray"] if cfg.executor == "ray" else [])):
        if find_spec(package) is None:
            raise UserError(f"没有安装 {package}；请运行 {INSTALL}{' ray' if package == 'ray' else ''}。")


def run_local(cfg: Config, pipelines: list[Stage], work: Path) -> None:
    """Run all pipelines on this machine."""
    from datatrove.executor.local import LocalPipelineExecutor

    for stage in pipelines:
        print(f"{stage.label}：{stage.tasks} 份", flush=True)
        workers = min(cfg.workers or processors(), stage.tasks)
        # Not forked: the threads of Arrow do not survive that; and Windows has only spawn.
        LocalPipelineExecutor(
            stage.pipeline, stage.tasks, workers, logs(work, stage), start_method="spawn"
        ).run()


def run_on_ray(cfg: Config, pipelines: list[Stage], work: Path) -> None:
    """Run all pipelines on the Ray cluster of RAY_ADDRESS, or on one that is started on this machine."""
    import ray
    from datatrove.executor.ray import RayPipelineExecutor

    ray.init(runtime_env={"env_vars": {"PYTHONPATH": python_path()}})
    for stage in pipelines:
        print(f"{stage.label}：{stage.tasks} 份", flush=True)
        executor = RayPipelineExecutor(
            stage.pipeline,
            stage.tasks,
            cfg.workers or -1,
            logging_dir=logs(work, stage),
            mem_per_cpu_gb=cfg.mem_gb,
        )
        executor.run()
        if missing := executor.get_incomplete_ranks():
            raise UserError(
                f"「{stage.label}」有 {len(missing)} 份没有完成，原因见 {logs(work, stage)}/logs；重跑同一命令会接着做。"
            )


def submit_to_slurm(cfg: Config, pipelines: list[Stage], work: Path) -> None:
    """Hand all pipelines to Slurm as array jobs, each of which waits for the one before."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    previous = None
    for stage in pipelines:
        previous = SlurmPipelineExecutor(
            stage.pipeline,
            stage.tasks,
            cfg.time,
            cfg.partition,
            mem_per_cpu_gb=cfg.mem_gb,
            workers=cfg.workers or -1,
            job_name=f"clean-{stage.name}",
            qos="",
            env_command=f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={python_path()}",
            sbatch_args=dict(option.split("=", 1) for option in cfg.sbatch),
            depends=previous,
            logging_dir=logs(work, stage),
            tasks_per_job=bundle(cfg, stage),
        )
    previous.run()


def bundle(cfg: Config, stage: Stage) -> int:
    """Tasks for a job of a cluster to run one after the other, so that there are about --tasks jobs."""
    return math.ceil(stage.tasks / cfg.tasks) if cfg.tasks else 1


def logs(work: Path, stage: Stage) -> str:
    return str(work / "logs" / stage.name)


def python_path() -> str:
    """Where the tasks find our modules."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    run_stage(Config, main)
