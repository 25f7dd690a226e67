"""Decoding speed on this CPU: `python bench/decoding.py`; with llama.cpp: `--llama_python PYTHON --gguf A.gguf B.gguf`.

Batch 1, a short prompt, 200 new tokens, the 92M shape with random weights. Everything runs in turn, several rounds;
printed are medians. Rows:

    without a cache      the whole text through the model for every token, the original's way
    transformers         LlamaForCausalLM.generate with the same weights
    ours                 generation/, weights in fp32, bf16, int8, int4
    llama.cpp            the files of --gguf (python export.py --format gguf)
    bound                tokens/s if all bytes of the weights came from memory at the measured speed of reading

Then ours with 1, 4 and 16 requests at a time.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

from stage import ROOT, StageConfig, UserError, require, run_stage

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
OURS = ("fp32", "bf16", "int8", "int4")
BATCHES = (1, 4, 16)
BANDWIDTH, UNCACHED = "带宽", "不用缓存 fp32"
LLAMA = """
import sys, time, llama_cpp
params = llama_cpp.llama_cpp.llama_model_default_params
def plain():  # the order of weights for AMX crashes: https://github.com/ggml-org/llama.cpp/issues/20824
    chosen = params(); chosen.use_extra_bufts = False; return chosen
llama_cpp.llama_cpp.llama_model_default_params = plain
path, threads, tokens, prompt = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
llama = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
llama.eval(prompt)
start = time.perf_counter()
for _ in range(tokens):
    llama.eval([llama.sample(temp=0.0)])
print(tokens / (time.perf_counter() - start))
"""


@dataclass
class Config(StageConfig):
    """测解码速度：与不用缓存、transformers、llama.cpp 及内存带宽的上限比较。"""

    rounds: int = 3  # 每种做几轮
    tokens: int = 200  # 生成多少 token
    threads: tuple[int, ...] = (1, 2)  # CPU 线程数
    llama_python: Path | None = None  # 装有 llama-cpp-python 的 Python
    gguf: tuple[Path, ...] = ()  # 同样形状的 GGUF 文件
    worker: int = 0  # （内部）用这么多线程测 PyTorch 的各行

    def check(self) -> None:
        """Raise UserError for settings that cannot work."""
        require(self.rounds >= 1, "rounds", self.rounds, "至少为 1")
        require(1 <= self.tokens <= 500, "tokens", self.tokens, "在 1 与 500 之间")
        require(all(t >= 1 for t in self.threads), "threads", self.threads, "至少为 1")


def main(cfg: Config) -> None:
    if cfg.worker:
        print(json.dumps(measure(cfg.tokens, cfg.worker)))
        return
    if not (cfg.llama_python and cfg.gguf):
        print("没有给 --llama_python 与 --gguf，不测 llama.cpp。")
    speeds: dict[int, dict[str, list[float]]] = {threads: {} for threads in cfg.threads}
    for _ in range(cfg.rounds):
        for threads in cfg.threads:
            found = run_worker(cfg, threads)
            for path in cfg.gguf if cfg.llama_python else ():
                found[f"llama.cpp {path.stem}"] = run_llama(cfg, threads, path)
            for name, speed in found.items():
                speeds[threads].setdefault(name, []).append(speed)
            print(
                threads, {name: round(speed, 1) for name, speed in found.items()}, file=sys.stderr, flush=True
            )
    for threads in cfg.threads:
        show(threads, speeds[threads])


def show(threads: int, speeds: dict[str, list[float]]) -> None:
    """Print the rows of a number of threads with their ratios to decoding without a cache, and to the bound."""
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    bandwidth, first = medians.pop(BANDWIDTH), medians[UNCACHED]
    print(f"\n{threads} 线程；读内存 {bandwidth:.1f} GB/s")
    print(f"{'':<28}{'token/s':>9}{'各轮':>18}{'对不用缓存':>10}{'对带宽上限':>10}")
    for name, median in medians.items():
        spread = f"{min(speeds[name]):.1f}–{max(speeds[name]):.1f}"
        size = next((s for kind, s in weight_bytes().items() if kind in name), None)
        bound = f"{median * size / bandwidth / 1e9:>12.0%}" if size and "×" not in name else ""
        print(f"{name:<28}{median:>10.1f}{spread:>20}{median / first:>11.2f}{bound}")


def weight_bytes() -> dict[str, float]:
    """Bytes of weights that a token reads, by what the rows call the precision."""
    from model import ModelArgs

    a = ModelArgs()
    head = a.vocab_size * a.dim
    layers = a.n_layers * (4 * a.dim**2 + 3 * a.dim * a.hidden_dim)
    per_group = 4 / 32  # scale and zero point, or two bytes of scale
    return {
        "fp32": 4 * (head + layers), "bf16": 2 * (head + layers), "int8": head + layers,
        "int4": head + (0.5 + per_group) * layers, "f32": 4 * (head + layers), "f16": 2 * (head + layers),
        "q8_0": (1 + 2 / 32) * (head + layers), "q4_0": (0.5 + 2 / 32) * (head + layers),
    }  # fmt: skip


def run_worker(cfg: Config, threads: int) -> dict[str, float]:
    """Measure all of PyTorch's rows, one after the other, in a process with so many threads."""
    command = [sys.executable, str(ROOT / "bench" / "decoding.py"), "--worker", str(threads)]
    return json.loads(run_command([*command, "--tokens", str(cfg.tokens)], threads))


