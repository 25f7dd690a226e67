"""Documents per second and core, and memory, of near-duplicate removal: `python bench/dedup_speed.py`.

Every measurement is a process of its own; the ways take turns for several rounds, because other work on the
machine comes and goes. Slow ways get the beginning of the corpus, as many documents as they do in a minute.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from bench.corpus import corpus_folder, read_texts
from bench.engines import ENGINES, chosen_engines, prepare
from bench.measure import ONE_THREAD, peak_memory, restart_peak, run_measured
from sources.report import settings, table, write_json
from stage import ROOT, StageConfig, require, run_stage

BASELINE = "原项目的写法"
WARM_UP = 200  # documents, with a near copy of each: then everything is compiled and loaded


@dataclass
class Config(StageConfig):
    """近似去重的速度和内存。"""

    documents: tuple[int, ...] = (10_000, 100_000)  # 语料的文档数，可填几个
    rounds: int = 3  # 轮流测几轮，取中位数
    engines: tuple[str, ...] = ()  # 只测这些方法（名字，或名字里的字样）；不填则全测
    planted: float = 0.15  # 人工放入的重复文档和易混文档所占的比例
    data: Path | None = None  # 模仿哪份语料的用字；不填则用内置演示语料
    folder: Path = ROOT / "out" / "bench"  # 语料放在这里，已有的不再生成
    out: Path = ROOT / "out" / "bench" / "dedup_speed.json"  # 结果
    seed: int = 0  # 随机种子
    worker: str = ""  # （内部）测一次，参数为 JSON

    def check(self) -> None:
        require(bool(self.documents) and min(self.documents) >= 1, "documents", self.documents, "至少为 1")
        require(self.rounds >= 1, "rounds", self.rounds, "至少为 1")


def work(folder: str, name: str, documents: int) -> dict[str, float]:
    """Remove near duplicates once; returns seconds and bytes of memory, before and at most."""
    engine = ENGINES[name]
    prepared = prepare(engine, read_texts(Path(folder), documents).to_pylist())
    first = prepared[:WARM_UP]
    engine.run([*first, *(text[: len(text) * 9 // 10] for text in first)])
    before = restart_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    keep = engine.run(prepared)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"documents": len(keep), "kept": int(keep.sum()), "wall": wall, "cpu": cpu} | {
        "before": before,
        "memory": peak_memory(),
    }


def measure(folder: Path, name: str, documents: int) -> dict[str, float]:
    job = json.dumps({"folder": str(folder), "name": name, "documents": documents})
    printed, _ = run_measured([sys.executable, __file__, "--worker", job], ONE_THREAD)
    found = json.loads(printed.strip().splitlines()[-1])
    return {**found, "rate": found["documents"] / found["cpu"]}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return {**medians, "rates": [run["rate"] for run in runs]}


def show(results: list[dict[str, Any]]) -> str:
    base = next((r["rate"] for r in results if r["engine"] == BASELINE), None)
    rows = [
        [r["engine"], int(r["corpus"]), int(r["documents"]), int(r["kept"]), round(r["rate"])]
        + [f"{r['rate'] / base:.1f}" if base else "-", f"{min(r['rates']):,.0f}–{max(r['rates']):,.0f}"]
        + [round(r["wall"], 2), round(r["memory"] / 1e6), round((r["memory"] - r["before"]) / 1e6)]
        for r in results
    ]
    header = [
        "方法",
        "语料",
        "测了几篇",
        "留下",
        "篇/秒·核",
        "倍数",
        "最慢–最快",
        "秒",
        "内存 MB",
        "其中去重",
    ]
    return table(header, rows)


def main(cfg: Config) -> None:
    if cfg.worker:
        print(json.dumps(work(**json.loads(cfg.worker))))
        return
    engines = chosen_engines(cfg.engines)
    jobs = {}  # (name, documents really taken) -> size of the corpus; a slow way is not timed twice
    for size in sorted(set(cfg.documents)):
        for name, engine in engines.items():
            jobs.setdefault((name, min(size, engine.limit)), size)
    folders = {
        size: corpus_folder(cfg.folder, size, cfg.planted, cfg.seed, cfg.data)
        for size in sorted(set(jobs.values()))
    }
    runs: dict[tuple[str, int], list] = {job: [] for job in jobs}
    for number in range(1, cfg.rounds + 1):
        for (name, documents), size in jobs.items():
            run = measure(folders[size], name, documents)
            runs[name, documents].append(run)
            print(f"第 {number} 轮，{name}，{documents:,} 篇：{run['rate']:,.0f} 篇/秒·核", flush=True)
    results = [{"engine": job[0], "corpus": size, **summary(runs[job])} for job, size in jobs.items()]
    print("\n" + show(results))
    print(f"倍数：每核每秒文档数与「{BASELINE}」之比。秒：墙上时间；速度按 CPU 时间算。")
    write_json(cfg.out, {"settings": settings(cfg), "results": results})
    print(f"\n已写入 {cfg.out}")


if __name__ == "__main__":
    run_stage(Config, main)
