"""Stage 6: what a pretrained model knows: continuations of prompts, perplexity and bits per byte of a text.

python eval_pretrain.py --prompts 床前明月光 中国的首都是 --temperature 0.8 --top_k 30
python eval_pretrain.py --text held_out.jsonl
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from generation.config import InferenceConfig
from generation.engine import Engine
from generation.prepare import Precision
from model import IGNORE, Transformer
from sources.aside import SetAside
from sources.containers import read_rows
from sources.files import list_files
from sources.pretrain_text import read_documents
from stage import DEMO_DIR, DEMO_OUT, ROOT, UserError, need, run_stage

PROMPTS = ("中国的首都是", "床前明月光，", "感冒的常见症状有", "人工智能是")
BATCH = 8  # windows, or prompts, of one forward


@dataclass
class Config(InferenceConfig):
    """预训练模型的评测：续写给定的开头，计算文件的困惑度与每字节比特数。"""

    model: Path = ROOT / "out" / "pretrain"  # 检查点文件夹（取其中最新的），或原项目的 .pth
    precision: Precision = "fp32"  # 评测默认用 fp32，结果与机器无关；auto：硬件擅长 bf16 就用，更快
    prompts: tuple[str, ...] = PROMPTS  # 要续写的开头
    prompts_file: Path | None = None  # 从文件读要续写的开头，一行一个
    text: Path | None = None  # 计算这个文件（或文件夹）的困惑度，格式同预训练语料
    repetition_penalty: float = 1.1  # 大于 1 抑制重复

    DEMO = dict(
        model=DEMO_OUT / "pretrain",
        prompts=(),
        prompts_file=DEMO_DIR / "eval" / "prompts.txt",
        max_new_tokens=60,
    )


def main(cfg: Config) -> None:
    if cfg.demo:
        need(cfg.model, "pretrain.py", cfg)
    loaded = cfg.load()
    continue_prompts(cfg, loaded.model, loaded.tokenizer)
    if cfg.text:
        figures = perplexity(cfg.text, loaded.model, loaded.tokenizer)
        print(
            f"{cfg.text}：{figures['documents']:,} 篇，{figures['tokens']:,} 个 token，"
            f"损失 {figures['loss']:.4f}，困惑度 {figures['perplexity']:.2f}，每字节 {figures['bpb']:.4f} 比特"
        )
        if cfg.quantise:
            exact = replace(cfg, quantise=None).load()
            before = perplexity(cfg.text, exact.model, exact.tokenizer)["perplexity"]
            change = figures["perplexity"] / before - 1
            print(f"量化（{cfg.quantise}）前的困惑度 {before:.2f}，量化后变化 {change:+.2%}")


def continue_prompts(cfg: Config, model: Transformer, tokenizer: ChatGLMTokenizer) -> None:
    """Print each prompt with the model's continuation."""
    prompts = list(cfg.prompts)
    if cfg.prompts_file:
        if not cfg.prompts_file.is_file():
            raise UserError(f"找不到 {cfg.prompts_file}；应为文本文件，一行一个开头。")
        aside = SetAside()
        prompts += [row for _, row in read_rows(cfg.prompts_file, aside) if isinstance(row, str)]
        aside.show()
    prompts = [p for p in prompts if p.strip()]
    room = model.args.max_seq_len // 2
    with Engine(model, tokenizer, slots=BATCH, max_waiting=len(prompts)) as engine:
        answers = [engine.submit(tokenizer.encode(p)[-room:], cfg.sampling()) for p in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"【{prompt}】{answer.text()}\n")


def perplexity(path: Path, model: Transformer, tokenizer: ChatGLMTokenizer) -> dict[str, float]:
    """Loss (nats per token), perplexity and bits per UTF-8 byte of the documents of a file or folder.

    As in training, documents follow one another with <eos> between, and windows of max_seq_len are predicted.
    """
    aside, counts = SetAside(), {"documents": 0, "bytes": 0}
    device, loss, tokens = model.rope.device, 0.0, 0
    for x, y in windows(path, tokenizer, model.args.max_seq_len, counts, aside):
        with torch.inference_mode():
            for row, targets in zip(
                x.to(device), y.to(device), strict=True
            ):  # (T,): quantised heads give logits
                logits = model(row[None])[0].float()  # (T, V)
                loss += float(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"))
        tokens += int((y != IGNORE).sum())
    aside.show()
    if not tokens:
        raise UserError(f"{path} 里没有可用的文本。")
    mean = loss / tokens
    bits = loss / math.log(2) / counts["bytes"]
    return {**counts, "tokens": tokens, "loss": mean, "perplexity": math.exp(min(mean, 700)), "bpb": bits}


def windows(
    path: Path, tokenizer: ChatGLMTokenizer, length: int, counts: dict[str, int], aside: SetAside
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tokens and targets, (BATCH, length) int64; the end is filled up with `IGNORE`."""
    eos = tokenizer.special_tokens["<eos>"]
    size = BATCH * length
    stream = [eos]
    for file in list_files(path):
        for document in tqdm(read_documents(file, aside), file.name, unit="篇", disable=None):
            counts["documents"] += 1
            counts["bytes"] += len(document.text.encode())
            stream += tokenizer.encode(document.text) + [eos]
            while len(stream) > size:
                yield cut(stream[: size + 1], length)
                stream = stream[size:]
    if len(stream) > 1:
        yield cut(stream, length)


def cut(stream: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, (rows, length) each, of up to BATCH * length + 1 ids."""
    rows = -(-(len(stream) - 1) // length)
    x, y = np.zeros(rows * length, dtype=np.int64), np.full(rows * length, IGNORE)
    x[: len(stream) - 1], y[: len(stream) - 1] = stream[:-1], stream[1:]
    return torch.from_numpy(x.reshape(rows, length)), torch.from_numpy(y.reshape(rows, length))


if __name__ == "__main__":
    run_stage(Config, main)
