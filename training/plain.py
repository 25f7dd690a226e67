"""Checkpoints that no run wrote: weights, shape and vocabulary, nothing to resume (training/checkpoint.py).

model.safetensors        weights (a tied matrix once)
config.json              ModelArgs
train_config.json        the settings of the script that made it
tokenizer.model, ...     the vocabulary
checksums.json           xxh3-128 of every other file
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from model import ModelArgs
from sources.report import write_json
from stage import UserError, atomic_path
from training import tensor_files
from training.state import Piece
from training.step_folder import CHECKSUMS, checksum
from training.writer import cannot_write


def write_plain(
    folder: Path,
    args: ModelArgs,
    weights: Mapping[str, Tensor],
    vocabulary: Mapping[str, bytes],
    settings: Mapping[str, Any],
) -> None:
    """Write a checkpoint that `checkpoint.load` reads; the folder appears only when it is whole.

    weights: CPU tensors by Meta's names; the tied matrix may be there under both names and is written once.
    vocabulary: its files by name. settings: what JSON can hold. UserError if it cannot be written, or if the
    folder holds something else than such a checkpoint.
    """
    check_replaceable(folder)
    pieces = {
        name: Piece(weight.detach(), tuple(weight.shape))
        for name, weight in weights.items()
        if not (args.tie_embeddings and name == "output.weight")
    }
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        try:
            tensor_files.write(temporary / "model.safetensors", pieces)
        except (SafetensorError, OSError) as error:
            raise cannot_write(folder, error) from error
        write_json(temporary / "config.json", asdict(args))
        write_json(temporary / "train_config.json", dict(settings))
        for name, content in vocabulary.items():
            (temporary / name).write_bytes(content)
        names = sorted(file.name for file in temporary.iterdir())
        write_json(temporary / CHECKSUMS, {name: checksum(temporary / name) for name in names})


def check_replaceable(folder: Path) -> None:
    """UserError unless the folder is free, empty, or a checkpoint that no run needs any more."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "model.safetensors").is_file() or (folder / "state.json").exists():
            raise UserError(f"{folder} 里已有别的内容，不会覆盖；请用 --out 换一个文件夹。")
    elif folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} 是文件；检查点要写成文件夹，请用 --out 换一个路径。")
