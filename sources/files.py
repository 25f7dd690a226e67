"""Which files under a folder are data."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sources.report import printable
from stage import DEMO_DIR, ROOT, UserError

OUR_OUTPUTS = (DEMO_DIR, ROOT / "data" / "clean")
# Files that lie beside data sets but are not data to be read as text; .bin files hold tokens.
NOT_TEXT = {".bin", ".md", ".model", ".pdf", ".png", ".jpg", ".jpeg", ".pth", ".py", ".safetensors"}
NOT_DATA = {"readme", "license", "dataset_info"}  # with any suffix
REPORTS = {"report.json", "report.html"}  # of our own stages
CONTAINERS = {".gz", ".zst", ".zip", ".json", ".jsonl", ".ndjson", ".txt", ".csv", ".parquet", ".bin"}


def list_files(path: Path, skip: Iterable[Path] = OUR_OUTPUTS) -> list[Path]:
    """The data files of `path`, a file or a folder: recursive, sorted, without our own outputs.

    What `skip` names is left out only below `path`: a folder that is asked for by name is read.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"找不到 {path}；请检查路径，或把数据文件放到该位置后重跑。")
    root = path.resolve()
    skipped = [folder.resolve() for folder in skip]
    skipped = [folder for folder in skipped if folder != root and root.is_relative_to(folder) is False]
    files = [
        file
        for file in sorted(walk(path))
        if is_data_name(file, path) and not is_sidecar(file) and not _below(file.resolve(), skipped)
    ]
    if not files:
        raise UserError(
            f"{path} 里没有数据文件；请放入 JSON、JSON lines、parquet 或 txt（可用 gzip、zstd、zip 压缩）后重跑。"
        )
    return files


def check_kept(written: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise UserError if what is written beside an output would replace a file that is read."""
    kept = {file.resolve() for file in inputs}
    for path in written:
        if path.resolve() in kept:
            raise UserError(f"要写的 {path} 正是输入文件，会被覆盖；请用 --out 换一个文件夹或名字。")


def source_name(file: Path, root: Path) -> str:
    """The data set a file belongs to: its top folder (or zip archive) below `root`, otherwise its own stem."""
    parts = file.relative_to(root).parts if file != root else (file.name,)
    return printable(stem(Path(parts[0])))


def stem(file: Path) -> str:
    """The file name without its container suffixes (`a.jsonl.gz` -> `a`), other dots kept."""
    name = file.name
    while Path(name).suffix.lower() in CONTAINERS:
        name = name[: -len(Path(name).suffix)]
    return name or file.name


def is_data_name(file: Path, root: Path) -> bool:
    """Whether a file below `root` (a folder or a zip archive) may hold data, by its name alone."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(root).parts)
    is_no_data = file.stem.lower() in NOT_DATA or file.name in REPORTS or file.suffix.lower() in NOT_TEXT
    return not (hidden or is_no_data)


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, through symbolic links too (each folder once)."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent, name) for name in files if Path(parent, name).is_file())


def is_sidecar(file: Path) -> bool:
    """Whether a JSON file is what a stage of ours wrote beside its token file, vocabulary or instructions."""
    beside = any(file.with_suffix(suffix).exists() for suffix in (".bin", ".model", ".csv"))
    if file.suffix != ".json" or not beside or not file.is_file() or file.stat().st_size > 10_000_000:
        return False
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    ours = ({"dtype", "tokens"}, {"own"}, {"written", "set_aside"})
    return isinstance(content, dict) and any(fields <= set(content) for fields in ours)


def _below(file: Path, folders: list[Path]) -> bool:
    return any(file.is_relative_to(folder) for folder in folders)
