"""Checkpoints: `out/<stage>/step_XXXXXXXX/`, written under a temporary name and renamed when whole.

    model.safetensors    weights (a tied matrix once)
    config.json          ModelArgs
    train_config.json    the stage's settings
    tokenizer.model      the vocabulary
    training_state.pt    optimizer, random state, counters: read without unpickling objects

Whoever reads a checkpoint takes a folder and learns shape and vocabulary from it. The original project's
`.pth` files (plain state dicts) are read too.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from model import PRESETS, ModelArgs, Transformer
from sources.report import settings as as_json
from sources.report import write_json
from stage import UserError, atomic_path

FILES = ("model.safetensors", "config.json", "train_config.json", "tokenizer.model", "training_state.pt")

# (dim, layers) -> (heads, context) of the .pth files in circulation: the reference sizes and llama2.c's.
KNOWN_HEADS = {(p["dim"], p["n_layers"]): (p["n_heads"], p["max_seq_len"]) for p in PRESETS.values()}
KNOWN_HEADS |= {(64, 5): (8, 512), (288, 6): (6, 256), (768, 12): (12, 1024)}


@dataclass
class Checkpoint:
    """What was loaded: the model, the vocabulary that goes with it, and where it came from."""

    model: Transformer
    tokenizer: ChatGLMTokenizer
    path: Path


def save(
    out: Path, step: int, model: Transformer, settings: Any, vocabulary: bytes, state: dict, keep: int
) -> Path:
    """Write a checkpoint and delete all but the last `keep`. state: tensors, numbers, strings, containers."""
    final = out / f"step_{step:08d}"
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    if model.args.tie_embeddings:
        del weights["output.weight"]
    for leftover in out.glob(".step_*.tmp-*"):  # of a run that was killed while saving
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with atomic_path(final) as temporary:
            temporary.mkdir()
            save_file(weights, temporary / "model.safetensors")
            write_json(temporary / "config.json", asdict(model.args))
            write_json(temporary / "train_config.json", as_json(settings))
            (temporary / "tokenizer.model").write_bytes(vocabulary)
            torch.save(state, temporary / "training_state.pt")
    except (RuntimeError, SafetensorError, OSError) as error:  # what a full disk looks like from below
        reason = str(error).splitlines()[0]
        raise UserError(f"无法写入检查点 {final}（磁盘已满或不可写？旧检查点未被改动）：{reason}") from error
    for old in list_steps(out)[:-keep]:
        shutil.rmtree(old)
    return final


def list_steps(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{8,}", f.name)]
    return sorted(f for f in folders if all((f / name).is_file() for name in FILES))


def find(path: Path) -> Path:
    """The checkpoint that a user means: a step folder, the newest of a run's folder, or a .pth file."""
    if path.is_file() or (path / "model.safetensors").is_file():
        return path
    if not path.exists():
        raise UserError(
            f"找不到检查点 {path}；请先运行 python pretrain.py，或指定检查点文件夹、原项目的 .pth 文件。"
        )
    steps = list_steps(path)
    if not steps:
        raise UserError(f"{path} 里没有完整的检查点（step_XXXXXXXX 文件夹）。")
    return steps[-1]


def load(
    path: Path,
    device: torch.device | str = "cpu",
    tokenizer: Path | None = None,
    n_heads: int | None = None,
) -> Checkpoint:
    """Load a model with its vocabulary from a step folder, a run's folder, or an original .pth.

    tokenizer: overrides the checkpoint's (a .pth has none; by default the ChatGLM2 vocabulary).
    n_heads: of a .pth whose shape is not one of the known ones.
    """
    path = find(path)
    if path.is_file():
        weights = read_pth(path)
        args = args_from_weights(weights, path, n_heads)
    else:
        args = read_args(path)
        weights = with_tied(read_weights(path), args)
    vocabulary = ChatGLMTokenizer(tokenizer or (path / "tokenizer.model" if path.is_dir() else CHATGLM2))
    if vocabulary.vocab_size > args.vocab_size:
        raise UserError(
            f"词表 {vocabulary.vocab_file} 有 {vocabulary.vocab_size} 个条目，而 {path} 的模型只有 "
            f"{args.vocab_size} 个；请用 --tokenizer 指定训练它的词表。"
        )
    return Checkpoint(build(args, weights, path).to(device), vocabulary, path)


def build(args: ModelArgs, weights: dict[str, Tensor], path: Path) -> Transformer:
    """A model of this shape with exactly these weights."""
    model = Transformer(args)
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} 的权重与模型形状不符：{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return model


def with_tied(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The weights with the tied matrix under both of its names."""
    if args.tie_embeddings and "tok_embeddings.weight" in weights:
        return {**weights, "output.weight": weights["tok_embeddings.weight"]}
    return weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / 'model.safetensors'} 已损坏或不完整（{error}）；请用更早的检查点。"
        ) from error


def read_args(folder: Path) -> ModelArgs:
    try:
        return ModelArgs(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} 缺失或不是模型配置：{error}") from error


def read_state(folder: Path) -> dict:
    """Optimizer, random state and counters of a checkpoint."""
    path = folder / "training_state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return {name: state[name] for name in ("step", "tokens", "signature", "optimizer", "scaler")}
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise UserError(f"{path} 已损坏或不完整；请删除 {folder} 后再 --resume。") from error


def read_pth(path: Path) -> dict[str, Tensor]:
    """The state dict of an original `.pth`, without the prefix that torch.compile adds."""
    try:
        weights = torch.load(path, weights_only=True, map_location="cpu")
        weights = {k.removeprefix("_orig_mod."): v for k, v in weights.items()}
        assert all(isinstance(v, Tensor) for v in weights.values())
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise UserError(f"{path} 不是 PyTorch 权重文件（state dict），或已损坏。") from error
    return {k: v.float() for k, v in weights.items()}


def args_from_weights(weights: dict[str, Tensor], path: Path, n_heads: int | None = None) -> ModelArgs:
    """The shape of an original model, read off its weights; the heads are those of the known shapes."""
    try:
        vocab_size, dim = weights["tok_embeddings.weight"].shape
        hidden_dim = weights["layers.0.feed_forward.w1.weight"].shape[0]
        kv_width = weights["layers.0.attention.wk.weight"].shape[0]
        output = weights["output.weight"]
        n_layers = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("layers."))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} 不是 Baby-Llama2 / llama2.c 的模型：缺少或无法理解权重 {error}。") from error
    heads, max_seq_len = KNOWN_HEADS.get((dim, n_layers), (None, 512))
    n_heads = n_heads or heads
    if not n_heads or dim % n_heads or kv_width * n_heads % dim:
        raise UserError(f"{path} 没有记录注意力头数（宽 {dim}、{n_layers} 层）；请用 --n_heads 指明。")
    return ModelArgs(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=kv_width * n_heads // dim,
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        max_seq_len=max_seq_len,
        tie_embeddings=torch.equal(output, weights["tok_embeddings.weight"]),
    )
