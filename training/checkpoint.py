"""Checkpoints: `out/<stage>/step_XXXXXXXX/`, written under a temporary name and renamed when whole.

    model.safetensors        weights (a tied matrix once)
    optimizer.safetensors    what the optimizer remembers, `<parameter>.<key>`
    config.json              ModelArgs
    train_config.json        the stage's settings
    tokenizer.model          the vocabulary
    state.json               step, tokens, what the data order depends on, the scaler
    checksums.json           xxh3-128 of every other file; written last

Of a sharded run the first two are `model-00001-of-00004.safetensors`, ...: one file of each process's rows, which
every reader puts together by itself. Nothing is pickled. Whoever reads a checkpoint takes a folder and learns
shape and vocabulary from it. The original project's `.pth` files (plain state dicts) are read too.
"""

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from model import PRESETS, ModelArgs, Transformer
from sources.report import settings as as_json
from sources.report import write_json
from stage import UserError, atomic_path
from training import state, tensor_files
from training.runtime import Runtime
from training.state import Piece
from training.tensor_files import Damaged, TensorFiles

CHECKSUMS = "checksums.json"

# (dim, layers) -> (heads, context) of the .pth files in circulation: the reference sizes and llama2.c's.
KNOWN_HEADS = {(p["dim"], p["n_layers"]): (p["n_heads"], p["max_seq_len"]) for p in PRESETS.values()}
KNOWN_HEADS |= {(64, 5): (8, 512), (288, 6): (6, 256), (768, 12): (12, 1024)}


@dataclass
class Checkpoint:
    """What was loaded: the model, the vocabulary that goes with it, and where it came from."""

    model: Transformer
    tokenizer: ChatGLMTokenizer
    path: Path


class Writer:
    """Writes the checkpoints of a run and deletes the old ones. Every process calls every method."""

    def __init__(self, out: Path, runtime: Runtime, keep_last: int, keep_every: int = 0):
        """keep_last: how many of the newest to keep. keep_every: keep for good those whose step it divides."""
        self.out, self.runtime = out, runtime
        self.keep_last, self.keep_every = keep_last, keep_every

    def save(
        self,
        step: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer | None,
        settings: Any,
        vocabulary: bytes,
        counters: dict,
    ) -> None:
        """Write a checkpoint. counters: what JSON can hold; `restore` returns it. UserError of an earlier write."""
        texts = {"config.json": asdict(model.args), "train_config.json": as_json(settings)}
        tensors, numbers = state.optimizer_state_of(model, optimizer) if optimizer else ({}, {})
        texts["state.json"] = {"counters": counters, "optimizer": numbers}
        groups = {"model": state.weights_of(model), "optimizer": tensors}
        pieces = {kind: {k: state.piece_of(t) for k, t in group.items()} for kind, group in groups.items()}
        self.runtime.main_first(lambda: self.write(step, pieces, texts, vocabulary))

    def wait(self) -> None:
        """Return when the last checkpoint is on disk; UserError if it could not be written."""

    def write(self, step: int, pieces: dict[str, dict[str, Piece]], texts: dict, vocabulary: bytes) -> None:
        """Write the folder and delete what is no longer to be kept."""
        final = self.out / f"step_{step:08d}"
        for leftover in self.out.glob(".step_*.tmp-*"):  # of a run that was killed while saving
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with atomic_path(final) as temporary:
                temporary.mkdir()
                for kind, group in pieces.items():
                    tensor_files.write(temporary / tensor_files.file_name(kind, 0, 1), group)
                for name, content in texts.items():
                    write_json(temporary / name, content)
                (temporary / "tokenizer.model").write_bytes(vocabulary)
                write_json(temporary / CHECKSUMS, {f.name: checksum(f) for f in sorted(temporary.iterdir())})
        except (RuntimeError, SafetensorError, OSError) as error:  # what a full disk looks like from below
            reason = str(error).splitlines()[0]
            raise UserError(
                f"无法写入检查点 {final}（磁盘已满或不可写？旧检查点未被改动）：{reason}"
            ) from error
        self.delete_old()

    def delete_old(self) -> None:
        for old in list_steps(self.out)[: -self.keep_last]:
            if not self.keep_every or int(old.name.removeprefix("step_")) % self.keep_every:
                shutil.rmtree(old)


