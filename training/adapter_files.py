"""Adapters (LoRA, https://arxiv.org/abs/2106.09685) in peft's own files, and what they make of the base's weights.

    adapter_model.safetensors   lora_A (r, in) and lora_B (out, r) of each module, and whole matrices trained with them
    adapter_config.json         peft's settings
    base.json                   where the base is, and the checksum of its weights

Names and rows are those of Hugging Face's Llama, so that peft loads the folder onto our export, or onto the Hugging
Face folder that was imported.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

from exchange.hf_weights import from_hf_rows, hf_name, meta_name, permute, unpermute
from model import ModelArgs, Transformer
from stage import UserError
from training.state import adapters_of, weights_of
from training.step_folder import verify
from training.tensor_files import TensorFiles

KIND = "adapter_model"  # what a step folder has instead of `model`
CONFIG, BASE = "adapter_config.json", "base.json"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer.weight"  # of a matrix that adapters stand beside
SAME = (
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)  # when a run goes on
# Variants of LoRA that compute something else than W + scale * B A, or train something besides.
UNSUPPORTED = (
    "lora_bias", "trainable_token_indices", "target_parameters", "megatron_config", "eva_config", "corda_config",
    "alora_invocation_tokens", "arrow_config", "layer_replication", "use_qalora", "use_bdlora", "kasa_config",
    "monteclora_config",
)  # fmt: skip
# Ways to begin that change the base as well: what its own weights plus B A give is not what was trained.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.weight)?"
)


@dataclass
class AdapterFolder:
    """Adapters that were read from a folder."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # under the file's names, without PREFIX
    base: Path
    checksum: str | None  # of the base's weights; None: of other origin than ours, not known


def is_adapter(path: Path) -> bool:
    """Whether a folder holds adapters."""
    return (path / CONFIG).is_file()


def fingerprint(model: Transformer) -> str:
    """xxh3-128 of the values in fp32 of a model without adapters, whatever kind of file they came from."""
    digest = xxhash.xxh3_128()
    for name, weight in sorted(weights_of(model).items()):
        digest.update(name.encode())
        digest.update(weight.float().contiguous().numpy())
    return digest.hexdigest()


# Writing and resuming: a model with adapters injected by peft.


def file_name(name: str) -> str:
    """peft's name, in its file, of a parameter of our model."""
    name = PREFIX + hf_name(name).replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def heads_of(name: str, args: ModelArgs) -> int:
    """How many rotated heads the rows of a parameter belong to; 0: of none, as for A, whose rows are the rank's."""
    if ".lora_A." in name:
        return 0
    return args.n_heads if ".wq." in name else args.n_kv_heads if ".wk." in name else 0


def to_file(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """Trained parameters by their names in peft's file; of sharded ones every process makes the whole tensor."""
    found = {}
    for name, value in weights.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        heads = heads_of(name, args)
        found[file_name(name)] = permute(whole, heads) if heads else whole
    if args.tie_embeddings and "tok_embeddings.weight" in weights:  # peft looks for both, and ties them again
        found[file_name("output.weight")] = found[file_name("tok_embeddings.weight")].clone()
    return found


def reader(files: TensorFiles, args: ModelArgs) -> Callable[[str, int, int | None], Tensor]:
    """A function that reads rows of a parameter of our model from peft's file."""

    def read(name: str, start: int, stop: int | None) -> Tensor:
        value, heads = files.read(file_name(name)), heads_of(name, args)
        return (unpermute(value, heads) if heads else value)[start:stop]

    return read


def check_same(folder: Path, model: Transformer) -> None:
    """UserError if a run would go on with other adapters than a checkpoint's, on another base, or with none."""
    adapters = adapters_of(model)
    if (adapters is not None) != is_adapter(folder):
        kind = "适配器" if is_adapter(folder) else "全部权重"
        raise UserError(f"{folder} 训练的是{kind}，现在的设置不是：续训时 --lora、--qlora 要与原来一致。")
    if adapters is None:
        return
    if read_json(folder / BASE).get("checksum") != adapters.base["checksum"]:
        raise UserError(f"{folder} 的适配器是在另一个模型上训练的，不是 --init 的这一个；请指定原来的。")
    before = read_json(folder / CONFIG)
    for name in SAME:
        if before.get(name) != adapters.config.get(name):
            raise UserError(
                f"{folder} 的适配器用的是 {name}={before.get(name)}，现在是 {adapters.config.get(name)}：续训必须用"
                "同样的设置；要换请用 --out 开始新的训练。"
            )


# Reading and merging.


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} 缺失或已损坏：{error}") from error


def read(folder: Path) -> AdapterFolder:
    """Adapters in peft's format, ours or others'; UserError for what is damaged or cannot be merged."""
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder} 是 {config.get('peft_type')} 适配器；这里只能用 LoRA。")
    odd = [name for name in UNSUPPORTED if config.get(name)]
    if odd or config.get("bias", "none") != "none":
        raise UserError(f"{folder} 的适配器用了 {'、'.join(odd) or 'bias'}，不受支持。")
    begin = config.get("init_lora_weights")
    if isinstance(begin, str) and begin.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"{folder} 的适配器以 {begin} 初始化，基座的权重也改了，不能并入原来的基座；请先用 peft 转成普通 LoRA："
            "save_pretrained(..., path_initial_model_for_weight_conversion=初始的适配器)。"
        )
    path = folder / f"{KIND}.safetensors"
    if not path.is_file():
        raise UserError(
            f"{folder} 里没有 {path.name}；pickle 格式的 adapter_model.bin 请先用 peft 转成 safetensors。"
        )
    verify(folder, f"{KIND}.safetensors")
    files = TensorFiles([path])
    tensors = {name.removeprefix(PREFIX): files.read(name) for name in files}
    base = read_json(folder / BASE) if (folder / BASE).is_file() else {}
    return AdapterFolder(folder, config, tensors, base_path(folder, config, base), base.get("checksum"))


