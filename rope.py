"""Rotary position embedding and its extensions to longer contexts.

The extensions are those of Hugging Face's `rope_scaling`, under its keys and with its numbers
(https://huggingface.co/docs/transformers/internal/rope_utils), so that an imported model computes what it was
trained with. `factor` is how many times longer the context becomes.

    linear   positions divided by the factor (https://arxiv.org/abs/2306.15595)
    dynamic  a higher base for texts beyond the trained length (NTK-aware); up to it nothing changes
    yarn     slow dimensions divided by the factor, fast ones kept; attention made sharper
             (https://arxiv.org/abs/2309.00071)
    llama3   the same idea with the bounds of Llama 3.1 (https://arxiv.org/abs/2407.21783)
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model import ModelArgs

Scaling = dict[str, Any]

# What each kind needs and may have besides; the original length is filled in where it is missing.
NEEDED = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
OPTIONAL = {
    "linear": set(),
    "dynamic": set(),
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "llama3": set(),
}
ORIGINAL = "original_max_position_embeddings"


def standard_scaling(scaling: Scaling | None, max_seq_len: int) -> Scaling | None:
    """A `rope_scaling` of any age in one form, with `rope_type` and only what counts; None if nothing is scaled.

    max_seq_len: the context, which is the trained one where the scaling does not say. ValueError for what is unknown.
    """
    if not scaling:
        return None
    given = {name: value for name, value in scaling.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given = {name: value for name, value in given.items() if name not in ("type", "rope_theta")}
    if given.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor is not supported: whole heads are rotated")
    if kind == "default":
        return None
    if kind not in NEEDED:
        raise ValueError(f"rope_type must be one of {', '.join(NEEDED)}, not {kind!r}")
    if kind in ("yarn", "llama3"):
        original = given.setdefault(ORIGINAL, max_seq_len)
        if kind == "yarn":
            given.setdefault("factor", max_seq_len / original)
    if missing := NEEDED[kind] - given.keys():
        raise ValueError(f"rope_scaling {kind} needs {', '.join(sorted(missing))}")
    kept = {name: given[name] for name in given if name in NEEDED[kind] | OPTIONAL[kind] | {ORIGINAL}}
    for name, value in kept.items():
        if name != "truncate" and not (isinstance(value, int | float) and 0 < value < 1e12):
            raise ValueError(f"rope_scaling {name} must be a positive number, not {value!r}")
    if kind == "llama3" and kept["high_freq_factor"] <= kept["low_freq_factor"]:
        raise ValueError("rope_scaling llama3 needs high_freq_factor above low_freq_factor")
    return {"rope_type": kind, **kept}


def rope_table(args: "ModelArgs") -> Tensor:
    """Cosines and sines of the rotary angles, (max_seq_len, D/2, 2) (https://arxiv.org/abs/2104.09864).

    Of YaRN they are multiplied with its attention factor.
    """
    frequencies, attention_factor = rope_frequencies(args)
    angles = torch.outer(torch.arange(args.max_seq_len).float(), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1) * attention_factor


def rope_frequencies(args: "ModelArgs") -> tuple[Tensor, float]:
    """Radians per position of each pair of dimensions, (D/2,), and what cosines and sines are multiplied with."""
    powers = args.rope_theta ** (torch.arange(0, args.head_dim, 2).float() / args.head_dim)
    plain, scaling = 1.0 / powers, args.rope_scaling or {"rope_type": "dynamic"}
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1.0
    if scaling["rope_type"] == "llama3":
        return llama3_frequencies(plain, scaling), 1.0
    if scaling["rope_type"] == "yarn":
        share = yarn_share(args, scaling)
        divided = 1.0 / (scaling["factor"] * powers)
        return divided * (1 - share) + plain * share, yarn_attention_factor(scaling)
    return plain, 1.0  # "dynamic" changes nothing up to max_seq_len; beyond it, see `ntk_theta`


def ntk_theta(theta: float, factor: float, length: int, original: int, head_dim: int) -> float:
    """The base that dynamic scaling gives to a text of `length` tokens, longer than the `original` context."""
    return theta * (factor * length / original - (factor - 1)) ** (head_dim / (head_dim - 2))


def llama3_frequencies(plain: Tensor, scaling: Scaling) -> Tensor:
    """Waves longer than the original context / low_freq_factor are divided, short ones kept, others in between."""
    low, high, factor = (scaling[name] for name in ("low_freq_factor", "high_freq_factor", "factor"))
    waves = 2 * math.pi / plain  # positions of a whole turn, (D/2,)
    turns = scaling[ORIGINAL] / waves  # within the original context
    smooth = (turns - low) / (high - low)
    between = (1 - smooth) * plain / factor + smooth * plain
    is_long, is_short = waves > scaling[ORIGINAL] / low, waves < scaling[ORIGINAL] / high
    return torch.where(is_long, plain / factor, torch.where(is_short, plain, between))


def yarn_share(args: "ModelArgs", scaling: Scaling) -> Tensor:
    """How much of its own frequency each pair of dimensions keeps under YaRN, (D/2,) from 1 to 0."""

    def dimension(turns: float) -> float:
        """The dimension that makes so many turns within the original context."""
        length = scaling[ORIGINAL] / (turns * 2 * math.pi)
        return args.head_dim * math.log(length) / (2 * math.log(args.rope_theta))

    low, high = dimension(scaling.get("beta_fast", 32)), dimension(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, args.head_dim - 1)
    width = high - low or 0.001
    return 1 - ((torch.arange(args.head_dim // 2).float() - low) / width).clamp(0, 1)


def yarn_attention_factor(scaling: Scaling) -> float:
    """What YaRN multiplies queries and keys with: 0.1 ln(factor) + 1 unless the model says otherwise."""

    def grown(strength: float) -> float:
        return 0.1 * strength * math.log(scaling["factor"]) + 1.0 if scaling["factor"] > 1 else 1.0

    if "attention_factor" in scaling:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return grown(scaling["mscale"]) / grown(scaling["mscale_all_dim"])
    return grown(1.0)
