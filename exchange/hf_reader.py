"""The weights of a Hugging Face folder, read one tensor at a time and in fp32."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exchange.hf_weights import from_hf_rows, is_left_out, meta_name
from model import ModelArgs
from stage import UserError
from training.step_folder import Damaged
from training.tensor_files import TensorFiles

Read = Callable[[str], Tensor]
SINGLE = ("model.safetensors", "pytorch_model.bin")  # the weights, where they are one file
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def read_hf_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a Hugging Face folder; None for a folder that is none."""
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) and "model_type" in config else None
    return None


def has_own_head(folder: Path) -> bool:
    """Whether a folder stores an output matrix with other values than the embedding's, whatever its config.json says.

    transformers 5 then uses both; who trained adapters on a tied model and merged them has made such a folder.
    """
    if not any(files_of(folder, name) for name in SINGLE):
        return False
    names, read = open_weights(folder)
    return {HEAD, TABLE} <= set(names) and not torch.equal(read(HEAD), read(TABLE))


def read_hf_weights(folder: Path, args: ModelArgs) -> dict[str, Tensor]:
    """All weights under our names, a tied matrix once; a file's bytes are in memory only while they are converted.

    UserError for files that are missing or damaged, and for weights that our model does not have.
    """
    names, read = open_weights(folder)
    found, unknown = {}, []
    for name in names:
        if is_left_out(name, args) and (name != HEAD or TABLE in names):
            continue
        try:
            ours = meta_name(name)
        except KeyError:
            unknown.append(name)
            continue
        value = read(name)
        if not value.is_floating_point() or value.element_size() < 2:
            raise UserError(
                f"{folder} 的权重 {name} 是 {value.dtype}：量化过的模型不能导入，请用未量化的版本。"
            )
        found[ours] = from_hf_rows(ours, value, args).to(torch.float32).contiguous()
    if unknown:
        raise UserError(
            f"{folder} 里有本项目的模型没有的权重：{'、'.join(unknown[:3])} 等 {len(unknown)} 个。"
        )
    if args.tie_embeddings and "output.weight" in found:  # safetensors' save_model keeps this name of the two
        found["tok_embeddings.weight"] = found.pop("output.weight")
    return found


def open_weights(folder: Path) -> tuple[list[str], Read]:
    """The names of all tensors in a folder, and a function that reads one."""
    if paths := files_of(folder, SINGLE[0]):
        try:
            files = TensorFiles(paths)
        except Damaged as error:
            raise UserError(f"{folder} 的权重文件已损坏或下载不完整：{error.__cause__ or error}") from error
        return list(files), files.read
    if paths := files_of(folder, SINGLE[1]):
        return open_bins(paths)
    raise UserError(f"{folder} 里没有权重（model.safetensors 或 pytorch_model.bin）；请检查下载是否完整。")


def files_of(folder: Path, single: str) -> list[Path]:
    """The one file of that name, or those that its index lists; none if there is neither."""
    if (folder / single).is_file():
        return [folder / single]
    index = folder / f"{single}.index.json"
    if not index.is_file():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} 已损坏；请重新下载。") from error
    paths = [folder / Path(name).name for name in sorted(names)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{folder} 缺少权重文件 {'、'.join(missing)}；请重新下载。")
    return paths


def open_bins(paths: list[Path]) -> tuple[list[str], Read]:
    """The same of PyTorch's older files; `weights_only` unpickles tensors and nothing else."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # torch raises many kinds for a damaged archive
            raise UserError(
                f"{path} 已损坏，或不是新格式的 PyTorch 权重；请重新下载，或用 transformers 转成 safetensors："
                "AutoModelForCausalLM.from_pretrained(文件夹).save_pretrained(新文件夹)。"
            ) from error
    return list(tensors), lambda name: tensors[name]