def base_path(folder: Path, config: dict[str, Any], base: dict[str, str]) -> Path:
    """Where the base of adapters is: where it was, or at the same place beside them if both were moved together."""
    recorded = Path(base.get("path") or config.get("base_model_name_or_path") or "")
    beside = (folder / base["relative"]).resolve() if "relative" in base else recorded
    return beside if not recorded.exists() and beside.exists() else recorded


def describe_base(folder: Path, path: Path, checksum: str) -> dict[str, str]:
    """base.json of adapters in `folder` on the base at `path`."""
    path = path.resolve()
    return {"path": str(path), "relative": os.path.relpath(path, folder.resolve()), "checksum": checksum}


def check_base(adapter: AdapterFolder, model: Transformer, where: Path) -> None:
    """UserError if a model is not the one that the adapters were trained on, as far as that is known."""
    if adapter.checksum is not None and adapter.checksum != fingerprint(model):
        raise UserError(f"{adapter.path} 的适配器是在另一个模型上训练的：{where} 的权重与当时的不同。")


def merge(model: Transformer, adapters: Sequence[tuple[AdapterFolder, float]]) -> None:
    """Add to a model's weights (fp32) what adapters make of them, each times its weight. A tied matrix stays tied.

    UserError for adapters that do not fit, or that would untie the embedding and the head.
    """
    weights = model.state_dict()
    changes: dict[str, Tensor] = {}
    for adapter, share in adapters:
        found = differences(adapter, weights, model.args)
        if model.args.tie_embeddings:
            check_tied(adapter, found)
        for name, difference in found.items():
            changes[name] = (
                changes[name].add_(difference, alpha=share) if name in changes else difference * share
            )
    with torch.no_grad():
        for name, change in changes.items():
            weights[name] += change


def check_tied(adapter: AdapterFolder, found: dict[str, Tensor]) -> None:
    """Leave one change of a tied matrix; UserError if the adapters change its two sides differently.

    peft gives a tied matrix two adapters unless told otherwise, and then they are trained apart
    (https://github.com/huggingface/peft/issues/2018).
    """
    table, head = found.get("tok_embeddings.weight"), found.pop("output.weight", None)
    if table is None and head is None:
        return
    if adapter.config.get("ensure_weight_tying") and table is not None:
        return
    if table is None or head is None or not torch.allclose(table, head, atol=1e-6):
        raise UserError(
            f"{adapter.path} 的适配器对词嵌入和输出层的改动不同，而这个模型的两者是同一个矩阵：合并会使它们分开。"
            "确实要分开，请用 python merge.py --untie。"
        )


def differences(adapter: AdapterFolder, weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """By our names, in our order of rows: what adapters add to weights, whole matrices included."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        if name.endswith(BASE_LAYER):
            check_unchanged(adapter, name.removesuffix(BASE_LAYER), tensor, weights)
            continue
        match = PART.fullmatch(name)
        module, part = (
            match.groups() if match else (re.sub(r"(\.modules_to_save)?\.weight$", "", name), "whole")
        )
        modules.setdefault(module, {})[part] = tensor.float()
    found = {}
    for module, parts in modules.items():
        try:
            name = f"{meta_name(module)}.weight"
            weight = weights[name]
            after = from_hf_rows(name, parts["whole"], args) if "whole" in parts else None
            if after is None:
                after = adapted(weight, name, parts, scale_of(adapter.config, module, parts), args)
            found[name] = (after - weight).contiguous()
        except (KeyError, RuntimeError) as error:
            raise UserError(f"{adapter.path} 的 {module} 与模型不符：{str(error).splitlines()[0]}") from error
    return found


def check_unchanged(adapter: AdapterFolder, module: str, saved: Tensor, weights: dict[str, Tensor]) -> None:
    """UserError if the matrix that peft saves along with the adapters of a table is not the model's.

    It does so of its own accord where embed_tokens or lm_head are among the targets, as it may have been resized
    (https://huggingface.co/docs/peft/developer_guides/checkpoint).
    """
    weight = weights.get(f"{meta_name(module)}.weight")
    if weight is None or weight.shape != saved.shape or not torch.equal(weight.to(saved.dtype), saved):
        raise UserError(
            f"{adapter.path} 存有 {module} 训练时的原矩阵，与模型的不同：基座不是同一个，或词嵌入的行数改过；"
            "请用 --base 指定训练时的模型。"
        )


def scale_of(config: dict[str, Any], module: str, parts: dict[str, Tensor]) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, https://arxiv.org/abs/2312.03732), of a module."""
    rank = len(parts["lora_A"] if "lora_A" in parts else parts["lora_embedding_A"])
    patterns = config.get("alpha_pattern") or {}
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
    alpha = config["lora_alpha"] if key is None else patterns[key]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapted(weight: Tensor, name: str, parts: dict[str, Tensor], scale: float, args: ModelArgs) -> Tensor:
    """The weight (out, in) with W + scale * B A; with DoRA (https://arxiv.org/abs/2402.09353) rows of given length."""
    if "lora_embedding_A" in parts:
        return weight + scale * (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T
    after = weight + from_hf_rows(name, scale * (parts["lora_B"] @ parts["lora_A"]), args)
    if "lora_magnitude_vector" in parts:
        length = from_hf_rows(name, parts["lora_magnitude_vector"], args)  # (out,)
        after = after * (length / after.norm(dim=1))[:, None]
    return after