def run_llama(cfg: Config, threads: int, path: Path) -> float:
    """Measure llama.cpp with a GGUF file."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(LLAMA)
        script.flush()
        arguments = [script.name, path, threads, cfg.tokens, PROMPT]
        return float(run_command([str(cfg.llama_python), *map(str, arguments)], threads))


def run_command(command: list[str], threads: int) -> str:
    """The last line that a command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "没有输出").splitlines()[-1]
        raise UserError(f"子进程失败：{last}；命令：{' '.join(command[:2])}")
    return done.stdout.strip().splitlines()[-1]


def measure(tokens: int, threads: int) -> dict[str, float]:
    """Tokens/s of each row, its prompt read beforehand; of BANDWIDTH, GB/s."""
    import torch

    from generation.prepare import prepare
    from model import ModelArgs, Transformer

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Transformer(ModelArgs()).eval()
    found = {BANDWIDTH: read_speed()}
    with torch.inference_mode():
        found[UNCACHED] = uncached(model, tokens)
        for dtype in ("fp32", "bf16"):
            found[f"transformers {dtype}"] = by_transformers(model, tokens, dtype)
    for dtype in OURS:
        quantise = dtype if dtype.startswith("int") else None
        ready = prepare(copy.deepcopy(model), "bf16" if quantise else dtype, quantise)
        for batch in BATCHES:
            name = f"本项目 {dtype}" + (f" ×{batch}" if batch > 1 else "")
            found[name] = ours(ready, tokens if batch == 1 else tokens // 4, batch)
    return found


def read_speed() -> float:
    """GB/s of reading memory that no cache holds: the sum of 400 MB of numbers, the best of some."""
    import torch

    data, times = torch.ones(100_000_000), []
    for _ in range(6):
        start = perf_counter()
        data.sum()
        times.append(perf_counter() - start)
    return 4 * len(data) / min(times) / 1e9


def uncached(model, tokens: int) -> float:
    """The whole text through the model for each token; as it is slow, some tokens at half of the length."""
    import torch

    ids, few = torch.randint(0, 60_000, (1, tokens // 2 + len(PROMPT))), max(1, tokens // 10)
    model(ids)
    start = perf_counter()
    for _ in range(few):
        last = torch.tensor([ids.shape[1] - 1])
        model(ids, last=last)[0, -1].argmax()
    return few / (perf_counter() - start)


def by_transformers(model, tokens: int, dtype: str) -> float:
    """LlamaForCausalLM.generate with the same weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from exchange.hf_config import hf_from_args
    from exchange.hf_weights import to_hf

    config = LlamaConfig(**{k: v for k, v in hf_from_args(model.args).items() if k != "model_type"})
    reference = LlamaForCausalLM(config).eval()
    reference.load_state_dict(to_hf(dict(model.state_dict()), model.args), strict=False)
    reference.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    prompt = torch.tensor([PROMPT])
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    reference.generate(prompt, max_new_tokens=4, **options)
    start = perf_counter()
    reference.generate(prompt, max_new_tokens=tokens, **options)
    return tokens / (perf_counter() - start)


def ours(model, tokens: int, batch: int) -> float:
    """generation/ with so many requests at a time; tokens/s of all together."""
    from generation.batch import Batch
    from generation.sampling import Sampling

    together = Batch(model, batch)
    for row in range(batch):
        together.add([*PROMPT[1:], row], Sampling(tokens + 8, temperature=0))
    for _ in range(4):
        together.step()
    start = perf_counter()
    for _ in range(tokens):
        together.step()
    return batch * tokens / (perf_counter() - start)


if __name__ == "__main__":
    run_stage(Config, main)
