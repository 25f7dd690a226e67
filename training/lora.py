"""What a model trains: all of it, its last layers, or adapters beside frozen weights (LoRA, QLoRA).

`prepare` comes between loading and training. peft injects its modules into our own Transformer, which stays what it
is to the loop; how adapters are saved: training/adapter_files.py.
"""

import json
import math
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from exchange.hf_weights import INSIDE
from model import ModelArgs, Transformer
from stage import StageConfig, UserError, require
from training import adapter_files
from training.runtime import Runtime
from training.state import Adapters
from training.step_folder import list_steps

ATTENTION, FEED_FORWARD = ("wq", "wk", "wv", "wo"), ("w1", "w2", "w3")
GROUPS = {"all": ATTENTION + FEED_FORWARD, "attention": ATTENTION, "ffn": FEED_FORWARD}
HF_NAMES = {ours.split(".")[-1]: theirs.split(".")[-1] for ours, theirs in INSIDE.items()}
MATRICES = {name: name for name in GROUPS["all"]} | {HF_NAMES[name]: name for name in GROUPS["all"]}
TABLES = ("tok_embeddings", "output", "embed_tokens", "lm_head")
# Of QLoRA for models up to 13B (https://arxiv.org/abs/2305.14314, table 9) and Chinese-LLaMA
# (https://arxiv.org/abs/2304.08177); ten times that of full fine-tuning (https://thinkingmachines.ai/blog/lora/).
RATE = 2e-4
BLOCK = 64  # weights that share a scale in nf4
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_embed", "rslora", "dora")


@dataclass
class LoraConfig(StageConfig):
    lora: bool = False  # 只训练低秩适配器（LoRA），原来的权重不动；检查点里只有适配器（docs/lora.md）
    qlora: bool = False  # 同 --lora，并把层内的矩阵量化为 4 位（nf4、双重量化）；需 pip install bitsandbytes
    lora_rank: int = 16  # 适配器的秩
    lora_alpha: float = 32.0  # 适配器的输出乘以 alpha / rank
    lora_dropout: float = 0.0  # 适配器输入的随机失活
    lora_targets: tuple[str, ...] = ("all",)  # 适配哪些矩阵：all、attention、ffn，或 wq、w1、q_proj 等名字
    lora_embed: bool = False  # 词嵌入和输出层也训练（整个矩阵）；词表扩充过的模型需要它
    rslora: bool = False  # 改为乘以 alpha / sqrt(rank)，秩大时更稳
    dora: bool = False  # DoRA：另学每一行的长度；慢一些
    neftune: float = 0.0  # NEFTune：训练时给词嵌入加噪声的大小，常用 5；0 为不加
    train_layers: int = 0  # 只训练最后几层（全量微调时）；0 为全部

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not the model's own weights."""
        return self.lora or self.qlora

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        super().check()
        require(self.lora_rank >= 1, "lora_rank", self.lora_rank, "至少为 1")
        require(0 < self.lora_alpha < 1e9, "lora_alpha", self.lora_alpha, "必须大于 0")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "不小于 0 且小于 1")
        require(0 <= self.neftune < 1e9, "neftune", self.neftune, "不能小于 0")
        require(self.train_layers >= 0, "train_layers", self.train_layers, "不能小于 0")
        targets_of(self.lora_targets)
        if self.adapts:
            require(self.train_layers == 0, "train_layers", self.train_layers, "不能与 --lora、--qlora 同用")
            is_muon = "muon" in (getattr(self, "recipe", None), getattr(self, "optimizer", None))
            require(not is_muon, "recipe", "muon", "不能用于适配器：它们用 AdamW 训练")
            if self.qlora and getattr(self, "shard", False):
                raise UserError("--qlora 不能与 --shard 同用：4 位的权重不能切分；请用 --lora --shard。")
        elif given := [
            f.name for f in fields(LoraConfig) if f.name in OF_ADAPTERS and getattr(self, f.name) != f.default
        ]:
            raise UserError(
                f"--{given[0]} 是适配器的设置，而现在训练全部权重：请加上 --lora 或 --qlora，或去掉它。"
            )


Config = TypeVar("Config", bound=LoraConfig)


def targets_of(names: tuple[str, ...]) -> list[str]:
    """The matrices that `--lora_targets` names, each once, by our names."""
    found = []
    for name in names:
        if name in TABLES:
            raise UserError(f"--lora_targets {name}：词嵌入和输出层请用 --lora_embed（训练整个矩阵）。")
        if name not in GROUPS and name not in MATRICES:
            known = "、".join([*GROUPS, *MATRICES])
            raise UserError(f"--lora_targets {name} 不认识；可用的有 {known}。")
        found += GROUPS.get(name, (MATRICES.get(name),))
    require(bool(found), "lora_targets", names, "至少要有一个")
    return list(dict.fromkeys(found))


def with_rate(cfg: Config, full: float | None = None) -> Config:
    """The settings with the learning rate, if it was left open: of adapters, or `full` of the whole model."""
    rate = cfg.lr or (RATE if cfg.adapts else full)
    is_eager = cfg.compile is None and cfg.qlora  # the 4-bit products are no graphs
    return replace(cfg, lr=rate, compile=False if is_eager else cfg.compile)


