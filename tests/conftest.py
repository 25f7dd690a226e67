"""What the tests share: running scripts as a user does, a small vocabulary, and the real data if it is there."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from generation.text import TextStream

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(2)


def script(name: str, *arguments: object, ok: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run a stage script as a user would; a traceback is never acceptable."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600, **options)
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode == 0) == ok, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def edited(rng: random.Random, text: str, edits: int) -> str:
    """The text with so many characters replaced."""
    letters = list(text)
    for place in rng.sample(range(len(letters)), edits):
        letters[place] = chr(0x4E00 + rng.randrange(3000))
    return "".join(letters)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real corpora; tests that need it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("real data (../shared/data) is not here")
    return SHARED


@pytest.fixture(scope="session")
def chatglm2(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(shared / "chatglm2_tokenizer.model")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small demo corpus: raw/, sft/, eval/."""
    from demo.make import make_demo

    folder = tmp_path_factory.mktemp("corpus") / "demo"
    make_demo(folder, seed=1, size_mb=0.5)
    return folder


@pytest.fixture(scope="session")
def vocabulary(corpus: Path) -> Path:
    """A vocabulary of 2,500 pieces trained on the small corpus through the command line."""
    path = corpus / "tokenizer.model"
    script("train_tokenizer.py", "--data", corpus / "raw", "--out", path, "--vocab_size", 2500)
    return path


@pytest.fixture(scope="session")
def tokens(corpus: Path, vocabulary: Path) -> Path:
    """Token files of the small corpus: pretrain.bin and valid.bin."""
    out = corpus / "pretrain.bin"
    script(
        "data_process.py", "--data", corpus / "raw", "--tokenizer", vocabulary, "--out", out,
        "--valid", corpus / "valid.bin",
    )  # fmt: skip
    return out


def torchrun(processes: int, name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a stage script in several processes on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of ids in the pieces in which it is streamed."""
    stream = TextStream(tokenizer)
    return [*map(stream.push, ids), stream.finish()]
