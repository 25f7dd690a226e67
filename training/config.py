"""Settings that every training stage has; a stage adds its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stage import ROOT, StageConfig, require
from training.hardware import parse_hardware
from training.trackers import check_installed

TrackerName = Literal["tensorboard", "wandb", "swanlab"]


@dataclass
class TrainConfig(StageConfig):
    out: Path = ROOT / "out"  # 检查点、日志与曲线保存到哪里
    resume: bool = False  # 从 out 里最新的检查点继续
    seed: int = 1337  # 随机种子（初始化与数据顺序）
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # 设备；auto 有显卡就用显卡
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # 计算精度；权重始终是 fp32
    shard: bool = False  # 多卡时把权重、梯度、优化器状态切分到各卡（FSDP），用于一张卡放不下的模型
    timeout: float = 10.0  # 多卡时一个进程最多等其他进程多少分钟
    deterministic: bool = False  # 只用结果可逐位重现的算法（显卡上稍慢）
    compile: bool | None = None  # 用 torch.compile 编译模型（第一步较慢，之后更快）；默认显卡上编译
    recompute: bool = False  # 反向时重算每一层，不保存中间结果：省显存，慢约三分之一

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
    muon_steps: int = 3  # Muon 的 Newton-Schulz 迭代次数

    epochs: float = 1.0  # 训练几遍数据
    max_steps: int = 0  # 训练多少步；0 为由 epochs 决定
    micro_batch: int = 32  # 每个进程一次前向的样本数；显存不足就减小它，结果不变
    log_every: int = 10  # 每多少步记录一行
    eval_every: int = 500  # 每多少步在验证集上评估；0 为只在结束时
    save_every: int = 500  # 每多少步保存检查点
    keep_last: int = 2  # 保留最近几个检查点
    keep_every: int = 0  # 步数是它倍数的检查点永久保留；0 为不额外保留
    async_save: bool | None = None  # 在后台写检查点（主机内存多占每参数 12 字节）；默认显卡上是、CPU 上否
    sample_every: int = 500  # 每多少步让模型续写几个开头；0 为从不

    max_skipped: int = 5  # 损失或梯度不是有限数的步会被跳过；连续这么多步就停止
    spike: float = 8.0  # 损失比最近的中位数高出多少个标准差算作尖峰；0 为不检测
    spike_window: int = 128  # 与最近多少步的损失比较
    on_spike: Literal["warn", "rollback"] = "warn"  # 遇到持续的尖峰：只警告，或退回之前的检查点并跳过那些数据
    hang_timeout: float = 30.0  # 多少分钟没有完成一步就结束进程（torchrun 会重启它）；0 为不检查

    track: tuple[TrackerName, ...] = ()  # 除 log.jsonl 外还记录到哪些工具（需先 pip install 它）

    estimate: bool = False  # 只估算要多少内存、时间、电与钱，然后退出
    hardware: tuple[str, ...] = ()  # 估算哪些显卡，如 "4090 x4"；默认为常见的几种，all 为全部
    price: float = 0.0  # 每张显卡每小时的价格，用来估算费用；0 为不估算
    mfu: float = 0.4  # 估算用时所假设的利用率（MFU）；训练时日志里是实测值

    def total_steps(self, steps_per_epoch: float) -> int:
        """How many steps the run has."""
        return self.max_steps or math.ceil(self.epochs * steps_per_epoch)

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        for name in ("lr", "table_lr", "epochs", "timeout"):
            self.require(name, lambda v: 0 < v < 1e9, "必须大于 0")
        for name in ("micro_batch", "log_every", "save_every", "keep_last", "muon_steps", "max_skipped"):
            self.require(name, lambda v: v >= 1, "至少为 1")
        for name in ("warmup", "max_steps", "eval_every", "weight_decay", "clip", "min_lr", "keep_every"):
            self.require(name, lambda v: v >= 0, "不能小于 0")
        for name in ("sample_every", "spike", "hang_timeout", "price"):
            self.require(name, lambda v: 0 <= v < 1e9, "不能小于 0")
        for name in ("beta1", "beta2"):
            self.require(name, lambda v: 0 <= v < 1, "在 0 与 1 之间")
        for name in ("decay_fraction", "mfu"):
            self.require(name, lambda v: 0 < v <= 1, "在 0 与 1 之间")
        self.require("spike_window", lambda v: v >= 8, "至少为 8")
        self.require("seed", lambda v: 0 <= v < 2**31, "在 0 与 2147483647 之间")
        if self.lr is not None:
            self.require("min_lr", lambda v: v <= self.lr, f"应不大于 --lr {self.lr}")
        for hardware in self.hardware:
            _ = hardware == "all" or parse_hardware(hardware)
        check_installed(self.track)

    def require(self, name: str, holds: Callable[[float], bool], condition: str) -> None:
        """Raise UserError unless a setting is as it must be or left open."""
        value = getattr(self, name)
        require(value is None or holds(value), name, value, condition)
