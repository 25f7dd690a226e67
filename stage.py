"""What every stage script shares: settings from a dataclass, one-line errors, atomic outputs, the demo.

A stage is a dataclass of settings (one per line, with a comment) and a `main(cfg)`:

    @dataclass
    class Config(StageConfig):
        '''What the stage does.'''
        data: Path = ROOT / "data"  # where the input is
        DEMO = dict(data=DEMO_DIR / "raw")
        INPUT = "data"

    if __name__ == "__main__":
        run_stage(Config, main)

Every field is a `--name value` option with the comment as its help; an unknown name is an error.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from typing import Any, ClassVar

# OpenMP threads that wait at a barrier spin, by default for milliseconds: on two cores a training step is then 1.3 to
# 5 times slower as soon as anything else runs. A shorter spin costs little then, and bridges the gaps between the
# matrix products of decoding when nothing does (docs/LOG.md). libgomp reads this when torch is first imported.
os.environ.setdefault("GOMP_SPINCOUNT", "8000")

UMASK = os.umask(0)  # which cannot be read without being set
os.umask(UMASK)

ROOT = Path(__file__).resolve().parent
DEMO_DIR = ROOT / "data" / "demo"
DEMO_OUT = ROOT / "out" / "demo"


class UserError(Exception):
    """A mistake that the user can mend; its message names the file, the row and the remedy."""


@dataclass
class StageConfig:
    demo: bool = False  # 使用内置演示语料及其超参数（没有找到您的数据时自动启用）

    DEMO: ClassVar[dict[str, Any]] = {}  # values that replace the defaults in the demo
    INPUT: ClassVar[str] = ""  # the field that names the input

    def has_input(self) -> bool:
        """Whether the default input is there; if not, and no other was asked for, the demo runs."""
        return getattr(self, self.INPUT).exists()

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""


def require(ok: bool, name: str, value: object, condition: str) -> None:
    """Raise UserError unless a setting is as it must be. Write `ok` so that NaN fails it."""
    if not ok:
        raise UserError(f"--{name} {condition}，现在是 {value}。")


def parse(config_class: type[StageConfig], argv: list[str] | None = None) -> StageConfig:
    """Read the settings from the command line; fall back to the demo when the default input is missing."""
    import tyro

    argv = sys.argv[1:] if argv is None else argv
    defaults = config_class()
    if "--demo" in argv:
        defaults = replace(defaults, demo=True, **config_class.DEMO)
    cfg = tyro.cli(config_class, default=defaults, args=argv, use_underscores=True)
    name = config_class.INPUT
    may_fall_back = name and not cfg.demo and not {"--no_demo", "--no-demo"} & set(argv)
    if may_fall_back and getattr(cfg, name) == getattr(defaults, name) and not cfg.has_input():
        print("默认的输入还不存在，改用内置演示（等同于 --demo）。", flush=True)
        return parse(config_class, ["--demo", *argv])
    cfg.check()
    return cfg


def run_stage(config_class: type[StageConfig], main: Callable[[Any], None]) -> None:
    """Parse the settings and run the stage."""
    run(lambda: main(parse(config_class)))


def run(work: Callable[[], object]) -> None:
    """Run a script's work; an error of the user's ends it with one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles and LANG=C would fail on Chinese text
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        work()
    except UserError as error:
        sys.exit(f"错误：{error}")
    except KeyboardInterrupt:
        sys.exit("已中断。")
    except BrokenPipeError:  # e.g. `| head`
        os._exit(0)
    except OSError as error:
        sys.exit(f"错误：{error.filename or '读写文件'}：{error.strerror or error}")


def need(path: Path, script: str, cfg: StageConfig) -> Path:
    """Return `path`; in the demo, run the stage that makes it first; otherwise say which one does."""
    if path.exists():
        return path
    if not (cfg.demo and (path.is_relative_to(DEMO_DIR) or path.is_relative_to(DEMO_OUT))):
        raise UserError(f"找不到 {path}；请先运行 python {script}，或用参数指定别的路径。")
    print(f"演示缺少 {path}，先运行 python {script} --demo", flush=True)
    # Under torchrun the earlier stage is one process of its own.
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if subprocess.run([sys.executable, str(ROOT / script), "--demo"], env=alone).returncode:
        raise UserError(f"python {script} --demo 未成功，见上面的输出。")
    return path


@contextmanager
def atomic_path(final: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `final` to write (a file or a folder); rename it only on success.

    A stage that is killed half-way therefore never leaves a half-written file under its final name, and what
    stood there before is replaced only by something whole.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        sync_tree(temporary)
        if final.is_dir() and not temporary.is_dir():
            raise UserError(f"{final} 是文件夹，而这里要写的是文件；请换一个路径。")
        swap(temporary, final)
        # What runs left that were killed just there.
        for leftover in final.parent.glob(f".{escape(final.name)}.*-*"):
            remove(leftover)
    except OSError as error:
        # numpy reports a full disk without its number.
        if error.errno == errno.ENOSPC or (error.errno is None and is_full(final.parent)):
            raise UserError(f"磁盘已满，无法写入 {final}；请清理空间后重跑，旧文件未被改动。") from error
        raise
    finally:
        remove(temporary)


def is_full(folder: Path) -> bool:
    """Whether the disk that holds a folder has next to nothing left."""
    return shutil.disk_usage(folder).free < 8 << 20


def swap(new: Path, final: Path) -> None:
    """Give `new` the name `final`; a folder that has it steps aside first and comes back if that fails."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    if final.is_dir():
        os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.unlink()


def check_writable(path: Path) -> None:
    """Raise UserError now if `path` could not be written at the end of a long run."""
    probe = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"无法写入 {path}（{reason}）；请检查权限和磁盘，或换一个路径。") from error


def sidecar_path(path: Path) -> Path:
    """The JSON that describes an output file, beside it."""
    if path.suffix == ".json":
        raise UserError(f"输出 {path} 不能以 .json 结尾：这个名字要留给旁边的统计文件。")
    return path.with_suffix(".json")


def sync_tree(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk, so that a rename never precedes its content.

    And let others read it as far as the umask does: safetensors makes files for their owner alone.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with suppress(OSError):  # file systems without permissions
                file.chmod(0o666 & ~UMASK)
            with open(file, "r+b") as handle:  # Windows flushes only files open for writing
                os.fsync(handle.fileno())
