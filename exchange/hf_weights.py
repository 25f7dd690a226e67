"""Weights under Meta's names, as ours, and under Hugging Face's.

Meta's rotary embedding turns neighbouring dimensions (2i, 2i + 1) of a head together, Hugging Face's i and i + D/2:
the rows of wq and wk are in another order
(https://github.com/huggingface/transformers/blob/main/src/transformers/models/llama/convert_llama_weights_to_hf.py).
"""

import re

from torch import Tensor

from model import ModelArgs

OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
INSIDE = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(meta_name: str) -> str:
    """Hugging Face's name of a weight or of the module that holds it; KeyError if the model has no such thing."""
    return renamed(meta_name, "layers", OUTSIDE, INSIDE, "model.layers")


def meta_name(hf_name: str) -> str:
    """Meta's name of a weight or of the module that holds it; KeyError if the model has no such thing."""
    outside, inside = ({theirs: ours for ours, theirs in names.items()} for names in (OUTSIDE, INSIDE))
    return renamed(hf_name, "model.layers", outside, inside, "layers")


def renamed(name: str, layers: str, outside: dict[str, str], inside: dict[str, str], new_layers: str) -> str:
    """The name with its known part replaced; what follows (`.weight`, `.lora_A.weight`) stays."""
    within = re.fullmatch(rf"{re.escape(layers)}\.(\d+)\.(.*)", name)
    names, rest = (inside, within[2]) if within else (outside, name)
    for old, new in names.items():
        if rest == old or rest.startswith(f"{old}."):
            prefix = f"{new_layers}.{within[1]}." if within else ""
            return prefix + new + rest[len(old) :]
    raise KeyError(name)


def permute(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk, (heads * D, ...), from Meta's order within a head to Hugging Face's."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk, (heads * D, ...), from Hugging Face's order within a head to Meta's."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def to_hf(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Our weights under Hugging Face's names; a tied matrix once, as its files have it."""
    return {
        hf_name(name): permute(value, heads) if (heads := _heads(name, args)) else value
        for name, value in weights.items()
        if not (args.tie_embeddings and name == "output.weight")
    }


def from_hf(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Hugging Face's weights under our names; a tied matrix once. KeyError for weights that the model lacks."""
    renamed = {meta_name(name): value for name, value in weights.items() if not is_left_out(name, args)}
    return {name: from_hf_rows(name, value, args) for name, value in renamed.items()}


def from_hf_rows(name: str, value: Tensor, args: ModelArgs) -> Tensor:
    """A single weight of a Hugging Face model, under our name already, with its rows in our order."""
    heads = _heads(name, args)
    return unpermute(value, heads) if heads else value


def is_left_out(hf_name: str, args: ModelArgs) -> bool:
    """Whether a tensor of a Hugging Face folder is nothing that our model holds: tables, the second tied matrix."""
    return hf_name.endswith("rotary_emb.inv_freq") or (args.tie_embeddings and hf_name == "lm_head.weight")


def _heads(name: str, args: ModelArgs) -> int:
    """How many heads the rows of a weight belong to, if they are rotated; otherwise 0."""
    return {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2], 0)
