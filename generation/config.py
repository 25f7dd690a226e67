"""What the scripts that use a finished model share: its settings, loading it, and how answers are drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from generation.prepare import Precision, Quantise, prepare
from generation.sampling import Sampling
from stage import ROOT, StageConfig, require
from training import checkpoint
from training.runtime import choose_device


@dataclass
class InferenceConfig(StageConfig):
    model: Path = ROOT / "out"  # 检查点文件夹（取其中最新的），或原项目的 .pth
    tokenizer: Path | None = None  # 词表；默认用检查点里的（.pth 默认用 ChatGLM2 词表）
    n_heads: int | None = None  # 原项目 .pth 的注意力头数；公布过的规模不必填
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # 设备；auto 有显卡就用显卡
    precision: Precision = "auto"  # 权重与计算的精度；auto：硬件擅长 bf16 就用，否则 fp32
    quantise: Quantise | None = None  # 权重量化为 8 或 4 位整数：更快更省内存，困惑度略升
    threads: int | None = None  # CPU 线程数；默认由 torch 决定，机器忙时少些更快
    max_new_tokens: int = 128  # 最多生成多少 token
    temperature: float = 0.0  # 0 总取最可能的 token；越大越随机
    top_k: int | None = None  # 只在最可能的 k 个里抽样
    top_p: float | None = None  # 只在累计概率达到 p 的最可能的几个里抽样
    min_p: float | None = None  # 不取概率低于最可能者 min_p 倍的 token
    repetition_penalty: float = 1.0  # 大于 1 抑制重复
    presence_penalty: float = 0.0  # 大于 0：回答里出现过的 token 不易再出现
    frequency_penalty: float = 0.0  # 大于 0：出现越多次越不易再出现
    stop: tuple[str, ...] = ()  # 生成到这些字符串之前为止
    seed: int | None = None  # 抽样的随机种子
    INPUT = "model"

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        require(self.n_heads is None or self.n_heads >= 1, "n_heads", self.n_heads, "至少为 1")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "至少为 1")
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "至少为 1")
        is_usable = self.temperature == 0 or 1e-4 <= self.temperature <= 1e4
        require(is_usable, "temperature", self.temperature, "为 0，或在 0.0001 与 10000 之间")
        penalty = self.repetition_penalty
        require(0.01 <= penalty <= 100, "repetition_penalty", penalty, "在 0.01 与 100 之间")
        require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "至少为 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "大于 0，且不超过 1")
        require(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "在 0 与 1 之间")
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= 100, name, getattr(self, name), "在 -100 与 100 之间")
        require(all(self.stop), "stop", self.stop, "不能有空字符串")
        require(self.seed is None or 0 <= self.seed < 2**31, "seed", self.seed, "在 0 与 2147483647 之间")

    def sampling(self) -> Sampling:
        """How answers are drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop,
        )

    def load(self) -> checkpoint.Checkpoint:
        """The model, ready to generate, with its vocabulary."""
        if self.threads:
            torch.set_num_threads(self.threads)
        loaded = checkpoint.load(self.model, choose_device(self.device), self.tokenizer, self.n_heads)
        count = loaded.model.num_params() / 1e6
        prepare(loaded.model, self.precision, self.quantise)
        kind = self.quantise or str(loaded.model.tok_embeddings.weight.dtype).removeprefix("torch.")
        print(f"模型：{loaded.path}（参数 {count:.2f}M，{kind}）", flush=True)
        return loaded
