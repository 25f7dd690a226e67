"""Put the weights of a sharded checkpoint into one plain model.safetensors, for programs that are not ours.

python -m training.consolidate out/pretrain/step_00010000

Our own scripts read the shards as they are. The training state stays sharded: `--resume` reads it as it is, too.
"""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tyro.conf import Positional

from stage import StageConfig, UserError, atomic_path, check_writable, run_stage
from training import checkpoint


@dataclass
class Config(StageConfig):
    """把多卡切分保存的权重合并成一个 safetensors 文件。"""

    folder: Positional[Path] = Path("out/pretrain")  # 检查点文件夹，或一次训练的文件夹（取其中最新的）
    out: Path | None = None  # 写到哪里；默认为检查点旁边的 step_XXXXXXXX.safetensors


def main(cfg: Config) -> None:
    folder = checkpoint.find(cfg.folder)
    if not folder.is_dir():
        raise UserError(f"{folder} 不是检查点文件夹。")
    out = cfg.out or folder.with_suffix(".safetensors")
    check_writable(out)
    weights = checkpoint.read_weights(folder)
    with atomic_path(out) as temporary:
        save_file(weights, temporary, {"format": "pt"})
    print(f"{folder} 的 {len(weights)} 个权重 -> {out}")


if __name__ == "__main__":
    run_stage(Config, main)
