"""Whether vLLM answers as we do: `python bench/vllm_check.py --model out/sft --python /path/to/vllm/bin/python`.

vLLM wants an environment of its own (docs/export.md). Its OpenAI server is started on an export of the checkpoint,
unpatched, and asked greedily for continuations of prompts, given as ids and as text, and for chat answers, with and
without a system text and over several turns. Checked: the ids of every answer are those of our own `generate`.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from chatglm_tokenizer.chat import encode_prompt
from exchange.check import DIALOGUES
from generation.batch import generate
from generation.sampling import Sampling
from sources.report import table
from stage import DEMO_OUT, ROOT, StageConfig, UserError, need, require, run_stage
from training import checkpoint

PROMPTS = ("中国的首都是", "感冒了应该怎么办？", "The capital of China", "床前明月光，")


@dataclass
class Config(StageConfig):
    """用 vLLM 的 OpenAI 服务回答，与自己的贪心解码逐个 id 比较。"""

    model: Path = ROOT / "out" / "sft"  # 检查点文件夹
    python: Path = Path("python")  # 装有 vLLM 的环境里的 Python
    max_new_tokens: int = 48  # 每个回答最多多少 token
    timeout: float = 300.0  # 最多等服务多少秒启动
    log: Path | None = None  # 把 vLLM 的输出写到这个文件

    DEMO = dict(model=DEMO_OUT / "sft")
    INPUT = "model"

    def check(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "必须大于 0")
        require(self.timeout > 0, "timeout", self.timeout, "必须大于 0")


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.model, "sft.py", cfg)
    loaded = checkpoint.load(cfg.model)
    loaded.model.eval()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        export = [
            sys.executable,
            str(ROOT / "export.py"),
            "--model",
            str(loaded.path),
            "--out",
            str(exported),
        ]
        subprocess.run(export, check=True)
        log = open(cfg.log or Path(folder) / "log", "w+", encoding="utf-8")  # noqa: SIM115 (closed below)
        port = free_port()
        server = start(cfg, exported, port, log)
        try:
            wait_until_healthy(server, port, cfg.timeout, log)
            rows = compare(cfg, loaded, port)
        finally:
            stop(server)
            log.close()
    print(table(["请求", "token 数", "结果"], rows))
    if different := sum(row[2] != "相同" for row in rows):
        raise UserError(f"{different} 个回答与自己的贪心解码不同，见上表。")


def start(cfg: Config, exported: Path, port: int, log) -> subprocess.Popen:
    """vLLM's server in a process group of its own."""
    command = [str(cfg.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(exported)]
    command += ["--served-model-name", "ours", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager"]
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    try:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    except OSError as error:
        raise UserError(
            f"无法运行 {cfg.python}：{error.strerror}；请用 --python 指定装有 vLLM 的 Python。"
        ) from error


def stop(server: subprocess.Popen) -> None:
    """End the server and the processes that it started."""
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, 9)
        server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen, port: int, timeout: float, log) -> None:
    start = time.monotonic()
    while time.monotonic() - start < timeout:
        if server.poll() is not None:
            log.seek(0)
            errors = [line for line in log if "Error" in line] or ["没有输出"]
            raise UserError(f"vLLM 没有启动：{errors[-1].strip()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                print(f"vLLM 在 {time.monotonic() - start:.0f} 秒后就绪。", flush=True)
                return
        except OSError:
            time.sleep(1)
    raise UserError(f"vLLM 在 {timeout:.0f} 秒内没有就绪；请加大 --timeout。")


def compare(cfg: Config, loaded: checkpoint.Checkpoint, port: int) -> list[list]:
    """One row for each request."""
    tokenizer, rows = loaded.tokenizer, []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        expected = greedy(cfg, loaded, ids, stop_ids=())
        for what, value in {"id": ids, "文本": prompt}.items():
            answer = post(cfg, port, "/v1/completions", {"prompt": value, "ignore_eos": True})
            rows.append(row(f"续写（{what}）：{prompt}", answer, expected, ids, tokenizer))
    for dialogue in DIALOGUES:
        ids = encode_prompt(dialogue, tokenizer, loaded.model.args.max_seq_len)
        answer = post(cfg, port, "/v1/chat/completions", {"messages": dialogue})
        expected = greedy(cfg, loaded, ids, tokenizer.stop_ids)
        if len(expected) < cfg.max_new_tokens:
            expected.append(tokenizer.stop_ids[0])  # vLLM's ids include it
        rows.append(row(f"对话：{dialogue[-1]['content']}", answer, expected, ids, tokenizer))
    return rows


def greedy(cfg: Config, loaded: checkpoint.Checkpoint, ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    sampling, vocab_size = Sampling(cfg.max_new_tokens, temperature=0), loaded.tokenizer.vocab_size
    return generate(loaded.model, [ids], sampling, stop_ids, vocab_size=vocab_size)[0]


def post(cfg: Config, port: int, path: str, content: dict[str, Any]) -> dict[str, Any]:
    body = {
        "model": "ours",
        "temperature": 0,
        "max_tokens": cfg.max_new_tokens,
        "return_token_ids": True,
        **content,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise UserError(f"vLLM 拒绝了 {path}：{error.read().decode(errors='replace')[:300]}") from error


def row(what: str, answer: dict, expected: list[int], prompt: list[int], tokenizer) -> list:
    """What was asked, the length of the answer, and whether prompt and answer have our ids."""
    choice = answer["choices"][0]
    new = choice["token_ids"]
    seen = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
    if seen != prompt:
        return [what, len(new), f"问题的 id 不同：{seen}"]
    if new != expected:
        return [what, len(new), f"{tokenizer.decode(new)!r}，应为 {tokenizer.decode(expected)!r}"]
    return [what, len(new), "相同"]


if __name__ == "__main__":
    run_stage(Config, main)
