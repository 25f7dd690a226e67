"""Curves of one or several runs, drawn from their `log.jsonl`: loss, learning rate, gradient norm, speed.

python -m training.plot out/pretrain
python -m training.plot out/a out/b out/c --out compare.png
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from stage import DEMO_OUT, ROOT, StageConfig, UserError, atomic_path, require, run_stage
from training.log import read_log

POINTS = 1000  # of a drawn line: more than the picture has pixels would only cost time
PICTURES = (".png", ".jpg", ".svg", ".pdf")
SMOOTHING = 60  # a smoothed point is the mean of 1/60 of the run

# Fonts with Chinese characters that systems come with, for names of runs; everything else is in English.
CHINESE_FONTS = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei")
CHINESE_FONTS += ("Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB")
CHINESE_FONTS += ("Noto Sans CJK JP", "Noto Serif CJK JP")  # the first of a .ttc with all languages


@dataclass
class Config(StageConfig):
    """画出一次或几次训练的曲线：损失、学习率、梯度范数与速度。"""

    runs: Positional[tuple[Path, ...]] = (ROOT / "out" / "pretrain",)  # 训练的 out 文件夹，一个或多个
    out: Path | None = None  # 图保存到哪里；默认：一次训练为它的 loss.png，几次为 out/compare.png

    DEMO = dict(runs=(DEMO_OUT / "pretrain",))
    INPUT = "runs"

    def has_input(self) -> bool:
        return all(run.exists() for run in self.runs)

    def check(self) -> None:
        suffix = self.out.suffix.lower() if self.out else ""
        require(suffix in ("", *PICTURES), "out", self.out, f"应以 {'、'.join(PICTURES)} 结尾")


@dataclass
class Curves:
    """A run: per figure the tokens (n,) at which it was logged, and its values (n,)."""

    label: str
    figures: dict[str, tuple[np.ndarray, np.ndarray]]


def main(cfg: Config) -> None:
    curves = [read_curves(run, label) for run, label in zip(cfg.runs, labels(cfg.runs), strict=True)]
    alone = cfg.runs[0] / "loss.png" if len(cfg.runs) == 1 and cfg.runs[0].is_dir() else None
    out = cfg.out or alone or ROOT / "out" / "compare.png"
    draw(curves, out)
    print(f"已保存 {out}")


def draw_run(out: Path) -> None:
    """Draw `loss.png` of the run in a folder, if it has logged anything yet."""
    try:
        curves = read_curves(out, out.name)
    except UserError:
        return
    draw([curves], out / "loss.png")


def read_curves(run: Path, label: str) -> Curves:
    """Read the log of a run: its folder, or the file itself. A step logged twice counts as it was last."""
    path = run / "log.jsonl" if run.is_dir() else run
    if not path.is_file():
        raise UserError(f"找不到训练日志 {path}；请给出训练的 out 文件夹。")
    figures: dict[str, dict[int, tuple[float, float]]] = {}
    for record in read_log(path):
        for name, value in record.items():
            if is_figure(value) and is_figure(record.get("tokens")):
                figures.setdefault(name, {})[record["step"]] = (record["tokens"], value)
    if "loss" not in figures and "val_loss" not in figures:
        raise UserError(f"训练日志 {path} 里还没有记录；训练满 --log_every 步之后再画。")
    points = {name: np.array(sorted(by_step.values()), dtype=float) for name, by_step in figures.items()}
    return Curves(label, {name: (xy[:, 0], xy[:, 1]) for name, xy in points.items()})


def is_figure(value: object) -> bool:
    """Whether something from a log is a number that can be drawn."""
    return isinstance(value, int | float) and abs(value) < 1e300  # false for NaN


def labels(runs: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart: what their paths do not have in common."""
    paths = [run.absolute() for run in runs]
    shared = os.path.commonpath(paths)
    names = [path.relative_to(shared).as_posix() for path in paths]
    return [path.name if name == "." else name for path, name in zip(paths, names, strict=True)]


