"""Stage 4: instructions (sft_data/sft_data.csv) and a pretrained model -> a chat model (out/sft).

python sft.py --init out/pretrain
python sft.py --init Llama2-Chinese-92M.pth
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from dataset_sft import Sample, SftBatches, collate, read_samples, split_validation
from model import IGNORE, Transformer
from sources.aside import SetAside
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, need, require, run_stage
from training import checkpoint
from training import runtime as rt
from training.config import TrainConfig
from training.loop import train
from training.recipes import settle


@dataclass
class Config(TrainConfig):
    """指令微调：sft_data.csv 与预训练模型 -> out/sft。只有答案计算损失。"""

    data: Path = ROOT / "sft_data" / "sft_data.csv"  # 指令数据
    init: Path = ROOT / "out" / "pretrain"  # 从哪里开始：检查点文件夹，或原项目的 .pth
    tokenizer: Path | None = None  # 词表；默认用检查点里的（.pth 默认用 ChatGLM2 词表）
    n_heads: int | None = None  # 原项目 .pth 的注意力头数；公布过的规模不必填
    out: Path = ROOT / "out" / "sft"  # 检查点、日志与曲线保存到哪里
    valid_fraction: float = 0.01  # 留作验证的样本比例

    recipe: Literal["muon", "original"] = "original"  # 配方：没有写明的设置由它决定；微调沿用 AdamW
    lr: float | None = 2e-5  # 最大学习率
    min_lr: float | None = 1e-6  # 最终学习率
    weight_decay: float | None = 1e-4  # 权重衰减（只作用于矩阵）
    compile: bool | None = False  # 编译模型；批的长度各不相同，要反复编译，所以默认不用
    epochs: float = 2.0  # 训练几遍数据
    batch: int = 32  # 每步的样本数（所有进程合计）

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
        start = checkpoint.load(cfg.init, tokenizer=cfg.tokenizer, n_heads=cfg.n_heads)
        runtime.print(f"从 {start.path} 开始。")
        training, validation = load_data(cfg, start.tokenizer, start.model.args.max_seq_len, runtime)
        batches = SftBatches(training, cfg.batch, cfg.micro_batch, runtime.rank, runtime.world, cfg.seed)
        cfg = settle(cfg, cfg.total_steps(batches.steps_per_epoch), None)
        evaluate = make_evaluate(cfg, validation, runtime)
        train(cfg, runtime, start.model, start.tokenizer.files, batches, evaluate)


def load_data(
    cfg: Config, tokenizer: ChatGLMTokenizer, max_seq_len: int, runtime: rt.Runtime
) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; says how many rows could not be used and why."""
    aside = SetAside()
    samples = read_samples(cfg.data, tokenizer, max_seq_len, aside)
    training, validation = split_validation(samples, cfg.valid_fraction)
    if runtime.is_main:
        aside.show()
    if not samples:
        raise UserError(f"{cfg.data} 里没有可用的样本；请检查内容，或重新运行 python sft_data_process.py。")
    answers = sum(int(s.bears_loss.sum()) for s in training)
    runtime.print(f"训练 {len(training):,} 条（答案 {answers:,} 个 token），验证 {len(validation):,} 条。")
    return training, validation


def make_evaluate(
    cfg: Config, validation: list[Sample], runtime: rt.Runtime
) -> Callable[[Transformer], dict[str, float]]:
    """A function that measures the loss per answer token on the validation samples."""
    mine = sorted(validation, key=lambda s: len(s.ids))[runtime.rank :: runtime.world]

    def evaluate(model: Transformer) -> dict[str, float]:
        loss = tokens = 0.0
        for start in range(0, len(mine), cfg.micro_batch):
            mb = collate(mine[start : start + cfg.micro_batch])
            tokens += int((mb.targets != IGNORE).sum())
            mb = mb.to(runtime.device)
            loss += float(model(mb.tokens, mb.targets, reduction="sum", documents=mb.documents))
        loss, tokens = runtime.sum(loss, tokens)
        return {"val_loss": loss / tokens} if tokens else {}

    return evaluate


if __name__ == "__main__":
    run_stage(Config, main)
