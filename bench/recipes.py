"""Loss per token of the recipes, through the real command lines: `python bench/recipes.py --corpus FOLDER`.

A vocabulary is trained on the corpus (or a given one taken), the corpus is tokenised, and every recipe trains a
small model from every seed. Printed are, for every recipe: bits per byte on the validation documents at the end
(mean and spread over the seeds), the tokens after which it was as good as the first row at its end, and its
tokens a second. `recipes.json` holds all curves, `recipes.png` shows them. Runs that are complete are not
repeated: a second call takes up what is there.
"""

import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from bench.measure import ONE_THREAD
from sources.report import settings, table, write_json
from stage import DEMO_DIR, ROOT, StageConfig, UserError, atomic_path, require, run_stage
from training.log import read_log
from training.recipes import choose_batch

VARIANTS: dict[str, list[str]] = {
    "original": ["--recipe", "original"],
    "original, warm-up 1000": ["--recipe", "original", "--warmup", "1000"],
    "muon": ["--recipe", "muon"],
    "muon, half the tokens": ["--recipe", "muon"],
    "adamw": ["--recipe", "muon", "--optimizer", "adamw", "--lr", "0.003", "--table_lr", "0.006"],
}
SHARE = {"muon, half the tokens": 0.5}  # of the tokens of the others