def draw(curves: Sequence[Curves], out: Path) -> None:
    """Draw runs into a picture of four panels over the tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    names = drawable([run.label for run in curves])
    with plt.rc_context({"font.family": fonts()}):
        figure, axes = plt.subplots(
            4, 1, sharex=True, figsize=(9, 10), dpi=120, layout="constrained", height_ratios=(3, 1, 1, 1)
        )
        for number, (run, name) in enumerate(zip(curves, names, strict=True)):
            colour = f"C{number % 10}" if len(curves) <= 10 else plt.cm.turbo(number / (len(curves) - 1))
            draw_loss(axes[0], run, name, colour, alone=len(curves) == 1)
            for axis, key in zip(axes[1:], ("lr", "grad_norm", "tokens_per_second"), strict=True):
                if key in run.figures:
                    draw_smoothed(axis, *run.figures[key], colour, smooth=key != "lr")
        frame_loss(axes[0], curves)
        for axis, title in zip(
            axes[1:], ("learning rate", "gradient norm", "tokens per second"), strict=True
        ):
            axis.set_ylabel(title)
            axis.margins(x=0.07, y=0.1)
        axes[1].set_ylim(bottom=0)
        axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        use_log_scale(axes[2], curves)
        axes[3].set_ylim(bottom=0)
        axes[3].yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes[3].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes[3].set_xlabel("tokens")
        for axis in axes:
            axis.grid(alpha=0.3)
        figure.align_ylabels()
        with atomic_path(out) as temporary:
            figure.savefig(temporary, format=out.suffix[1:].lower() or "png")
        plt.close(figure)


def draw_loss(axis: Any, run: Curves, name: str, colour: Any, alone: bool) -> None:
    """Training loss as a line, validation loss as dots joined by a dashed one."""
    if "loss" in run.figures:
        draw_smoothed(axis, *run.figures["loss"], colour, label="training" if alone else name)
    if "val_loss" in run.figures:
        x, y = thin(*run.figures["val_loss"])
        x, y = x[np.isfinite(y)], y[np.isfinite(y)]
        label = "validation" if alone else None if "loss" in run.figures else name
        style = {"color": "C1" if alone else colour, "linestyle": "--", "linewidth": 1}
        axis.plot(x, y, marker="o", markersize=3 if len(x) < 100 else 1.5, label=label, **style)
        if len(x):
            axis.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), (5, -3), "data", "offset points", fontsize=8)


def frame_loss(axis: Any, curves: Sequence[Curves]) -> None:
    """Title, legend and range of the loss panel; the fall of the first 2 % of a long run may leave the picture."""
    values = []
    for run in curves:
        for key in ("loss", "val_loss"):
            y = run.figures.get(key, ((), np.empty(0)))[1]
            values.append(y[np.isfinite(y)][len(y) // 50 if len(y) >= 100 else 0 :])
    values = np.concatenate(values)
    if len(values):
        low, high = values.min(), values.max()
        margin = 0.05 * (high - low) or 0.1
        axis.set_ylim(low - margin, high + margin)
    axis.set_ylabel("loss (nats per token)")
    if len(curves) > 1:
        axis.set_title("solid: training    dots: validation", fontsize=9)
    axis.legend(fontsize=8, ncols=1 + len(curves) // 12)


def draw_smoothed(
    axis: Any, x: np.ndarray, y: np.ndarray, colour: Any, smooth: bool = True, label: str | None = None
) -> None:
    """A line; of a long and noisy run, its running mean over the faint values."""
    window = len(y) // SMOOTHING
    if not smooth or window < 2:
        axis.plot(*thin(x, y), color=colour, linewidth=1.2, label=label)
        return
    axis.plot(*envelope(x, y), color=colour, linewidth=0.5, alpha=0.25)
    axis.plot(*thin(x, running_mean(y, window)), color=colour, linewidth=1.4, label=label)


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values within window/2 on either side, (n,); shorter at the ends."""
    finite = np.isfinite(y)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, y, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    index = np.arange(len(y))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(y))
    with np.errstate(invalid="ignore"):  # nothing finite in the window: a gap in the line
        return (total[high] - total[low]) / (count[high] - count[low])


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every n-th point of a smooth line and its last, so that about POINTS are left."""
    kept = np.unique(np.append(np.arange(0, len(y), -(-len(y) // POINTS) or 1), len(y) - 1))
    return x[kept], y[kept]


def envelope(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest of every n neighbours of a noisy line, about POINTS in all: no spike is lost."""
    size = -(-2 * len(y) // POINTS)
    if size <= 2:
        return x, y
    starts = np.arange(0, len(y), size)
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return np.repeat(x[starts], 2), np.column_stack((low, high)).ravel()


def use_log_scale(axis: Any, curves: Sequence[Curves]) -> None:
    """Gradient norms that span more than a factor of 30 are read on a log scale."""
    values = np.concatenate([run.figures.get("grad_norm", ((), np.empty(0)))[1] for run in curves])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 30 * np.median(values):
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(bottom=0)


def short(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def fonts() -> list[str]:
    """Fonts to draw with: the default, then those with Chinese characters that are installed."""
    from matplotlib import font_manager, rcParams

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [*rcParams["font.family"], *(name for name in CHINESE_FONTS if name in installed)]


def drawable(names: Sequence[str]) -> list[str]:
    """Names of runs as the fonts can draw them: without a Chinese font, `run 1` for one that needs it."""
    if len(fonts()) > 1 or all(name.isascii() for name in names):
        return list(names)
    print("系统里没有中文字体：图例里用 run 1、run 2 …代替，顺序同命令行。")
    return [name if name.isascii() else f"run {number}" for number, name in enumerate(names, start=1)]


if __name__ == "__main__":
    run_stage(Config, main)
