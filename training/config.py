"""Settings that every training stage has; a stage adds its own."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stage import ROOT, StageConfig, require


@dataclass
class TrainConfig(StageConfig):
    out: Path = ROOT / "out"  # 检查点、日志与曲线保存到哪里
    resume: bool = False  # 从 out 里最新的检查点继续
    seed: int = 1337  # 随机种子（初始化与数据顺序）
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # 设备；auto 有显卡就用显卡
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # 计算精度；权重始终是 fp32
    compile: bool = False  # 用 torch.compile 编译模型（第一步较慢，之后更快）

    recipe: Literal["muon", "original"] = "muon"  # 配方：下面这些没有写明的设置由它决定（docs/recipe.md）
    optimizer: Literal["muon", "adamw"] | None = None  # 层内矩阵的优化器；其余参数总是 AdamW
    lr: float | None = None  # 层内矩阵的最大学习率
    table_lr: float | None = None  # 词嵌入、输出层和归一化权重的最大学习率
    min_lr: float | None = None  # 最终学习率（其他各组按同样的比例）
    warmup: int | None = None  # 学习率预热的步数；配方的预热至多占十分之一
    schedule: Literal["cosine", "wsd"] | None = None  # 余弦衰减，或先恒定后线性衰减（WSD）
    decay_fraction: float | None = None  # WSD：最后多大比例的步数用于衰减
    weight_decay: float | None = None  # 权重衰减（只作用于矩阵）
    beta1: float | None = None  # AdamW 的一阶动量系数
    beta2: float | None = None  # AdamW 的二阶动量系数
    clip: float | None = None  # 梯度范数裁剪；0 为不裁剪
    muon_steps: int = 5  # Muon 的 Newton-Schulz 迭代次数

    epochs: float = 1.0  # 训练几遍数据
    max_steps: int = 0  # 训练多少步；0 为由 epochs 决定
    micro_batch: int = 32  # 每个进程一次前向的样本数；显存不足就减小它，结果不变
    log_every: int = 10  # 每多少步记录一行
    eval_every: int = 500  # 每多少步在验证集上评估；0 为只在结束时
    save_every: int = 500  # 每多少步保存检查点
    keep_last: int = 2  # 保留最近几个检查点

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        for name in ("lr", "table_lr", "epochs"):
            self.require(name, lambda v: 0 < v < 1e9, "必须大于 0")
        for name in ("micro_batch", "log_every", "save_every", "keep_last", "muon_steps"):
            self.require(name, lambda v: v >= 1, "至少为 1")
        for name in ("warmup", "max_steps", "eval_every", "weight_decay", "clip", "min_lr"):
            self.require(name, lambda v: v >= 0, "不能小于 0")
        for name in ("beta1", "beta2"):
            self.require(name, lambda v: 0 <= v < 1, "在 0 与 1 之间")
        self.require("decay_fraction", lambda v: 0 < v <= 1, "在 0 与 1 之间")
        self.require("seed", lambda v: 0 <= v < 2**31, "在 0 与 2147483647 之间")
        if self.lr is not None:
            self.require("min_lr", lambda v: v <= self.lr, f"应不大于 --lr {self.lr}")

    def require(self, name: str, holds: Callable[[float], bool], condition: str) -> None:
        """Raise UserError unless a setting is as it must be or left open."""
        value = getattr(self, name)
        require(value is None or holds(value), name, value, condition)