def prepare(model: Transformer, cfg: LoraConfig, runtime: Runtime, base: Path) -> None:
    """Make the model train what the settings say. model: as loaded from `base`, on the CPU and in fp32."""
    if cfg.neftune:
        model.tok_embeddings.register_forward_hook(noise(cfg.neftune))
    if cfg.train_layers:
        freeze_all_but(model, cfg.train_layers)
    if not cfg.adapts or cfg.estimate:
        return
    if base in list_steps(base.parent):
        runtime.print(
            f"提示：适配器依附于 {base}；续训那个模型时 --keep_last 会删掉它，适配器就不能用了。"
            "请先复制一份再 --init，或训练完就用 merge.py 合并。"
        )
    targets = targets_of(cfg.lora_targets)
    model.adapters = Adapters(
        config=peft_config(cfg, [HF_NAMES[name] for name in targets], model.args, base),
        base=adapter_files.describe_base(cfg.out / "step", base, adapter_files.fingerprint(model)),
    )
    model.requires_grad_(False)
    if cfg.qlora:
        quantise(model, runtime)
    inject(model, cfg, targets)
    if cfg.lora_embed:
        model.tok_embeddings.requires_grad_(True)
        model.output.requires_grad_(True)
    if not cfg.shard:
        hold_in(model, runtime.dtype)


def inject(model: Transformer, cfg: LoraConfig, targets: list[str]) -> None:
    """Put adapters, in fp32, beside the matrices of these names in every layer."""
    peft = import_peft()
    torch.manual_seed(cfg.seed)  # the same adapters in every process
    peft.inject_adapter_in_model(lora_config(cfg, targets), model)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def hold_in(model: Transformer, dtype: torch.dtype) -> None:
    """Hold the layers' frozen matrices in the type that products are made in: autocast rounds them to it anyway."""
    for parameter in model.layers.parameters():
        if parameter.dim() == 2 and parameter.dtype == torch.float32 and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError("--lora 需要 peft：pip install peft") from error
    return peft


def lora_config(cfg: LoraConfig, targets: list[str], **options: object) -> Any:
    """peft's settings for modules of these names."""
    return import_peft().LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=targets,
        use_rslora=cfg.rslora,
        use_dora=cfg.dora,
        **options,
    )


def peft_config(cfg: LoraConfig, targets: list[str], args: ModelArgs, base: Path) -> dict[str, Any]:
    """adapter_config.json for the same model as `LlamaForCausalLM`."""
    options = dict(task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=str(base.resolve()))
    if cfg.lora_embed:
        options["modules_to_save"] = ["embed_tokens"] if args.tie_embeddings else ["embed_tokens", "lm_head"]
        options["ensure_weight_tying"] = args.tie_embeddings
    settings = lora_config(cfg, targets, **options).to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    return {**json.loads(json.dumps(settings)), "peft_version": version("peft")}


def quantise(model: Transformer, runtime: Runtime) -> None:
    """Replace the layers' matrices by 4-bit ones on the device: nf4, its scales quantised too (QLoRA, section 3)."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise UserError("--qlora 需要 bitsandbytes：pip install bitsandbytes") from error
    how = dict(compress_statistics=True, quant_type="nf4")
    skipped = set()
    for parent in [module for layer in model.layers for module in layer.children()]:
        for name, linear in list(parent.named_children()):
            if not isinstance(linear, nn.Linear):
                continue
            if linear.weight.numel() % BLOCK:
                skipped.add(name)
                continue
            new = bnb.nn.Linear4bit(
                *linear.weight.shape[::-1], bias=False, compute_dtype=runtime.dtype, device="meta", **how
            )
            weight = linear.weight.data.to(runtime.dtype)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=new, **how)
            # For inference on CPUs it packs the weights anew, in coarser scales, and wants widths divisible by 64.
            new.support_avx512bf16_for_cpu = False
            setattr(parent, name, new.to(runtime.device))
    model.is_loaded_in_4bit = True  # peft asks
    if skipped:
        runtime.print(f"{'、'.join(sorted(skipped))} 的元素个数不是 {BLOCK} 的倍数，不量化。")


def noise(alpha: float) -> Any:
    """NEFTune (https://arxiv.org/abs/2310.05914): in training, uniform noise of alpha / sqrt(T C) on embeddings."""

    def hook(module: nn.Module, inputs: tuple[Tensor], x: Tensor) -> Tensor | None:
        if not module.training:
            return None
        T, C = x.shape[-2:]  # x: (B, T, C)
        return x + torch.empty_like(x).uniform_(-1, 1) * (alpha / math.sqrt(T * C))

    return hook


def freeze_all_but(model: Transformer, layers: int) -> None:
    """Train the last layers and the norm behind them alone."""
    if layers > model.args.n_layers:
        raise UserError(f"--train_layers {layers}：模型只有 {model.args.n_layers} 层。")
    model.requires_grad_(False)
    model.layers[-layers:].requires_grad_(True)
    model.norm.requires_grad_(True)


# What is reported.


def elements(parameter: Tensor) -> int:
    """How many weights a parameter holds; nf4 packs two into a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return math.prod(quantised.shape) if quantised is not None else parameter.numel()


def describe(model: Transformer) -> str:
    """How many weights a model has, how many of them are trained, and what all of them take."""
    parameters = list(model.parameters())
    total, trained = (
        sum(map(elements, ps)) for ps in (parameters, [p for p in parameters if p.requires_grad])
    )
    if total == trained:
        return f"参数 {total / 1e6:.2f}M"
    size = sum(p.numel() * p.element_size() for p in parameters)
    return (
        f"参数 {total / 1e6:.2f}M，训练其中 {trained / 1e6:.3g}M（{trained / total:.2%}），"
        f"权重共占 {size / 1e6:,.1f} MB"
    )
