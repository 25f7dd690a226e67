"""The recipes in runs/, and scripts without arguments in a fresh checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def bash(script: str, path: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PATH": path}, timeout=60,
    )  # fmt: skip


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
def test_setup_explains_a_missing_python_and_a_missing_venv(tmp_path) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT / "runs" / "setup.sh", tmp_path / "runs")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "cut"):
        (tools / name).symlink_to(shutil.which(name))
    for script in ("runs/setup.sh", "../runs/setup.sh"):  # from any folder
        done = bash(f"source {script} requirements.txt", str(tools), tmp_path if script[0] == "r" else tools)
        assert done.returncode == 1
        assert "Python 3.10" in done.stderr
    (tools / "python3").write_text('#!/bin/bash\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    (tools / "python3").chmod(0o755)
    done = bash("source runs/setup.sh requirements.txt", str(tools), tmp_path)
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_scripts_without_arguments_run_the_demo_in_a_fresh_checkout(tmp_path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # Tokenising needs the clean corpus and the vocabulary: both are made on the way.
    assert "内置演示" in run("data_process.py")
    demo = tmp_path / "data" / "demo"
    assert {f.name for f in demo.iterdir()} >= {"raw", "clean", "tokenizer.model", "pretrain_data.bin"}
    assert sum(f.stat().st_size for f in (demo / "raw").rglob("*") if f.is_file()) > 8_000_000
    counts = json.loads((demo / "pretrain_data.json").read_text(encoding="utf-8"))
    assert counts["tokens"] > 1_000_000
    run("pretrain.py", "--max_steps", "2", "--eval_tokens", "2000")
    assert (tmp_path / "out" / "demo" / "pretrain" / "step_00000002").is_dir()
    run("sft.py", "--max_steps", "1")
    assert "完全一致" in run("eval.py", "--max_new_tokens", "1")
    # The user's own data comes first as soon as it is there.
    own = tmp_path / "data" / "own.txt"
    lines = [
        f"这是我自己的第{i}篇文章，讲的是{'山川河流花鸟鱼虫'[i % 8]}和{i * 7919 % 1000}件事。"
        for i in range(300)
    ]
    own.write_text("\n".join(lines), encoding="utf-8")
    assert "own" in run(str(Path("data_clean") / "clear.py"))
    assert (tmp_path / "data" / "clean" / "report.json").is_file()
