"""Average the weights of checkpoints of one shape and vocabulary into a plain checkpoint.

python average.py --models out/pretrain --last 5 --out out/average          # the last five of a run
python average.py --models out/a out/b --weights 0.7 0.3 --out out/average

The mean of a run's last checkpoints is often better than the last one (https://arxiv.org/abs/1803.05407), and that
of several fine-tunings of one model better than each (https://arxiv.org/abs/2203.05482).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.load import load_tokenizer
from model import ModelArgs
from sources.report import settings
from stage import ROOT, StageConfig, UserError, require, run_stage
from training import checkpoint
from training.adapter_files import is_adapter
from training.plain import check_replaceable, write_plain
from training.step_folder import verify
from training.tensor_files import TensorFiles


@dataclass
class Config(StageConfig):
    """把几个形状与词表都相同的检查点的权重平均，得到一个普通的检查点。"""

    models: tuple[Path, ...] = (ROOT / "out" / "pretrain",)  # 检查点文件夹；训练的文件夹取其中最新的
    last: int = 1  # 每个训练文件夹取最后几个检查点（训练时用 --keep_last 多保留几个）
    weights: tuple[float, ...] = ()  # 各检查点的权重，只看比例；默认相同
    out: Path = ROOT / "out" / "average"  # 检查点写到哪里

    def check(self) -> None:
        require(len(self.models) > 0, "models", "空", "至少要有一个")
        require(self.last >= 1, "last", self.last, "至少为 1")
        usable = not self.weights or (all(0 <= w < 1e9 for w in self.weights) and sum(self.weights) > 0)
        require(usable, "weights", self.weights, "不能为负，且不能全为 0")


@dataclass
class Source:
    """A checkpoint whose weights are read one at a time."""

    path: Path
    args: ModelArgs
    tokenizer: Tokenizer
    names: list[str]
    read: Callable[[str], Tensor]


def main(cfg: Config) -> None:
    check_replaceable(cfg.out)
    folders = [folder for path in cfg.models for folder in last_of(path, cfg.last)]
    if len(folders) < 2:
        raise UserError(f"只有一个检查点（{folders[0]}），没有可平均的；请列出几个 --models，或用 --last。")
    require(
        len(cfg.weights) in (0, len(folders)), "weights", cfg.weights, f"要与 {len(folders)} 个检查点一一对应"
    )
    shares = cfg.weights or (1.0,) * len(folders)
    shares = [share / sum(shares) for share in shares]
    sources = [open_source(folder) for folder in folders]
    for source in sources[1:]:
        check_alike(sources[0], source)
    first = sources[0]
    progress = tqdm(first.names, unit=" 个权重", disable=None)
    weights = {name: mean([source.read(name) for source in sources], shares) for name in progress}
    write_plain(cfg.out, first.args, weights, first.tokenizer.files, settings(cfg))
    listed = "、".join(f"{share:.3g} × {folder}" for share, folder in zip(shares, folders, strict=True))
    print(f"{listed} -> {cfg.out}")


def last_of(path: Path, count: int) -> list[Path]:
    """The last checkpoints of a run's folder, or the one checkpoint that the path is."""
    found = checkpoint.find(path)
    if found == path:
        return [path]
    steps = checkpoint.list_steps(path)
    if len(steps) < count:
        raise UserError(
            f"{path} 里只有 {len(steps)} 个检查点，少于 --last {count}；训练时用 --keep_last 多保留几个。"
        )
    return steps[-count:]


def open_source(path: Path) -> Source:
    """Open a checkpoint; Damaged if its weights are not as they were written."""
    if path.is_file():
        raise UserError(f"{path} 没有记录形状与词表；请给出检查点文件夹。")
    if is_adapter(path):
        raise UserError(
            f"{path} 是适配器，不是完整的模型；几个适配器按权重相加请用 python merge.py --adapters … --weights …，"
            "或先各自合并再平均。"
        )
    args, tokenizer = checkpoint.read_args(path), load_tokenizer(path)
    if checkpoint.read_hf_config(path) is not None:
        weights = checkpoint.read_weights(path)
        return Source(path, args, tokenizer, list(weights), weights.__getitem__)
    verify(path, "model*.safetensors")
    files = TensorFiles(checkpoint.tensor_paths(path, "model"))
    return Source(path, args, tokenizer, list(files), files.read)


def check_alike(first: Source, other: Source) -> None:
    """UserError unless two checkpoints have the same shape, vocabulary and weights by name."""
    ours, theirs = asdict(replace(first.args, dropout=0.0)), asdict(replace(other.args, dropout=0.0))
    if differing := [name for name in ours if ours[name] != theirs[name]]:
        name = differing[0]
        raise UserError(
            f"{other.path} 与 {first.path} 形状不同（{name}：{theirs[name]} 与 {ours[name]}），不能平均。"
        )
    if first.tokenizer.sha256 != other.tokenizer.sha256:
        raise UserError(f"{other.path} 与 {first.path} 的词表不同，不能平均。")
    if set(first.names) != set(other.names):
        odd = sorted(set(first.names) ^ set(other.names))[0]
        raise UserError(f"{other.path} 与 {first.path} 只有一个有权重 {odd}，不能平均。")


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The weighted mean, summed in fp32, in the dtype of the first."""
    total = tensors[0].float() * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total.add_(tensor.float(), alpha=share)
    return total.to(tensors[0].dtype)


if __name__ == "__main__":
    run_stage(Config, main)
