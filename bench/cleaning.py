"""The whole cleaning stage from files to files, against the original's kind: `python bench/cleaning.py`.

Both read parquet, drop short texts and near duplicates, and write parquet; ours does all that data_clean/clear.py
does by default. The original's kind is slow and gets a smaller corpus, made in the same way.
"""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

import pyarrow.parquet as pq

from bench.corpus import corpus_folder
from bench.engines import original
from bench.measure import ONE_THREAD, Cost, run_measured
from sources.report import settings, table, write_json
from stage import ROOT, StageConfig, require, run_stage

BASELINE = "原项目的写法"
MIN_CHARACTERS = 10  # shorter texts are dropped before the rest, as by our default
WARM_UP = 2000  # documents of the run that compiles what ours needs


@dataclass
class Config(StageConfig):
    """清洗整个阶段的速度和内存，从读文件到写文件。"""

    documents: int = 100_000  # 语料的文档数；200 万篇约 4 GB 文本
    files: int = 4  # 语料分成几个文件
    workers: tuple[int, ...] = (1, 2)  # 本项目用几个进程，可填几个
    baseline: int = 4000  # 给原项目的写法的语料只有这么多篇；0 为不测
    rounds: int = 1  # 轮流测几轮，取中位数
    planted: float = 0.15  # 人工放入的重复文档和易混文档所占的比例
    data: Path | None = None  # 模仿哪份语料的用字；不填则用内置演示语料
    folder: Path = ROOT / "out" / "bench"  # 语料和清洗结果放在这里，已有的语料不再生成
    out: Path = ROOT / "out" / "bench" / "cleaning.json"  # 结果
    seed: int = 0  # 随机种子
    worker: str = ""  # （内部）按原项目的写法清洗一次，参数为 JSON

    def check(self) -> None:
        require(self.documents >= 1, "documents", self.documents, "至少为 1")
        require(1 <= self.files <= self.documents, "files", self.files, "在 1 与 --documents 之间")
        require(self.rounds >= 1, "rounds", self.rounds, "至少为 1")
        require(self.baseline >= 0, "baseline", self.baseline, "不小于 0")
        require(min(self.workers, default=1) >= 1, "workers", self.workers, "至少为 1")


def clean_as_original(folder: str, out: str) -> None:
    """Read rows, drop short ones and near duplicates one by one, write through pandas."""
    import pandas as pd

    frames = pd.concat(map(pd.read_parquet, sorted(Path(folder).glob("part-*.parquet"))))
    rows = [row for row in frames.itertuples(index=False) if len(row.text) >= MIN_CHARACTERS]
    keep = original([row.text for row in rows])
    kept = pd.DataFrame([row for row, stays in zip(rows, keep, strict=True) if stays])
    Path(out).mkdir()
    kept.to_parquet(Path(out) / "part-00000.parquet")


def run_ours(folder: Path, out: Path, workers: int) -> tuple[Cost, dict[str, Any]]:
    """One run of our stage; also its report."""
    command = [sys.executable, ROOT / "data_clean" / "clear.py", "--data", folder, "--out", out]
    _, cost = run_measured([*command, "--workers", workers])
    return cost, json.loads((out / "report.json").read_text(encoding="utf-8"))


def run_original(folder: Path, out: Path) -> Cost:
    """One run of the original's kind."""
    job = json.dumps({"folder": str(folder), "out": str(out)})
    return run_measured([sys.executable, __file__, "--worker", job], ONE_THREAD)[1]


def measure(cfg: Config, corpus: Path, small: Path) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Costs of all runs by way, and the steps of ours; the ways take turns, the original's kind on `small`."""
    runs: dict[str, list[dict]] = {}
    steps: dict[str, list[dict]] = {}

    def note(name: str, cost: Cost, documents: int, out: Path) -> None:
        rows = sum(pq.read_metadata(file).num_rows for file in out.glob("part-*.parquet"))
        run = {"documents": documents, "kept": rows, "rate": documents / cost.cpu, **cost._asdict()}
        runs.setdefault(name, []).append(run)
        print(f"{name}，{documents:,} 篇：{cost.wall:.1f} 秒，{run['rate']:,.0f} 篇/秒·核", flush=True)

    for _ in range(cfg.rounds):
        for workers in cfg.workers:
            name = f"本项目，{workers} 个进程"
            with new_folder(cfg.folder) as out:
                cost, report = run_ours(corpus, out, workers)
                note(name, cost, cfg.documents, out)
            steps.setdefault(name, []).append({s["step"]: s["seconds"] for s in report["steps"]})
        if cfg.baseline:
            documents = min(cfg.baseline, cfg.documents)
            with new_folder(cfg.folder) as out:
                note(BASELINE, run_original(small, out), documents, out)
    return runs, steps


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """A folder to be made for results that nobody needs afterwards."""
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent) as folder:
        yield Path(folder) / "clean"


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run.get(key, 0) for run in runs) for key in runs[0]}


def show(results: dict[str, dict[str, float]], steps: dict[str, dict[str, float]]) -> str:
    base = results.get(BASELINE, {}).get("rate")
    rows = [
        [name, int(r["documents"]), int(r["kept"]), round(r["wall"], 1), round(r["cpu"], 1), round(r["rate"])]
        + [f"{r['rate'] / base:.1f}" if base else "-", round(r["documents"] / r["wall"])]
        + [round(r[key] / 1e6) for key in ("memory", "anonymous", "largest")]
        for name, r in results.items()
    ]
    header = ["方法", "篇", "留下", "秒", "CPU 秒", "篇/秒·核", "倍数", "篇/秒"]
    header += ["内存合计 MB", "不含文件映射", "最大的进程"]
    every_step = list(dict.fromkeys(step for found in steps.values() for step in found))
    shares = [
        [step, *(share(found.get(step, 0), results[name]["cpu"]) for name, found in steps.items())]
        for step in every_step
    ]
    rest = {name: results[name]["cpu"] - sum(found.values()) for name, found in steps.items()}
    shares.append(["启动等其余", *(share(seconds, results[name]["cpu"]) for name, seconds in rest.items())])
    return table(header, rows) + "\n\n" + table(["步骤的 CPU 时间", *steps], shares)


def share(seconds: float, total: float) -> str:
    return f"{seconds:.2f} 秒（{seconds / total:.0%}）"


def main(cfg: Config) -> None:
    if cfg.worker:
        clean_as_original(**json.loads(cfg.worker))
        return
    recipe = (cfg.planted, cfg.seed, cfg.data)
    corpus = corpus_folder(cfg.folder, cfg.documents, *recipe, cfg.files)
    small = corpus_folder(cfg.folder, min(cfg.baseline or WARM_UP, cfg.documents), *recipe, 1)
    with new_folder(cfg.folder) as out:
        run_ours(small, out, 1)  # compiles what is not compiled yet
    runs, steps = measure(cfg, corpus, small)
    results = {name: medians(found) for name, found in runs.items()}
    shares = {name: medians(found) for name, found in steps.items()}
    size = sum(file.stat().st_size for file in corpus.glob("part-*"))
    print("\n" + show(results, shares))
    print(f"语料：{cfg.documents:,} 篇，{cfg.files} 个文件，压缩后 {size / 1e6:,.0f} MB。")
    write_json(cfg.out, {"settings": settings(cfg), "runs": runs, "medians": results, "steps": shares})
    print(f"\n已写入 {cfg.out}")


if __name__ == "__main__":
    run_stage(Config, main)
