"""The original project's `.pth`: a plain state dict, whose shape and rotary base its own code must know."""

from dataclasses import replace
from pathlib import Path

import torch

from model import ModelArgs, Transformer
from stage import UserError


def write_pth(path: Path, model: Transformer) -> None:
    """Write the state dict in fp32, a tied matrix under both names; UserError for what the original cannot be."""
    check_fixed(model.args, "原项目的 model.py")
    args = model.args
    if not args.tie_embeddings or args.hidden_dim != replace(args, hidden_dim=None).hidden_dim:
        raise UserError(
            "原项目的 model.py 总是共用词嵌入与输出层，前馈宽度由 multiple_of 决定；请用 --format hf 或 gguf。"
        )
    torch.save({name: value.detach().float().cpu() for name, value in model.state_dict().items()}, path)


def check_fixed(args: ModelArgs, reader: str) -> None:
    """Raise UserError for what a program that knows sizes alone would compute otherwise."""
    reasons = {
        f"rope_theta={args.rope_theta:g}（它固定为 10000）": args.rope_theta != 10000,
        f"上下文扩展 rope_scaling={args.rope_scaling}": args.rope_scaling is not None,
        f"norm_eps={args.norm_eps:g}（它固定为 1e-5）": args.norm_eps != 1e-5,
        f"每头宽 {args.head_dim} 不等于 dim / n_heads": args.head_dim * args.n_heads != args.dim,
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise UserError(f"{reader} 不支持：{'；'.join(found)}。请用 --format hf 或 gguf。")
