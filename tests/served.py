"""A small random model on disk, and serve.py running as a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import httpx
import torch
from conftest import ROOT
from safetensors.torch import save_file

from model import ModelArgs, Transformer


def write_model(folder: Path, vocabulary: Path, context: int = 512) -> Path:
    """A checkpoint of a random model; its greedy answers differ from prompt to prompt and seldom end by themselves."""
    torch.manual_seed(0)
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, vocab_size=2500, max_seq_len=context)
    model = Transformer(args)
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.dim() == 2 else 1
    folder.mkdir()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
    save_file(weights, folder / "model.safetensors")
    shape = {key: value for key, value in asdict(args).items() if key in ModelArgs.__dataclass_fields__}
    (folder / "config.json").write_text(json.dumps(shape))
    (folder / "tokenizer.model").write_bytes(vocabulary.read_bytes())
    return folder


class Served:
    """serve.py as a user starts it; `url` is where it listens once it is ready."""

    def __init__(self, model: Path, *options: object):
        command = [
            sys.executable,
            str(ROOT / "serve.py"),
            "--model",
            str(model),
            "--port",
            "0",
            "--precision",
            "fp32",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, *map(str, options)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", env=environment,
        )  # fmt: skip
        self.output: list[str] = []
        self.is_ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.output.append(line)
            if match := re.search(r"已就绪：(http://\S+?)（", line):
                self.url = match[1]
                self.is_ready.set()
        self.is_ready.set()

    def wait(self) -> "Served":
        assert self.is_ready.wait(120), self.output
        assert self.process.poll() is None, "".join(self.output)
        return self

    def stop(self) -> None:
        """SIGTERM, on which it ends in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        assert status == 0 and "Traceback" not in "".join(self.output), "".join(self.output)

    def health(self) -> dict:
        return httpx.get(f"{self.url}/health").json()

    def until(self, seconds: float = 20, **expected: int) -> None:
        """Return when /health says so."""
        end = time.monotonic() + seconds
        while any(self.health()[key] != value for key, value in expected.items()):
            assert time.monotonic() < end, self.health()
            time.sleep(0.02)
