"""Stage 2: tokens (data/*.bin) -> a pretrained model (out/pretrain).

python pretrain.py --model 92M
torchrun --standalone --nproc_per_node=4 pretrain.py --model 218M
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from dataset import PretrainBatches, TokenWindows, read_sidecar
from model import PRESETS, ModelArgs, Transformer
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, need, require, run_stage
from training import runtime as rt
from training.config import TrainConfig
from training.loop import train
from training.recipes import choose_batch


@dataclass
class Config(TrainConfig):
    """预训练：token 文件 -> out/pretrain。"""

    data: tuple[Path, ...] = (ROOT / "data" / "pretrain_data.bin",)  # 一个或多个 token 文件
    valid: Path = ROOT / "data" / "valid_data.bin"  # 验证用的 token 文件
    tokenizer: Path | None = None  # 词表；默认为 token 文件记录的那个，没有记录则为 ChatGLM2
    out: Path = ROOT / "out" / "pretrain"  # 检查点、日志与曲线保存到哪里

    model: Literal["demo", "92M", "218M", "500M", "1B"] = "92M"  # 参考规模；下面几项可以覆盖它
    dim: int | None = None  # 模型宽度
    n_layers: int | None = None  # 层数
    n_heads: int | None = None  # 注意力头数
    n_kv_heads: int | None = None  # 键值头数（少于 n_heads 即分组查询注意力）
    max_seq_len: int | None = None  # 上下文长度，也是训练窗口的长度
    dropout: float | None = None  # 随机失活
    tie_embeddings: bool = True  # 输出层与词嵌入共用一个矩阵

    batch_tokens: int | None = (
        None  # 每步的 token 数（所有进程合计），默认由 --recipe 和数据量决定；放不下就累积梯度
    )
    eval_tokens: int = 1_000_000  # 验证最多用多少 token（每次都是同一批）

    DEMO = dict(
        data=(DEMO_DIR / "pretrain_data.bin",),
        valid=DEMO_DIR / "valid_data.bin",
        out=DEMO_OUT / "pretrain",
        model="demo",
        micro_batch=16,
        epochs=1,
        eval_every=100,
        save_every=100,
        eval_tokens=30_000,
    )
    INPUT = "data"

    def check(self) -> None:
        super().check()
        require(len(self.data) > 0, "data", "空", "至少要有一个文件")
        self.require("batch_tokens", lambda v: v >= 1, "至少为 1")
        require(self.eval_tokens >= 1, "eval_tokens", self.eval_tokens, "至少为 1")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "不小于 0 且小于 1")

    def has_input(self) -> bool:
        return all(path.exists() for path in self.data)


def main(cfg: Config) -> None:
    if cfg.demo and rt.is_first_process():
        need(cfg.data[0], "data_process.py", cfg)
    with rt.start(cfg.device, cfg.precision, cfg.seed) as runtime:
        for path in cfg.data:
            need(path, "data_process.py", cfg)
        tokenizer = ChatGLMTokenizer(cfg.tokenizer or recorded_tokenizer(cfg.data[0]))
        args = model_args(cfg, tokenizer)
        windows = TokenWindows(cfg.data, args.max_seq_len, tokenizer)
        data_tokens = cfg.epochs * len(windows) * args.max_seq_len
        batch_tokens = cfg.batch_tokens or choose_batch(cfg.recipe, data_tokens, args.max_seq_len)
        batch = max(runtime.world, batch_tokens // args.max_seq_len)
        batches = PretrainBatches(windows, batch, cfg.micro_batch, runtime.rank, runtime.world, cfg.seed)
        evaluate = make_evaluate(cfg, args, tokenizer, runtime)
        train(cfg, runtime, Transformer(args), tokenizer.content, batches, evaluate)


def recorded_tokenizer(data: Path) -> Path:
    """The vocabulary that a token file was made with; ChatGLM2's for a published file, which does not say."""
    recorded = read_sidecar(data).get("tokenizer", {}).get("path")
    return Path(recorded) if recorded else CHATGLM2


def model_args(cfg: Config, tokenizer: ChatGLMTokenizer) -> ModelArgs:
    """The preset's shape with what the settings override."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "dropout")
    chosen = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    shape = PRESETS[cfg.model] | chosen
    try:
        return ModelArgs(vocab_size=tokenizer.vocab_size, tie_embeddings=cfg.tie_embeddings, **shape)
    except ValueError as error:
        raise UserError(f"模型形状不成立：{error}") from error


def make_evaluate(
    cfg: Config, args: ModelArgs, tokenizer: ChatGLMTokenizer, runtime: rt.Runtime
) -> Callable[[Transformer], dict[str, float]]:
    """A function that measures loss (nats per token) and bits per byte on fixed windows of cfg.valid."""
    needed = 2 * (args.max_seq_len + 1)  # bytes of a window of uint16
    if not cfg.valid.exists() or cfg.valid.stat().st_size < needed:
        runtime.print(f"没有验证文件 {cfg.valid}，或它不足一个窗口：不做验证。")
        return lambda model: {}
    windows = TokenWindows([cfg.valid], args.max_seq_len, tokenizer)
    count = max(1, min(len(windows), cfg.eval_tokens // args.max_seq_len))
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)[runtime.rank :: runtime.world]
    sizes, eos = tokenizer.bytes_per_token(), tokenizer.special_tokens["<eos>"]

    def evaluate(model: Transformer) -> dict[str, float]:
        loss = tokens = size = 0.0
        for start in range(0, len(chosen), cfg.micro_batch):
            x, y = windows.read(chosen[start : start + cfg.micro_batch])
            loss += float(model(x.to(runtime.device), y.to(runtime.device), reduction="sum"))
            tokens += y.numel()
            # The first piece of a document carries a space that is not in the text.
            size += sizes[y.numpy()].sum() - int((x == eos).sum())
        loss, tokens, size = runtime.sum(loss, tokens, size)
        return {"val_loss": loss / tokens, "val_bpb": loss / math.log(2) / max(1.0, size)}

    return evaluate


if __name__ == "__main__":
    run_stage(Config, main)
