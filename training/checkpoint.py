"""Checkpoints: `out/<stage>/step_XXXXXXXX/`, written under a temporary name and renamed when whole.

    model.safetensors        weights (a tied matrix once)
    optimizer.safetensors    what the optimizer remembers, `<parameter>.<key>`
    config.json              ModelArgs
    train_config.json        the stage's settings
    tokenizer.model          the vocabulary; of an imported model tokenizer.json, tokenizer_config.json and
                             generation_config.json
    state.json               step, tokens, what the data order depends on, the scaler
    checksums.json           xxh3-128 of every other file; written last

Of a run that trains adapters, these stand in place of the weights (training/adapter_files.py).

Of a sharded run the first two are `model-00001-of-00004.safetensors`, ...: one file of each process's rows, which
every reader puts together by itself. Nothing is pickled. Whoever reads a checkpoint takes a folder and learns
shape and vocabulary from it. Hugging Face folders (exchange/) and the original project's `.pth` files (plain state
dicts) are read too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.load import load_tokenizer
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2
from exchange.hf_config import args_from_hf
from exchange.hf_reader import read_hf_config, read_hf_weights
from model import ModelArgs, Transformer
from rope import rope_table
from stage import UserError
from training import adapter_files, state
from training.adapter_files import AdapterFolder
from training.original_pth import args_from_weights, read_pth
from training.step_folder import CHECKSUMS, Damaged, is_of_earlier_format
from training.step_folder import list_steps as list_steps  # part of what this module offers
from training.step_folder import verify as verify
from training.tensor_files import TensorFiles
from training.writer import Writer as Writer


@dataclass
class Checkpoint:
    """What was loaded: the model, the vocabulary that goes with it, and where it came from."""

    model: Transformer
    tokenizer: Tokenizer
    path: Path


def restore(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the model and the optimizer from a checkpoint of any number of processes; returns its counters.

    Damaged if it is torn or corrupt, UserError if it is of another format or run, in all processes alike; nothing
    is changed before all files have been verified.
    """
    files = counters = numbers = error = None
    try:
        adapter_files.check_same(folder, model)
        files, counters, numbers = open_verified(
            folder, adapter_files.KIND if state.adapters_of(model) else "model"
        )
    except UserError as raised:
        error = raised
    agree(error)
    weights, memory = files
    try:
        read = adapter_files.reader(weights, model.args) if state.adapters_of(model) else weights.read
        state.restore_weights(model, read)
        state.restore_optimizer(model, optimizer, iter(memory), numbers, memory.read)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder} 与现在的模型或优化器不符：{error}") from error
    return counters


def open_verified(folder: Path, kind: str) -> tuple[tuple[TensorFiles, TensorFiles], dict, state.Numbers]:
    """Weights (`kind`) and optimizer of a checkpoint, counters and numbers; each process verifies a share of files."""
    if not folder.is_dir():
        raise UserError(f"找不到 {folder}：--out 要放在所有机器共享的文件系统上。")
    if is_of_earlier_format(folder):
        raise UserError(
            f"{folder} 是旧格式的检查点，不能 --resume；它的权重仍可使用（评测，或 sft.py --init）。"
        )
    if not (folder / CHECKSUMS).is_file():
        raise Damaged(f"{folder} 里没有 {CHECKSUMS}，不完整；请用更早的检查点。")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    verify(folder, rank=rank, world=world)
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        counters, numbers = saved["counters"], saved["optimizer"]
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{folder / 'state.json'} 已损坏或不完整；请用更早的检查点。") from error
    return (
        tuple(TensorFiles(tensor_paths(folder, kind)) for kind in (kind, "optimizer")),
        counters,
        numbers,
    )


def agree(error: UserError | None) -> None:
    """Raise in every process the first error that any has met, so that all take the same way out of it."""
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    if first := next((e for e in errors if e is not None), None):
        raise first


def tensor_paths(folder: Path, kind: str) -> list[Path]:
    """The one file, or every process's, of the weights ("model") or the optimizer."""
    single = folder / f"{kind}.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
    if not paths or (paths != [single] and len(paths) != int(paths[0].stem[-5:])):
        raise Damaged(f"{folder} 里没有完整的 {kind}*.safetensors；请用更早的检查点。")
    return paths


