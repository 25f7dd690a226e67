"""Stage 2: tokens (data/*.bin) -> a pretrained model (out/pretrain).

python pretrain.py --model 92M
torchrun --standalone --nproc_per_node=4 pretrain.py --model 218M
python pretrain.py --init Llama-3.2-1B --max_seq_len 2048    # continue a trained model, ours or Hugging Face's
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2
from dataset import PretrainBatches, TokenWindows, open_tokens, read_sidecar
from dataset_fit import FittedWindows, build_indices
from generation.batch import generate
from generation.sampling import Sampling
from model import PRESETS, ModelArgs, Transformer
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, need, require, run_stage
from training import checkpoint
from training import runtime as rt
from training.config import TrainConfig
from training.context import ContextConfig, changed
from training.loop import train
from training.lora import LoraConfig, prepare, with_rate
from training.mixture import Phase, whole_weights
from training.recipes import choose_batch, settle

SHAPE = ("dim", "n_layers", "n_kv_heads")  # of a new model; a trained one has them
SAMPLES, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 12, 40  # documents that are continued, from how much, by how much


@dataclass
class Config(LoraConfig, ContextConfig, TrainConfig):
    """预训练：token 文件 -> out/pretrain。"""

    data: tuple[Path, ...] = (ROOT / "data" / "pretrain_data.bin",)  # 一个或多个 token 文件
    weights: tuple[float, ...] = ()  # 各文件在训练 token 中的份额，如 2 1；默认与文件大小成正比
    anneal_weights: tuple[float, ...] = ()  # 训练末段改用的份额（多用好语料）；默认不变
    anneal_fraction: float | None = None  # 末段占总步数的比例；默认与 decay_fraction 相同
    windows: Literal["plain", "fit"] = "plain"  # 窗口：首尾相接，或尽量不截断文档（先为每个文件建索引）
    document_mask: bool = False  # 同一窗口里的各篇文档互不可见，位置各自从 0 算起
    valid: Path = ROOT / "data" / "valid_data.bin"  # 验证用的 token 文件
    tokenizer: Path | None = None  # 词表；默认为 token 文件记录的那个，没有记录则为 ChatGLM2
    out: Path = ROOT / "out" / "pretrain"  # 检查点、日志与曲线保存到哪里

    init: Path | None = None  # 继续训练这个模型：检查点、Hugging Face 模型文件夹或 .pth；形状和词表都沿用它的
    model: Literal["demo", "92M", "218M", "500M", "1B"] | None = (
        None  # 新模型的规模，默认 92M；下几项可覆盖它
    )
    dim: int | None = None  # 模型宽度
    n_layers: int | None = None  # 层数
    n_heads: int | None = None  # 注意力头数；也用于 --init 的 .pth，公布过的规模不必填
    n_kv_heads: int | None = None  # 键值头数（少于 n_heads 即分组查询注意力）
    max_seq_len: int | None = None  # 上下文长度，也是训练窗口的长度；默认为模型原来的
    dropout: float | None = None  # 随机失活
    tie_embeddings: bool = True  # 输出层与词嵌入共用一个矩阵（--init 的模型保持原样）
    # 配方：没有写明的设置由它决定；默认 muon，有 --init 时为 continued（docs/recipe.md）
    recipe: Literal["muon", "original", "continued"] | None = None

    batch_tokens: int | None = None  # 每步的 token 数（所有进程合计）；默认由 --recipe 和数据量决定
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
        sample_every=100,
        eval_tokens=30_000,
    )
    INPUT = "data"

    def check(self) -> None:
        super().check()
        require(len(self.data) > 0, "data", "空", "至少要有一个文件")
        self.check_mixture()
        self.check_init()
        self.require("batch_tokens", lambda v: v >= 1, "至少为 1")
        require(self.eval_tokens >= 1, "eval_tokens", self.eval_tokens, "至少为 1")
        require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "不小于 0 且小于 1")

    def check_init(self) -> None:
        """Raise UserError for a shape beside a model that has one."""
        if not self.init and (self.adapts or self.train_layers or self.neftune):
            raise UserError(
                "--lora、--qlora、--train_layers 和 --neftune 用于已有的模型：请同时指定 --init。"
            )
        given = [name for name in ("model", *SHAPE) if getattr(self, name) is not None and not self.demo]
        if self.init and given:
            raise UserError(f"--{given[0]} 不能与 --init 同用：模型的形状沿用 {self.init} 的。")

    def check_mixture(self) -> None:
        """Raise UserError for shares that cannot be drawn."""
        for name in ("weights", "anneal_weights"):
            weights = getattr(self, name)
            require(
                len(weights) in (0, len(self.data)),
                name,
                weights,
                f"要与 --data 的 {len(self.data)} 个文件一一对应",
            )
            usable = not weights or (all(0 <= w < 1e9 for w in weights) and sum(weights) > 0)
            require(usable, name, weights, "不能为负，且不能全为 0")
        fraction = self.anneal_fraction
        require(fraction is None or 0 < fraction < 1, "anneal_fraction", fraction, "大于 0 且小于 1")
        require(
            fraction is None or self.anneal_weights, "anneal_fraction", fraction, "要与 --anneal_weights 同用"
        )
        for path, *shares in zip(self.data, *filter(None, (self.weights, self.anneal_weights)), strict=True):
            require(
                not self.weights or any(shares), "weights", self.weights, f"使 {path} 从不被读到：请去掉它"
            )

    def has_input(self) -> bool:
        return all(path.exists() for path in self.data)


def main(cfg: Config) -> None:
    if cfg.demo and rt.is_first_process():
        need(cfg.data[0], "data_process.py", cfg)
    with rt.start(cfg.device, cfg.precision, cfg.seed, cfg.timeout, cfg.deterministic) as runtime:
        for path in cfg.data:
            need(path, "data_process.py", cfg)
        cfg = replace(cfg, recipe=cfg.recipe or ("continued" if cfg.init else "muon"))
        model, tokenizer = load_model(cfg) if cfg.init else new_model(cfg)
        if cfg.init:
            runtime.print(f"从 {cfg.init} 继续预训练。")
        args = model.args
        windows = open_windows(cfg, args.max_seq_len, tokenizer, runtime)
        batch = batch_size(cfg, len(windows), args.max_seq_len, runtime.world)
        total = cfg.total_steps(len(windows) / batch)
        cfg = settle(with_rate(cfg), total, batch * args.max_seq_len)
        batches = PretrainBatches(
            windows,
            batch,
            cfg.micro_batch,
            runtime.rank,
            runtime.world,
            cfg.seed,
            phases(cfg, windows, total),
        )
        runtime.print(batches.plan(total))
        if cfg.init:
            prepare(model, cfg, runtime, checkpoint.find(cfg.init))
        evaluate = make_evaluate(cfg, args, tokenizer, runtime)
        sample = make_sample(cfg, tokenizer, runtime)
        train(cfg, runtime, model, tokenizer.files, batches, evaluate, sample)


def load_model(cfg: Config) -> tuple[Transformer, Tokenizer]:
    """The model that is trained on, with its context and dropout as the settings say, and its vocabulary."""

    def change(args: ModelArgs) -> ModelArgs:
        args = cfg.extend(args)
        return args if cfg.dropout is None else changed(args, dropout=cfg.dropout)

    weights = not cfg.estimate  # an estimate needs the shape alone
    start = checkpoint.load(cfg.init, "cpu", cfg.tokenizer, cfg.n_heads, change, weights)
    return start.model, start.tokenizer


def new_model(cfg: Config) -> tuple[Transformer, Tokenizer]:
    """A model of the preset's shape with what the settings override, and the vocabulary of the data."""
    tokenizer = load_tokenizer(cfg.tokenizer or recorded_tokenizer(cfg.data[0]))
    names = (*SHAPE, "n_heads", "dropout")
    chosen = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    shape = cfg.of_new_model(PRESETS[cfg.model or "92M"] | chosen)
    try:
        args = ModelArgs(vocab_size=tokenizer.vocab_size, tie_embeddings=cfg.tie_embeddings, **shape)
    except ValueError as error:
        raise UserError(f"模型形状不成立：{error}") from error
    with torch.device("meta" if cfg.estimate else "cpu"):
        return Transformer(args), tokenizer


