"""The original project's `.pth` files: plain state dicts, whose shape is read off the weights."""

from pathlib import Path

import torch
from torch import Tensor

from model import PRESETS, ModelArgs
from stage import UserError

# (dim, layers) -> (heads, context) of the .pth files in circulation: the reference sizes and llama2.c's.
KNOWN_HEADS = {(p["dim"], p["n_layers"]): (p["n_heads"], p["max_seq_len"]) for p in PRESETS.values()}
KNOWN_HEADS |= {(64, 5): (8, 512), (288, 6): (6, 256), (768, 12): (12, 1024)}


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
