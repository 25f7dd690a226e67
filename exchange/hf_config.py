"""The shape of a model as Hugging Face's config.json says it, and as ours does.

Only what computes exactly what our model.py computes is taken over: the Llama family, and Mistral without a sliding
window (https://huggingface.co/docs/transformers/model_doc/llama).
"""

from pathlib import Path
from typing import Any

from model import ModelArgs
from rope import ORIGINAL
from stage import UserError

# Ours -> theirs, of what both write down in the same way.
NAMES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "tie_embeddings": "tie_word_embeddings",
}
# What transformers assumes of a Llama where a config.json is silent; of a Mistral it assumes other sizes.
DEFAULTS = {"norm_eps": 1e-6, "max_seq_len": 2048, "rope_theta": 10000.0, "tie_embeddings": False}
REQUIRED = {"llama": ("dim", "n_layers", "n_heads", "vocab_size", "hidden_dim")}
REQUIRED["mistral"] = (*REQUIRED["llama"], "n_kv_heads", "max_seq_len")


def args_from_hf(config: dict[str, Any], where: Path) -> ModelArgs:
    """The shape that a Hugging Face config.json describes; UserError for what our model does not compute.

    where: the folder, for messages. Reads `rope_scaling` as well as transformers 5's `rope_parameters`.
    """
    check_supported(config, where)
    config = {**config, **rope_of(config)}
    required = REQUIRED[config["model_type"]]
    if missing := [NAMES[name] for name in required if config.get(NAMES[name]) is None]:
        raise UserError(f"{where} 的 config.json 缺少 {'、'.join(missing)}。")
    shape = {ours: config[theirs] for ours, theirs in NAMES.items() if config.get(theirs) is not None}
    try:
        return ModelArgs(**DEFAULTS | shape)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{where} 的 config.json 里的模型形状不受支持：{error}") from error


def rope_of(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, wherever a version of transformers has written them."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or config.get("rope_theta")
    if parameters and config.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if parameters and config.get(ORIGINAL) is not None:  # beside the scaling it takes precedence
        parameters[ORIGINAL] = config[ORIGINAL]
    return {"rope_theta": theta, "rope_scaling": parameters or None}


def check_supported(config: dict[str, Any], where: Path) -> None:
    """Raise UserError for a model that computes something else than model.py."""
    kind = config.get("model_type")
    window = config.get("sliding_window", 4096) if kind == "mistral" else None
    length = config.get("max_position_embeddings") or DEFAULTS["max_seq_len"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    reasons = {
        f"model_type 是 {kind}，只支持 llama 和 mistral": kind not in ("llama", "mistral"),
        f"sliding_window 是 {window}，不支持滑动窗口注意力": (window is not None and window < length),
        "注意力层有偏置（attention_bias）": config.get("attention_bias"),
        "前馈层有偏置（mlp_bias）": config.get("mlp_bias"),
        f"激活函数是 {config.get('hidden_act')}，只支持 silu": (
            config.get("hidden_act", "silu") not in ("silu", "swish")
        ),
        "权重是量化过的（quantization_config），请用未量化的版本": config.get("quantization_config"),
        "rope_parameters 因层而异，不受支持": any(isinstance(value, dict) for value in rope.values()),
    }
    if found := [reason for reason, applies in reasons.items() if applies]:
        raise UserError(f"不能导入 {where}：{'；'.join(found)}。")


def hf_from_args(args: ModelArgs) -> dict[str, Any]:
    """What a Hugging Face config.json says about the shape; token ids and the like are added by whoever writes it.

    `rope_theta` and `rope_scaling` are written as transformers 4 does, which 5 and other programs read too.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(args, ours) for ours, theirs in NAMES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
    }