def recorded_tokenizer(data: Path) -> Path:
    """The vocabulary that a token file was made with; ChatGLM2's for a published file, which does not say."""
    recorded = read_sidecar(data).get("tokenizer", {}).get("path")
    return Path(recorded) if recorded else CHATGLM2


def open_windows(cfg: Config, seq_len: int, tokenizer: Tokenizer, runtime: rt.Runtime) -> TokenWindows:
    """The windows of the token files; those that cut few documents need an index, which the main process makes."""
    windows = TokenWindows(cfg.data, seq_len, tokenizer, cfg.document_mask)
    if cfg.windows == "plain":
        return windows
    runtime.main_first(lambda: build_indices(windows, tokenizer.special_tokens["<eos>"]))
    return FittedWindows(cfg.data, seq_len, tokenizer, cfg.document_mask)


def batch_size(cfg: Config, windows: int, seq_len: int, world: int) -> int:
    """Windows of a step over all processes: as --batch_tokens says, or the recipe for a run over this much data."""
    if cfg.batch_tokens is not None:
        return max(world, cfg.batch_tokens // seq_len)
    return max(world, choose_batch(cfg.recipe, cfg.epochs * windows * seq_len, seq_len))


def phases(cfg: Config, windows: TokenWindows, total: int) -> list[Phase]:
    """The shares of the files from the first step on, and for the last steps of `total` if they change."""
    for path, count in zip(cfg.data, windows.counts, strict=True):
        if not count and (cfg.weights or cfg.anneal_weights):
            raise UserError(f"{path} 不足一个窗口，不能指定份额；请去掉它，或减小 --max_seq_len。")
    found = [Phase(0, whole_weights(cfg.weights or windows.counts))]
    if cfg.anneal_weights:
        fraction = cfg.decay_fraction if cfg.anneal_fraction is None else cfg.anneal_fraction
        found.append(Phase(total - max(1, round(fraction * total)), whole_weights(cfg.anneal_weights)))
    return found


def make_evaluate(
    cfg: Config, args: ModelArgs, tokenizer: Tokenizer, runtime: rt.Runtime
) -> Callable[[Transformer], dict[str, float]]:
    """A function that measures loss (nats per token) and bits per byte on fixed windows of cfg.valid."""
    width = np.dtype(read_sidecar(cfg.valid).get("dtype", "uint16")).itemsize  # bytes of a token
    if not cfg.valid.exists() or cfg.valid.stat().st_size < width * (args.max_seq_len + 1):
        runtime.print(f"没有验证文件 {cfg.valid}，或它不足一个窗口：不做验证。")
        return lambda model: {}
    windows = TokenWindows([cfg.valid], args.max_seq_len, tokenizer, cfg.document_mask)
    count = max(1, min(len(windows), cfg.eval_tokens // args.max_seq_len))
    chosen = np.linspace(0, len(windows) - 1, count).astype(np.int64)[runtime.rank :: runtime.world]
    sizes, eos = tokenizer.bytes_per_token(), tokenizer.special_tokens["<eos>"]
    # With SentencePiece the first piece of a document carries a space that is not in the text.
    space = int(sizes[tokenizer.encode("a")].sum()) - 1

    def evaluate(model: Transformer) -> dict[str, float]:
        loss = tokens = size = 0.0
        for start in range(0, len(chosen), cfg.micro_batch):
            mb = windows.read(chosen[start : start + cfg.micro_batch])
            tokens += mb.targets.numel()
            size += sizes[mb.targets.numpy()].sum() - space * int((mb.tokens == eos).sum())
            mb = mb.to(runtime.device)
            loss += float(model(mb.tokens, mb.targets, reduction="sum", documents=mb.documents))
        loss, tokens, size = runtime.sum(loss, tokens, size)
        return {"val_loss": loss / tokens, "val_bpb": loss / math.log(2) / max(1.0, size)}

    return evaluate


def make_sample(
    cfg: Config, tokenizer: Tokenizer, runtime: rt.Runtime
) -> Callable[[Transformer], list[str]] | None:
    """A function that greedily continues the beginnings of a few documents of cfg.valid; None: not wanted."""
    prompts = first_tokens(cfg.valid, tokenizer) if cfg.sample_every and cfg.valid.exists() else []
    if not prompts:
        return None

    def sample(model: Transformer) -> list[str]:
        if not runtime.is_main:
            return []
        if hasattr(model.norm.weight, "full_tensor"):  # a DTensor: no process has a whole layer
            runtime.print("权重分片时不做续写；训练后可用 python eval_pretrain.py 看。")
            return []
        greedy = Sampling(SAMPLE_TOKENS, temperature=0)
        news = generate(model, prompts, greedy, tokenizer.stop_ids, vocab_size=tokenizer.vocab_size)
        texts = zip(map(tokenizer.decode, prompts), map(tokenizer.decode, news), strict=True)
        return [" ".join(f"【{prompt}】{new}".split()) for prompt, new in texts]

    return sample


def first_tokens(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """The first PROMPT_TOKENS tokens of SAMPLES documents, spread over the beginning of a token file."""
    if path.stat().st_size < 1000:
        return []
    tokens = np.asarray(open_tokens(path, tokenizer)[:1_000_000])
    starts = np.flatnonzero(tokens == tokenizer.special_tokens["<eos>"]) + 1
    starts = starts[np.diff(starts, append=len(tokens)) > 2 * PROMPT_TOKENS]  # not the short documents
    chosen = starts[np.linspace(0, len(starts) - 1, min(SAMPLES, len(starts))).astype(int)]
    return [tokens[start : start + PROMPT_TOKENS].tolist() for start in chosen]


if __name__ == "__main__":
    run_stage(Config, main)
