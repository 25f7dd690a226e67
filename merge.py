"""Adapters (LoRA) and their base -> a plain checkpoint, which every script and export.py takes.

python merge.py --adapters out/sft --out out/merged
python merge.py --adapters out/medical out/chat --weights 0.7 0.3 --out out/both
"""

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from model import ModelArgs
from sources.report import settings
from stage import ROOT, StageConfig, UserError, require, run_stage
from training import adapter_files, checkpoint
from training.plain import check_replaceable, write_plain
from training.step_folder import CHECKSUMS


@dataclass
class Config(StageConfig):
    """把一个或几个适配器并入模型，得到普通的检查点。"""

    adapters: tuple[Path, ...] = (
        ROOT / "out" / "sft",
    )  # 适配器：训练的文件夹（取最新的检查点），或 peft 的文件夹
    weights: tuple[float, ...] = ()  # 各适配器的权重，默认都是 1
    base: Path | None = None  # 适配器所在的模型；默认为它们记录的那个
    tokenizer: Path | None = None  # 词表；默认用第一个适配器里的，没有就用模型的
    out: Path = ROOT / "out" / "merged"  # 检查点写到哪里
    untie: bool = False  # 先让词嵌入与输出层各用一个矩阵：适配器对两者的改动不同时需要

    def check(self) -> None:
        require(len(self.adapters) > 0, "adapters", "空", "至少要有一个")
        count = len(self.adapters)
        require(len(self.weights) in (0, count), "weights", self.weights, f"要与 {count} 个适配器一一对应")
        require(all(abs(w) < 1e3 for w in self.weights), "weights", self.weights, "必须是不太大的数")


def main(cfg: Config) -> None:
    check_replaceable(cfg.out)
    folders = [checkpoint.find(path) for path in cfg.adapters]
    for folder in folders:
        if not adapter_files.is_adapter(folder):
            raise UserError(f"{folder} 里没有适配器（{adapter_files.CONFIG}）：它不是用 --lora 训练的。")
    adapters = [adapter_files.read(folder) for folder in folders]
    start = checkpoint.load_base(adapters[0], cfg.base, cfg.tokenizer)
    for adapter in adapters:
        adapter_files.check_base(adapter, start.model, start.path)
        warn_of_context(adapter.path, start.model.args)
    if cfg.untie and start.model.args.tie_embeddings:
        untie(start.model)
    shares = cfg.weights or (1.0,) * len(adapters)
    adapter_files.merge(start.model, list(zip(adapters, shares, strict=True)))
    write_plain(cfg.out, start.model.args, start.model.state_dict(), start.tokenizer.files, settings(cfg))
    listed = "、".join(f"{share:g} × {folder}" for share, folder in zip(shares, folders, strict=True))
    print(f"{start.path} + {listed} -> {cfg.out}")


def warn_of_context(folder: Path, args: ModelArgs) -> None:
    """Say so if adapters were trained with another context than the merged model has, which is the first one's."""
    if not (folder / CHECKSUMS).is_file():  # not ours: it does not say
        return
    theirs = checkpoint.read_args(folder)
    for name in ("max_seq_len", "rope_theta", "rope_scaling"):
        if getattr(theirs, name) != getattr(args, name):
            print(
                f"提示：{folder} 是在 {name}={getattr(theirs, name)} 下训练的，合并后的模型用第一个适配器的 "
                f"{getattr(args, name)}。"
            )


def untie(model: nn.Module) -> None:
    """Give the head a matrix of its own, with the same values."""
    model.args = replace(model.args, tie_embeddings=False)
    model.output.weight = nn.Parameter(model.output.weight.detach().clone())


if __name__ == "__main__":
    run_stage(Config, main)
