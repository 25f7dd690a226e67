"""Settings of the context length and of the rotary embedding: of a new model, or changes of one that is loaded."""

import json
from dataclasses import dataclass, replace

from model import ModelArgs
from rope import NEEDED, ORIGINAL, Scaling, ntk_theta, standard_scaling
from stage import StageConfig, UserError, require

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's own


@dataclass
class ContextConfig(StageConfig):
    max_seq_len: int | None = None  # 上下文长度；默认为模型原来的，用 --rope_scaling 扩展时为原来的若干倍
    rope_theta: float | None = None  # RoPE 的底数；默认为模型原来的（新模型为 10000）
    rope_scaling: str | None = None  # 扩展上下文的方法：linear:2、dynamic:2、yarn:4、llama3:8、none 或 JSON

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        super().check()
        require(
            self.max_seq_len is None or self.max_seq_len >= 1, "max_seq_len", self.max_seq_len, "至少为 1"
        )
        is_usable = self.rope_theta is None or 1 < self.rope_theta < 1e12
        require(is_usable, "rope_theta", self.rope_theta, "必须大于 1")
        if self.rope_scaling is not None:
            parse_scaling(self.rope_scaling)

    def extend(self, args: ModelArgs) -> ModelArgs:
        """The shape of a loaded model with its context changed as the settings say; UserError if that cannot be."""
        old, new = args.rope_scaling, None if self.rope_scaling is None else parse_scaling(self.rope_scaling)
        original = (old or {}).get(ORIGINAL, args.max_seq_len)
        length = self.max_seq_len or args.max_seq_len
        if new and self.max_seq_len is None:
            if old:  # who writes max_position_embeddings counts a linear scaling in, or does not
                raise UserError(
                    f"模型已有 rope_scaling {old}：改用 --rope_scaling 时请同时写明 --max_seq_len。"
                )
            length = round(original * new["factor"])
        theta = self.rope_theta or args.rope_theta
        scaling = old if new is None else new or None
        if scaling and scaling["rope_type"] in ("yarn", "llama3"):
            scaling = {ORIGINAL: original, **scaling}
        if scaling and scaling["rope_type"] == "dynamic" and length != args.max_seq_len:
            # A text of this length would be given this base. One base for all of the training, and for all that use
            # the model after it, agrees with itself, which the base that changes while a text grows does not.
            if length > original:
                theta = ntk_theta(theta, scaling["factor"], length, original, args.head_dim)
            scaling = None
        return changed(args, max_seq_len=length, rope_theta=theta, rope_scaling=scaling)

    def of_new_model(self, shape: dict) -> dict:
        """The fields of a new model's shape with these settings; its length is the extended one."""
        chosen = {"max_seq_len": self.max_seq_len, "rope_theta": self.rope_theta}
        shape = shape | {name: value for name, value in chosen.items() if value is not None}
        if self.rope_scaling is not None and (scaling := parse_scaling(self.rope_scaling)):
            if scaling["rope_type"] in ("yarn", "llama3"):
                scaling = {ORIGINAL: max(1, round(shape["max_seq_len"] / scaling["factor"])), **scaling}
            shape["rope_scaling"] = scaling
        return shape


def parse_scaling(text: str) -> Scaling:
    """What `--rope_scaling` says, under Hugging Face's keys; empty for none. UserError if it says nothing usable."""
    if text.strip() in ("none", "default"):
        return {}
    kind, _, factor = text.strip().partition(":")
    try:
        if text.lstrip().startswith("{"):
            given = json.loads(text)
        else:
            given = {"rope_type": kind, "factor": float(factor), **(LLAMA3 if kind == "llama3" else {})}
        scaling = standard_scaling(given, max_seq_len=1) or {}
        if scaling and "factor" not in given:
            raise ValueError("factor is missing")
        if scaling and not scaling["factor"] >= 1:
            raise ValueError("factor must be at least 1")
        return {name: value for name, value in scaling.items() if name in given or name == "rope_type"}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--rope_scaling {text} 不可用（{error}）；写成 {'、'.join(f'{name}:2' for name in NEEDED)}、none，"
            "或 Hugging Face 的 rope_scaling（JSON）。"
        ) from error


def changed(args: ModelArgs, **changes: object) -> ModelArgs:
    """The shape with some fields changed; UserError if it is none."""
    try:
        return replace(args, **changes)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"模型形状不成立：{error}") from error
