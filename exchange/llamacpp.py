"""Asking llama.cpp, in this Python or in another one that has it."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stage import UserError

WORKER = Path(__file__).with_name("llamacpp_worker.py")
VARIABLE = "LLAMA_CPP_PYTHON"  # the environment variable that names the other Python


@dataclass
class Answers:
    """What llama.cpp says: ids of the texts; logits (T, V) and greedy continuation of each prompt; the template."""

    ids: list[list[int]]
    logits: list[np.ndarray]
    greedy: list[list[int]]
    template: str


def find_python() -> str | None:
    """The Python that has llama-cpp-python: the one that LLAMA_CPP_PYTHON names, or this one; None if neither."""
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    return sys.executable if importlib.util.find_spec("llama_cpp") else None


def ask(
    python: str,
    model: Path,
    texts: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    new: int = 0,
    stop: Sequence[int] = (),
    special: bool = False,
) -> Answers:
    """Load a GGUF file in llama.cpp and ask for ids, logits and greedy continuations of at most `new` ids.

    special: whether the names of control tokens in a text are these tokens. UserError if it fails.
    """
    request = {"texts": list(texts), "special": special, "prompts": [list(p) for p in prompts], "new": new}
    request["length"] = max(map(len, prompts), default=32) + new
    request |= {"stop": list(stop), "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())}
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.npz"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [python, str(WORKER), str(model), str(asked), str(answered)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"无法运行 {VARIABLE} 指定的 {python}：{error.strerror}") from error
        if done.returncode:
            last = (done.stderr.strip() or "没有输出").splitlines()[-1]
            raise UserError(f"llama.cpp（{python}）失败（{done.returncode}）：{last}")
        with np.load(answered) as answer:
            return Answers(
                ids=[answer[f"ids_{i}"].tolist() for i in range(len(texts))],
                logits=[answer[f"logits_{i}"] for i in range(len(prompts))],
                greedy=[answer[f"greedy_{i}"].tolist() for i in range(len(prompts))],
                template=str(answer["template"]),
            )