def checksum(path: Path) -> str:
    """xxh3-128 of a file, as hexadecimal digits; 30 GB/s in memory, so that the disk sets the pace."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def read_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file of a checkpoint; empty for one of a format that had none."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return {}
    try:
        return {str(name): str(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise Damaged(f"{path} 已损坏；请用更早的检查点。") from error


def verify(folder: Path, pattern: str = "*") -> None:
    """Damaged unless the files of a checkpoint that fit the pattern are as they were written."""
    for name, expected in read_checksums(folder).items():
        if Path(name).match(pattern):
            path = folder / name
            if not path.is_file() or checksum(path) != expected:
                raise Damaged(f"{path} 已损坏或缺失（校验和不符）；请用更早的检查点。")


def restore(folder: Path, model: Transformer, optimizer: torch.optim.Optimizer) -> dict:
    """Fill the model and the optimizer from a checkpoint of any number of processes; returns its counters.

    Damaged if it is torn or corrupt, UserError if it is of another format or run; nothing is changed before all
    files have been verified.
    """
    if not (folder / CHECKSUMS).is_file():
        raise UserError(
            f"{folder} 是旧格式的检查点，不能 --resume；它的权重仍可使用（评测，或 sft.py --init）。"
        )
    verify(folder)
    try:
        saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        counters, numbers = saved["counters"], saved["optimizer"]
    except (OSError, ValueError, KeyError) as error:
        raise Damaged(f"{folder / 'state.json'} 已损坏或不完整；请用更早的检查点。") from error
    weights, memory = (TensorFiles(tensor_paths(folder, kind)) for kind in ("model", "optimizer"))
    try:
        state.restore_weights(model, weights.read)
        state.restore_optimizer(model, optimizer, iter(memory), numbers, memory.read)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{folder} 与现在的模型或优化器不符：{error}") from error
    return counters


def tensor_paths(folder: Path, kind: str) -> list[Path]:
    """The one file, or every process's, of the weights ("model") or the optimizer."""
    single = folder / f"{kind}.safetensors"
    paths = [single] if single.is_file() else sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
    if not paths or (paths != [single] and len(paths) != int(paths[0].stem[-5:])):
        raise Damaged(f"{folder} 里没有完整的 {kind}*.safetensors；请用更早的检查点。")
    return paths


def list_steps(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folders = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{8,}", f.name)]
    # training_state.pt: the earlier format, of which the weights can still be used
    return sorted(f for f in folders if (f / CHECKSUMS).is_file() or (f / "training_state.pt").is_file())


def find(path: Path) -> Path:
    """The checkpoint that a user means: a step folder, the newest of a run's folder, or a .pth file."""
    if path.is_file() or next(path.glob("model*.safetensors"), None):
        return path
    if not path.exists():
        raise UserError(
            f"找不到检查点 {path}；请先运行 python pretrain.py，或指定检查点文件夹、原项目的 .pth 文件。"
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
) -> Checkpoint:
    """Load a model with its vocabulary from a step folder, a run's folder, or an original .pth.

    tokenizer: overrides the checkpoint's (a .pth has none; by default the ChatGLM2 vocabulary).
    n_heads: of a .pth whose shape is not one of the known ones.
    """
    path = find(path)
    if path.is_file():
        weights = read_pth(path)
        args = args_from_weights(weights, path, n_heads)
    else:
        args = read_args(path)
        weights = with_tied(read_weights(path), args)
    vocabulary = ChatGLMTokenizer(tokenizer or (path / "tokenizer.model" if path.is_dir() else CHATGLM2))
    if vocabulary.vocab_size > args.vocab_size:
        raise UserError(
            f"词表 {vocabulary.vocab_file} 有 {vocabulary.vocab_size} 个条目，而 {path} 的模型只有 "
            f"{args.vocab_size} 个；请用 --tokenizer 指定训练它的词表。"
        )
    return Checkpoint(build(args, weights, path).to(device), vocabulary, path)


def build(args: ModelArgs, weights: dict[str, Tensor], path: Path) -> Transformer:
    """A model of this shape with exactly these weights."""
    model = Transformer(args)
    try:
        model.load_state_dict(weights, strict=True)
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"{path} 的权重与模型形状不符：{str(error).strip().splitlines()[-1].strip()}"
        ) from error
    return model


def with_tied(weights: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The weights with the tied matrix under both of its names."""
    if args.tie_embeddings and "tok_embeddings.weight" in weights:
        return {**weights, "output.weight": weights["tok_embeddings.weight"]}
    return weights


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The whole weights of a checkpoint, put together if they are in several files; UserError if damaged."""
    paths = tensor_paths(folder, "model")
    try:
        files = TensorFiles(paths)
        weights = {name: files.read(name) for name in files}
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{paths[0]} 已损坏或不完整（{error}）；请用更早的检查点。") from error
    verify(folder, "model*.safetensors")
    return weights


def read_args(folder: Path) -> ModelArgs:
    try:
        return ModelArgs(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{folder / 'config.json'} 缺失或不是模型配置：{error}") from error


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
