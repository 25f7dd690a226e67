"""Stage 0 on many machines: the steps of clear.py, run by datatrove on this machine, on Slurm or on Ray.

    python -m data_clean.on_datatrove --executor slurm --partition cpu --tasks 200

All machines must see this repository, the data and --out under the same paths. The same command, given again, goes
on where an earlier run has stopped. docs/cluster.md explains it all. The pipelines are in `stages`, in the order in
which they run; what they are made of is in datatrove_blocks.py.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from this folder or from the root

from data_clean import clear
from data_clean.steps import score, write_part
from sources.aside import SetAside
from sources.demo_corpus import ensure_demo
from stage import ROOT, UserError, check_writable, remove, require, run_stage
from workers import RESULT, WorkFolder, processors

if TYPE_CHECKING:
    from datatrove.pipeline.base import PipelineStep

    from data_clean.datatrove_blocks import Plan

INSTALL = "pip install -r requirements-cluster.txt"
# Of the input, for one task that looks for near duplicates; each of them reads a band's keys of all documents.
SHARE_BYTES = 64 << 30
MOST_JOBS = 1000  # of a Slurm array: its usual limit (MaxArraySize)
# Where the work is done does not change the result: a run can go on elsewhere.
ANYWHERE = dict(executor="local", workers=0, mem_gb=1, partition="", time="", sbatch=())


@dataclass
class Config(clear.Config):
    """阶段 0 的多机版：用 datatrove 清洗、去重原始语料，结果与 clear.py 相同（见 docs/cluster.md）。"""

    executor: Literal["local", "slurm", "ray"] = "local"  # 在本机、Slurm 集群还是 Ray 集群上运行
    tasks: int = 0  # 把读取与清洗分成多少份，也是 Slurm 数组作业的大小；0 为每 64 MB 输入一份
    mem_gb: int = 4  # slurm、ray：每份的内存
    partition: str = ""  # slurm：分区（sinfo 可查）
    time: str = "24:00:00"  # slurm：每份的时限
    sbatch: tuple[str, ...] = ()  # slurm：其他 sbatch 选项，例如 account=lab qos=high

    def check(self) -> None:
        super().check()
        require(self.engine == "fast", "engine", self.engine, "在多机上只能是 fast")
        require(self.tasks >= 0, "tasks", self.tasks, "不能小于 0")
        require(self.mem_gb >= 1, "mem_gb", self.mem_gb, "至少为 1")
        require(all("=" in option for option in self.sbatch), "sbatch", self.sbatch, "应写成 选项=值")
        require(self.executor != "slurm" or bool(self.partition), "partition", "空的", "在 Slurm 上必须给出")


class Stage(NamedTuple):
    """A pipeline of datatrove; every task runs it on its share of the work."""

    name: str
    label: str
    pipeline: "list[PipelineStep]"
    tasks: int


def main(cfg: Config) -> None:
    need_packages(cfg)
    if cfg.demo:
        ensure_demo()
    check_writable(cfg.out)
    # Tasks start in other folders.
    cfg = replace(cfg, **{field.name: absolute(getattr(cfg, field.name)) for field in fields(cfg)})
    jobs = clear.extract_jobs(cfg)
    clear.begin_report(cfg, SetAside())  # says now what is wrong with benchmark files
    key = clear.work_key(replace(cfg, **ANYWHERE), jobs)
    # It is not left: on Slurm the work only begins when this process ends, and datatrove's records are in it.
    work = WorkFolder(cfg.out.with_name(f".{cfg.out.name}.datatrove"), key).__enter__()
    if not cfg.out.exists():  # moved away since: written again
        remove(work.path / "logs" / "publish")
    from data_clean.datatrove_blocks import Plan

    run = {"local": run_locally, "slurm": submit_to_slurm, "ray": run_on_ray}[cfg.executor]
    run(cfg, stages(Plan(cfg, jobs, work)), work)
    if cfg.executor != "slurm":
        report_end(cfg, work)


def absolute(value: Any) -> Any:
    """A setting with absolute paths."""
    if isinstance(value, tuple):
        return tuple(map(absolute, value))
    return value.absolute() if isinstance(value, Path) else value


def need_packages(cfg: Config) -> None:
    """Raise UserError unless datatrove (and ray) are installed."""
    needed = ["datatrove", "regex", "zstandard", *(["ray"] if cfg.executor == "ray" else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        command = f"{INSTALL}{' ray' if missing == ['ray'] else ''}"
        raise UserError(f"没有安装 {'、'.join(missing)}；请运行 {command}。")


def stages(plan: "Plan") -> list[Stage]:
    """All pipelines; each needs what those before it have written."""
    from data_clean import datatrove_blocks as blocks

    cfg, pieces = plan.cfg, len(plan.jobs)
    tasks = min(cfg.tasks or pieces, pieces)
    shares = min(math.ceil(tasks / cfg.bands), 1 + sum(job.size for job in plan.jobs) // SHARE_BYTES)
    similar = cfg.bands * shares if cfg.dedup == "minhash" else 1
    clean = [blocks.PieceReader(plan), blocks.CleaningFilter(plan), blocks.ShardBlock(plan)]
    made = [Stage("extract", "读取与清洗", clean, tasks)]
    if cfg.boilerplate:
        made.append(one_step(plan, "lines", "公共行", blocks.find_lines, 1))
        made.append(one_step(plan, "strip", "剔除公共行", blocks.strip_piece, pieces))
    made.append(one_step(plan, "equal", "完全重复", blocks.find_equal, 1))
    made.append(one_step(plan, "similar", "近似重复", blocks.find_similar, similar))
    made.append(one_step(plan, "choose", "选出保留的文档", blocks.choose_kept, 1))
    if cfg.model:
        scores = [blocks.Share(plan, "score", blocks.score_jobs, score)]
        made.append(Stage("score", "困惑度", scores, tasks))
        made.append(one_step(plan, "keep", "合并打分", blocks.join_keep, 1))
    write = [blocks.Share(plan, "write", blocks.part_jobs, write_part)]
    made.append(Stage("write", "打乱与写出", write, tasks))
    made.append(one_step(plan, "publish", "报告", blocks.publish, 1))
    return made


def one_step(plan: "Plan", name: str, label: str, function: Callable[..., Any], tasks: int) -> Stage:
    """A pipeline that runs a function of datatrove_blocks.py."""
    from data_clean.datatrove_blocks import Task

    return Stage(name, label, [Task(plan, name, function)], tasks)


def run_locally(cfg: Config, pipelines: list[Stage], work: WorkFolder) -> None:
    """Run all pipelines on this machine."""
    from data_clean.datatrove_blocks import LocalExecutor

    for stage in pipelines:
        print(f"{stage.label}：{stage.tasks} 份", flush=True)
        LocalExecutor(
            stage.pipeline,
            stage.tasks,
            min(cfg.workers or processors(), stage.tasks),
            logging_dir=logs(work, stage),
            start_method="spawn",  # not forked: the threads of Arrow do not survive that; and Windows only has this
        ).run()


def run_on_ray(cfg: Config, pipelines: list[Stage], work: WorkFolder) -> None:
    """Run all pipelines on the cluster that RAY_ADDRESS names, or on a Ray that is started on this machine."""
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
        if missing := executor.get_incomplete_ranks():  # it only logs this
            where = f"{logs(work, stage)}/logs"
            raise UserError(
                f"「{stage.label}」有 {len(missing)} 份未完成，原因见 {where}；重跑同一命令会接着做。"
            )


def submit_to_slurm(cfg: Config, pipelines: list[Stage], work: WorkFolder) -> None:
    """Hand all pipelines to Slurm as array jobs, each waiting for the one before."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    executor = None
    for stage in pipelines:
        executor = SlurmPipelineExecutor(
            stage.pipeline,
            stage.tasks,
            cfg.time,
            cfg.partition,
            mem_per_cpu_gb=cfg.mem_gb,
            workers=cfg.workers or -1,
            job_name=f"clean-{stage.name}",
            qos="",  # datatrove's default is one that many clusters lack
            env_command=f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH "
            f"PYTHONPATH={shlex.quote(python_path())}",
            sbatch_args=dict(option.split("=", 1) for option in cfg.sbatch),
            # One array for all tasks: of several, datatrove would wait for the last only.
            tasks_per_job=math.ceil(stage.tasks / min(cfg.tasks or MOST_JOBS, MOST_JOBS)),
            depends=executor,
            logging_dir=logs(work, stage),
        )
    executor.run()
    print(f"已提交 {len(pipelines)} 个作业（squeue 可查），全部完成后结果在 {cfg.out}。")
    print(f"某一份失败时：原因见 {work.path / 'logs'}；scancel 其余作业后重跑同一命令会接着做。")


def report_end(cfg: Config, work: WorkFolder) -> None:
    """Say where the result is."""
    result = json.loads((work.folder("publish", 0) / RESULT).read_text(encoding="utf-8"))
    if not result["rows"]:
        raise UserError(f"{cfg.data} 里没有一篇可用的文档；原因见上表。")
    print(f"\n已写入 {cfg.out}：{result['rows']:,} 篇。被删去的文档在 {work.path / 'dropped'}。")
    print(f"{work.path} 是中间结果，确认无误后可以删除。")


def logs(work: WorkFolder, stage: Stage) -> str:
    """Where datatrove keeps what is done; never the folder in which the command is given."""
    return str(work.path / "logs" / stage.name)


def python_path() -> str:
    """Where tasks find our modules."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    from data_clean.on_datatrove import Config, main  # by this name, other processes can import them

    run_stage(Config, main)
