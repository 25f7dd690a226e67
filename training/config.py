"""Settings that every training stage has; a stage adds its own."""

import math
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
    compile: bool = False  # 用 torch.compile 编译模型（第一步较慢，之后更快）

    lr: float = 3e-4  # 最大学习率
    min_lr: float = 1e-5  # 最终学习率
    warmup: int = 1000  # 学习率预热的步数
    schedule: Literal["cosine", "wsd"] = "cosine"  # 余弦衰减，或先恒定后线性衰减（WSD）
    decay_fraction: float = 0.2  # WSD：最后多大比例的步数用于衰减
    weight_decay: float = 0.1  # 权重衰减（只作用于矩阵）
    beta1: float = 0.9  # AdamW 的一阶动量系数
    beta2: float = 0.95  # AdamW 的二阶动量系数
    clip: float = 1.0  # 梯度范数裁剪；0 为不裁剪

    epochs: float = 1.0  # 训练几遍数据
    max_steps: int = 0  # 训练多少步；0 为由 epochs 决定
    micro_batch: int = 32  # 每个进程一次前向的样本数；显存不足就减小它，结果不变
    log_every: int = 10  # 每多少步记录一行
    eval_every: int = 500  # 每多少步在验证集上评估；0 为只在结束时
    save_every: int = 500  # 每多少步保存检查点
    keep_last: int = 2  # 保留最近几个检查点
    keep_every: int = 0  # 步数是它倍数的检查点永久保留；0 为不额外保留
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
    async_save: bool | None = None  # 在后台写检查点（主机内存多占每参数 12 字节）；默认显卡上是、CPU 上否

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        for name in ("lr", "epochs", "timeout"):
            require(0 < getattr(self, name) < 1e9, name, getattr(self, name), "必须大于 0")
        for name in ("micro_batch", "log_every", "save_every", "keep_last", "max_skipped"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "至少为 1")
        for name in ("warmup", "max_steps", "eval_every", "weight_decay", "clip", "min_lr", "keep_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "不能小于 0")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, name, getattr(self, name), "在 0 与 1 之间")
        for name in ("sample_every", "spike", "hang_timeout", "price"):
            require(0 <= getattr(self, name) < 1e9, name, getattr(self, name), "不能小于 0")
        require(0 < self.mfu <= 1, "mfu", self.mfu, "在 0 与 1 之间")
        for hardware in self.hardware:
            _ = hardware == "all" or parse_hardware(hardware)
        check_installed(self.track)
        require(self.spike_window >= 8, "spike_window", self.spike_window, "至少为 8")
        require(0 < self.decay_fraction <= 1, "decay_fraction", self.decay_fraction, "在 0 与 1 之间")
        require(0 <= self.seed < 2**31, "seed", self.seed, "在 0 与 2147483647 之间")
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"应不大于 --lr {self.lr}")
