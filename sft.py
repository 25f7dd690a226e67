"""Stage 4: instructions (sft_data/sft_data.csv) and a pretrained model -> a chat model (out/sft).

python sft.py --init out/pretrain
python sft.py --init Llama2-Chinese-92M.pth
python sft.py --init out/pretrain --lora          # adapters alone (docs/lora.md)
python sft.py --init Llama-3.2-1B-Instruct --max_seq_len 2048     # a Hugging Face folder
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from chatglm_tokenizer.base import Tokenizer
from dataset_sft import SftBatches, collate, pack, row_length
from dataset_sft_tokens import Samples, load_samples, split_validation
from model import IGNORE, Transformer
from sources.aside import SetAside
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, need, require, run_stage
from training import checkpoint
from training import runtime as rt
from training.config import TrainConfig
from training.context import ContextConfig
from training.loop import train
from training.lora import LoraConfig, prepare, with_rate
from training.recipes import settle


@dataclass
class Config(LoraConfig, ContextConfig, TrainConfig):
    """指令微调：sft_data.csv 与预训练模型 -> out/sft。只有答案计算损失。"""

    data: Path = ROOT / "sft_data" / "sft_data.csv"  # 指令数据
    init: Path = ROOT / "out" / "pretrain"  # 从哪里开始：检查点、Hugging Face 模型文件夹，或原项目的 .pth
    tokenizer: Path | None = None  # 词表；默认用检查点里的（.pth 默认用 ChatGLM2 词表）
    n_heads: int | None = None  # 原项目 .pth 的注意力头数；公布过的规模不必填
    out: Path = ROOT / "out" / "sft"  # 检查点、日志与曲线保存到哪里
    valid_fraction: float = 0.01  # 留作验证的样本比例

    recipe: Literal["muon", "original"] = "original"  # 配方：没有写明的设置由它决定；微调沿用 AdamW
    lr: float | None = None  # 最大学习率；默认 2e-5，训练适配器时 2e-4
    min_lr: float | None = 1e-6  # 最终学习率
    weight_decay: float | None = 1e-4  # 权重衰减（只作用于矩阵）
    epochs: float = 2.0  # 训练几遍数据
    batch: int = 32  # 每步的样本数（所有进程合计；装箱时是平均数）
    pack: bool = True  # 装箱：几条样本拼成一行，互不可见，不浪费算力；否则一行一条，长度相近的放在一起
    micro_batch: int = 32  # 每个进程一次前向的行数；显存不足就减小它，结果不变

    DEMO = dict(
        data=DEMO_DIR / "sft_data.csv",
        init=DEMO_OUT / "pretrain",
        out=DEMO_OUT / "sft",
        lr=1e-3,
        min_lr=1e-5,
        warmup=30,
        schedule="wsd",
        decay_fraction=0.5,
        epochs=2,
        batch=64,
        micro_batch=64,
        eval_every=0,
        save_every=200,
    )
    INPUT = "data"

    def check(self) -> None:
        super().check()
        require(self.n_heads is None or self.n_heads >= 1, "n_heads", self.n_heads, "至少为 1")
        require(self.batch >= 1, "batch", self.batch, "至少为 1")
        require(0 <= self.valid_fraction < 1, "valid_fraction", self.valid_fraction, "不小于 0 且小于 1")


def main(cfg: Config) -> None:
    if cfg.demo and rt.is_first_process():
        need(cfg.data, "sft_data_process.py", cfg)
        need(cfg.init, "pretrain.py", cfg)
    with rt.start(cfg.device, cfg.precision, cfg.seed, cfg.timeout, cfg.deterministic) as runtime:
        start = checkpoint.load(cfg.init, tokenizer=cfg.tokenizer, n_heads=cfg.n_heads, change=cfg.extend)
        runtime.print(f"从 {start.path} 开始。")
        training, validation = load_data(cfg, start.tokenizer, start.model.args.max_seq_len, runtime)
        row = row_length(training, start.model.args.max_seq_len) if cfg.pack else None
        place = runtime.rank, runtime.world
        batches = SftBatches(training, cfg.batch, cfg.micro_batch, *place, cfg.seed, row)
        if cfg.compile is None and not cfg.pack:  # every batch has another shape
            cfg = replace(cfg, compile=False)
        cfg = settle(with_rate(cfg, 2e-5), cfg.total_steps(batches.steps_per_epoch), None)
        prepare(start.model, cfg, runtime, start.path)
        evaluate = make_evaluate(cfg, validation, runtime, start.model.args.max_seq_len)
        train(cfg, runtime, start.model, start.tokenizer.files, batches, evaluate)


def load_data(
    cfg: Config, tokenizer: Tokenizer, max_seq_len: int, runtime: rt.Runtime
) -> tuple[Samples, Samples]:
    """Training and validation samples; says how many rows could not be used and why."""
    aside = SetAside()
    samples = load_samples(cfg.data, tokenizer, max_seq_len, aside, runtime.main_first)
    training, validation = split_validation(samples, cfg.valid_fraction)
    if runtime.is_main:
        aside.show()
    if not len(samples):
        raise UserError(f"{cfg.data} 里没有可用的样本；请检查内容，或重新运行 python sft_data_process.py。")
    if samples.cut:
        what = "去掉了最早的几轮，或截短了答案的末尾"
        runtime.print(f"{samples.cut:,} 条样本超过 {max_seq_len} 个 token：{what}。")
    answers = int(training.labels.sum())
    runtime.print(f"训练 {len(training):,} 条（答案 {answers:,} 个 token），验证 {len(validation):,} 条。")
    return training, validation


def make_evaluate(
    cfg: Config, validation: Samples, runtime: rt.Runtime, max_seq_len: int
) -> Callable[[Transformer], dict[str, float]]:
    """A function that measures the loss per answer token on the validation samples, packed as full as it gets."""
    length = row_length(validation, max_seq_len)
    rows = pack(validation.lengths - 1, np.arange(len(validation)), length)
    mine = rows[runtime.rank :: runtime.world]

    def evaluate(model: Transformer) -> dict[str, float]:
        loss = tokens = 0.0
        for start in range(0, len(mine), cfg.micro_batch):
            part = [[validation[i] for i in row] for row in mine[start : start + cfg.micro_batch]]
            mb = collate(part, length)
            tokens += int((mb.targets != IGNORE).sum())
            mb = mb.to(runtime.device)
            sums = dict(reduction="sum", documents=mb.documents, labelled=mb.labelled)
            loss += float(model(mb.tokens, mb.targets, **sums))
        loss, tokens = runtime.sum(loss, tokens)
        return {"val_loss": loss / tokens} if tokens else {}

    return evaluate


if __name__ == "__main__":
    run_stage(Config, main)