def find(path: Path) -> Path:
    """The checkpoint that a user means: a step folder, the newest of a run's, a Hugging Face folder, or a .pth."""
    is_folder = adapter_files.is_adapter(path) or next(path.glob("model*.safetensors"), None)
    if path.is_file() or is_folder or read_hf_config(path) is not None:
        return path
    if not path.exists():
        raise UserError(
            f"找不到检查点 {path}；请先运行 python pretrain.py，或指定检查点文件夹、Hugging Face 模型文件夹、"
            "原项目的 .pth 文件。"
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
    change: Callable[[ModelArgs], ModelArgs] = lambda args: args,
    weights: bool = True,
) -> Checkpoint:
    """Load a model with its vocabulary from a step folder, a run's folder, a Hugging Face folder or an original .pth.

    tokenizer: overrides the checkpoint's (a .pth has none; by default the ChatGLM2 vocabulary).
    n_heads: of a .pth whose shape is not one of the known ones. change: of the shape, such as a longer context.
    weights: False leaves them out, for an estimate: the model is on the meta device.
    Adapters are loaded with their base, and merged into it.
    """
    path = find(path)
    if adapter_files.is_adapter(path):
        return load_adapted(path, device, tokenizer, change, weights)
    state_dict = read_pth(path) if path.is_file() else {}
    args = args_from_weights(state_dict, path, n_heads) if state_dict else read_args(path)
    vocabulary = load_tokenizer(tokenizer or (path if path.is_dir() else CHATGLM2))
    if vocabulary.least_rows > args.vocab_size:
        raise UserError(
            f"词表 {vocabulary.vocab_file} 有 {vocabulary.least_rows} 个条目，而 {path} 的模型只有 "
            f"{args.vocab_size} 个；请用 --tokenizer 指定训练它的词表。"
        )
    if not weights:
        with torch.device("meta"):
            return Checkpoint(Transformer(change(args)), vocabulary, path)
    state_dict = state_dict or with_tied(read_weights(path), args)
    return Checkpoint(build(change(args), state_dict, path).to(device), vocabulary, path)


def load_adapted(
    path: Path,
    device: torch.device | str,
    tokenizer: Path | None,
    change: Callable[[ModelArgs], ModelArgs],
    weights: bool,
) -> Checkpoint:
    """The base of adapters with these merged into it."""
    adapter = adapter_files.read(path)
    loaded = load_base(adapter, None, tokenizer, change, weights)
    if weights:
        adapter_files.check_base(adapter, loaded.model, loaded.path)
        adapter_files.merge(loaded.model, [(adapter, 1.0)])
    return Checkpoint(loaded.model.to(device) if weights else loaded.model, loaded.tokenizer, path)


def load_base(
    adapter: AdapterFolder,
    base: Path | None,
    tokenizer: Path | None,
    change: Callable[[ModelArgs], ModelArgs] = lambda args: args,
    weights: bool = True,
) -> Checkpoint:
    """The model that adapters stand on, in the shape that they were trained with, with their vocabulary.

    base: where it is, if not where they say.
    """
    base = base or adapter.base
    if base == Path() or not base.exists():
        raise UserError(
            f"找不到 {adapter.path} 的适配器所依附的模型 {base}；请把它放回原处，或用 "
            f"python merge.py --adapters {adapter.path} --base 它现在的位置 --out 新文件夹。"
        )
    if not (adapter.path / CHECKSUMS).is_file():  # not ours: it has no shape of its own
        return load(base, "cpu", tokenizer or vocabulary_of(adapter.path), None, change, weights)
    args = read_args(adapter.path)
    return load(base, "cpu", tokenizer or adapter.path, args.n_heads, lambda _: change(args), weights)


def vocabulary_of(folder: Path) -> Path | None:
    """The folder, if the program that trained adapters has saved a vocabulary, and its chat format, with them."""
    return (
        folder if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")) else None
    )


def build(args: ModelArgs, weights: dict[str, Tensor], path: Path) -> Transformer:
    """A model of this shape that holds exactly these weights: those in fp32 are not copied."""
    with torch.device("meta"):
        model = Transformer(args)
    try:
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True, assign=True)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} 的权重与模型形状不符：{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    if args.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.rope = rope_table(args)
    return model


def with_tied(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The weights with the tied matrix under both of its names."""
    if args.tie_embeddings and "tok_embeddings.weight" in weights:
        return {**weights, "output.weight": weights["tok_embeddings.weight"]}
    return weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, put together if they are in several files; UserError if damaged.

    Of a Hugging Face folder as well, under our names and in fp32.
    """
    if read_hf_config(folder) is not None:
        return read_hf_weights(folder, read_args(folder))
    paths = tensor_paths(folder, "model")
    try:
        files = TensorFiles(paths)
        weights = {name: files.read(name) for name in files}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{paths[0]} 已损坏或不完整（{error}）；请用更早的检查点。") from error
    verify(folder, "model*.safetensors")
    return weights


def read_args(folder: Path) -> ModelArgs:
    """The shape of a checkpoint, or of a Hugging Face folder."""
    if (config := read_hf_config(folder)) is not None:
        return args_from_hf(config, folder)
    try:
        return ModelArgs(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{folder / 'config.json'} 缺失或不是模型配置：{error}") from error