@dataclass
class Config(StageConfig):
    """配方的比较：同样多的 token，哪一种学得最好。"""

    corpus: Path = DEMO_DIR / "raw"  # 语料：文件或文件夹，格式与 data_process.py 相同
    vocabulary: str = "8000"  # 自训词表的条目数，或一个现成的 SentencePiece 词表文件
    recipes: tuple[str, ...] = ("original", "muon")  # 比较哪些，可选见 VARIANTS；第一个是基准
    seeds: tuple[int, ...] = (1, 2, 3)  # 每种配方各从这些随机种子训练一次
    tokens: float = 10e6  # 每次训练的 token 数
    dim: int = 128  # 模型宽度
    n_layers: int = 2  # 层数
    n_heads: int = 2  # 注意力头数
    max_seq_len: int = 256  # 上下文长度
    evaluations: int = 10  # 每次训练验证几次
    eval_tokens: int = 65_536  # 每次验证用多少 token
    options: str = ""  # 另外传给 pretrain.py 的参数，如 "--precision bf16 --compile"
    parallel: int = 1  # 同时训练几个，各用一个线程
    folder: Path = ROOT / "out" / "bench" / "recipes"  # 词表、token 和训练结果放在这里；做完的不再重做

    def check(self) -> None:
        for name in ("tokens", "dim", "n_layers", "n_heads", "max_seq_len", "evaluations", "parallel"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")
        unknown = [name for name in self.recipes if name not in VARIANTS]
        require(not unknown, "recipes", "、".join(unknown), f"可选 {'、'.join(VARIANTS)}")
        require(len(self.recipes) > 0 and len(self.seeds) > 0, "recipes", "空", "至少要有一个")


class Curve(NamedTuple):
    """One training run."""

    recipe: str
    seed: int
    points: list[tuple[int, float]]  # tokens, bits per byte on the validation documents
    speed: float  # tokens a second, median


def main(cfg: Config) -> None:
    data = tokenised(cfg)
    with ThreadPoolExecutor(cfg.parallel) as pool:
        jobs = list(product(cfg.seeds, cfg.recipes))
        curves = list(pool.map(lambda job: train(cfg, data, job[1], job[0]), jobs))
    rows = summary(cfg.recipes, curves)
    print(table(["配方", "比特/字节", "各种子", "追平第一行所需 token", "token/秒"], rows))
    where = data.parent / "recipes.json"
    write_json(where, {"settings": settings(cfg), "curves": [curve._asdict() for curve in curves]})
    draw(cfg, curves, where.with_suffix(".png"))
    print(f"全部曲线：{where}；图：{where.with_suffix('.png')}")


def tokenised(cfg: Config) -> Path:
    """Token files of the corpus, with the vocabulary made first if it is to be an own one."""
    own = cfg.vocabulary.isdigit()
    folder = cfg.folder / (cfg.vocabulary if own else Path(cfg.vocabulary).stem)
    vocabulary = folder / "own.model" if own else Path(cfg.vocabulary)
    if own and not vocabulary.exists():
        call("train_tokenizer.py", "--data", cfg.corpus, "--out", vocabulary, "--vocab_size", cfg.vocabulary)
    out = folder / "train.bin"
    if not out.with_suffix(".json").exists():
        call(
            "data_process.py", "--data", cfg.corpus, "--tokenizer", vocabulary, "--out", out,
            "--valid", folder / "valid.bin", "--no_find_bin",
        )  # fmt: skip
    return out


def train(cfg: Config, data: Path, recipe: str, seed: int) -> Curve:
    """Train once, unless that was done before."""
    options = VARIANTS[recipe]
    tokens = cfg.tokens * SHARE.get(recipe, 1)
    batch = choose_batch(options[1], tokens, cfg.max_seq_len)
    steps = max(1, round(tokens / batch))
    name = f"{recipe} {tokens / 1e6:g}M {cfg.dim}x{cfg.n_layers} {seed}".replace(",", "").replace(" ", "_")
    out = data.parent / name
    command = ["--data", data, "--valid", data.with_name("valid.bin"), "--out", out, "--seed", seed]
    command += [
        "--batch_tokens",
        batch,
        "--max_steps",
        steps,
        "--eval_every",
        max(1, steps // cfg.evaluations),
    ]
    command += ["--eval_tokens", cfg.eval_tokens, "--save_every", 10**9]
    for shape in ("dim", "n_layers", "n_heads", "max_seq_len"):
        command += [f"--{shape}", getattr(cfg, shape)]
    if not list(out.glob("step_*")):  # written at the end alone
        call("pretrain.py", *command, *options, *cfg.options.split())
    records = read_log(out / "log.jsonl")
    points = [(r["tokens"], r["val_bpb"]) for r in records if "val_bpb" in r]
    speeds = [r["tokens_per_second"] for r in records if "tokens_per_second" in r]
    print(f"{data.parent.name}，{recipe}，种子 {seed}：{points[-1][1]:.4f} 比特/字节", flush=True)
    return Curve(recipe, seed, points, statistics.median(speeds))


def call(script: str, *arguments: object) -> None:
    """Run a stage in a process of its own, on one thread."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} 失败：{(done.stderr.strip() or '没有输出').splitlines()[-1]}")


def summary(recipes: tuple[str, ...], curves: list[Curve]) -> list[list[str]]:
    """A row for each recipe: bits per byte at the end, spread, tokens to draw level with the first, speed."""
    by_recipe = {name: [c for c in curves if c.recipe == name] for name in recipes}
    goal = statistics.mean(c.points[-1][1] for c in by_recipe[recipes[0]])
    rows = []
    for name, runs in by_recipe.items():
        last = [c.points[-1][1] for c in runs]
        reached = [next((tokens for tokens, bits in c.points if bits <= goal), None) for c in runs]
        level = "–" if None in reached else f"{statistics.mean(reached) / 1e6:.2f}M"
        speed = statistics.median(c.speed for c in runs)
        spread = f"{min(last):.4f} – {max(last):.4f}"
        rows.append([name, f"{statistics.mean(last):.4f}", spread, level, f"{speed:,.0f}"])
    return rows


def draw(cfg: Config, curves: list[Curve], path: Path) -> None:
    """Bits per byte against tokens, one colour a recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    for number, name in enumerate(cfg.recipes):
        for i, curve in enumerate(c for c in curves if c.recipe == name):
            tokens, bits = zip(*curve.points, strict=True)
            label = None if i else name
            axis.plot([t / 1e6 for t in tokens], bits, f"C{number}o-", label=label, linewidth=1, markersize=3)
    axis.set_xlabel("million tokens")
    axis.set_ylabel("validation, bits per byte")
    axis.grid(alpha=0.3)
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


if __name__ == "__main__":
    run_stage(Config, main)
