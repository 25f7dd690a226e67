"""The folders of checkpoints (training/checkpoint.py): which there are, and whether they are as they were written."""

import json
import os
import re
from pathlib import Path

import xxhash

from stage import UserError

CHECKSUMS = "checksums.json"  # xxh3-128 of every other file of a folder; written last


class Damaged(UserError):
    """A checkpoint that is torn or corrupt: an earlier one will do. Other errors are mistakes of settings."""


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, so that an old file is not deleted before the new has its name."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


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


def verify(folder: Path, pattern: str = "*", rank: int = 0, world: int = 1) -> None:
    """Damaged unless the files of a checkpoint that fit the pattern are as they were written.

    rank, world: of several processes each reads its share.
    """
    names = sorted(name for name in read_checksums(folder) if Path(name).match(pattern))
    for name in names[rank::world]:
        path = folder / name
        if not path.is_file() or checksum(path) != read_checksums(folder)[name]:
            raise Damaged(f"{path} 已损坏或缺失（校验和不符）；请用更早的检查点。")


def step_of(folder: Path) -> int:
    """The steps that were done when a checkpoint was written."""
    return int(folder.name.removeprefix("step_"))


def list_steps(out: Path, also_torn: bool = False) -> list[Path]:
    """The checkpoints of a run, oldest first. also_torn: those that were never whole, too."""
    folders = [f for f in out.glob("step_*") if re.fullmatch(r"step_\d{8,}", f.name) and f.is_dir()]
    return sorted(f for f in folders if also_torn or (f / CHECKSUMS).is_file() or is_of_earlier_format(f))


def is_of_earlier_format(folder: Path) -> bool:
    """Whether this is a checkpoint of the format before checksums, of which the weights can still be used."""
    return (folder / "training_state.pt").is_file()
