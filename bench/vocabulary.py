"""What a larger vocabulary brings: `python bench/vocabulary.py --data ../shared/data --chatglm2 FILE`.

1. Characters per token of held-out texts before and after, for two bases and two sizes of domain vocabulary, with
   the new pieces below the old ones (as expand_vocab.py has them), above them, or all at score 0.
2. A small model learns general text with a small vocabulary and goes on with domain text: as it is, or with the
   vocabulary expanded and the new rows made in the three ways. Bits per byte are comparable between vocabularies.
"""

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script from any folder

import sentencepiece

from chatglm_tokenizer.expansion import expand
from chatglm_tokenizer.model_file import NORMAL, append_pieces
from chatglm_tokenizer.tokenization_chatglm import CHATGLM2, ChatGLMTokenizer
from expand_vocab import encode_pieces
from model import ModelArgs, Transformer
from sources.aside import SetAside
from sources.pretrain_text import read_documents
from sources.records import read_records
from sources.report import table, write_json
from stage import ROOT, StageConfig, UserError, run_stage
from training.vocabulary_rows import add_rows

DOMAIN = {
    "古籍今译": "pretrain/modern_chapters.jsonl.gz",
    "唐诗": "pretrain/tang_poems.jsonl.gz",
    "华佗": "sft/huatuo_llama_data.json",
    "医疗问答": "sft/medical_sft_1K_format.jsonl",
    "医疗多轮": "sft/CMtMedQA_test.json",
}
GENERAL = {"sharegpt": "sft/sharegpt_zh_1K_format.jsonl", "alpaca": "sft/alpaca_zh_demo.json"}
HELD_OUT = 50  # one document in so many
WIDTH, LAYERS, HEADS, LENGTH, ROWS = 128, 4, 4, 128, 16
WAYS = ("subtokens", "mean", "random")


@dataclass
class Config(StageConfig):
    """扩充词表的效果：每个 token 几个字，三种初值的损失，同样步数之后的损失。"""

    data: Path = ROOT.parent / "shared" / "data"  # 真实语料所在的文件夹
    chatglm2: Path = CHATGLM2  # ChatGLM2 词表
    base_size: int = 6000  # 自己的通用词表的条目数
    domain_sizes: tuple[int, ...] = (8000, 20000)  # 领域词表的条目数
    sample_characters: int = 8_000_000  # 训练领域词表用多少字
    pretrain_steps: int = 300  # 先用原词表在通用文本上训练多少步
    steps: int = 200  # 再在领域文本上训练多少步
    characters: int = 3_000_000  # 领域文本取多少字来训练
    out: Path | None = None  # 把结果写成 JSON


def main(cfg: Config) -> None:
    if not cfg.data.is_dir():
        raise UserError(f"找不到 {cfg.data}；请用 --data 指定真实语料的文件夹。")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        domain, general = (read_all(cfg.data, files) for files in (DOMAIN, GENERAL))
        own = vocabulary(folder, "own", general, cfg.base_size, cfg.sample_characters)
        extras = {
            size: vocabulary(folder, f"domain{size}", domain, size, cfg.sample_characters)
            for size in cfg.domain_sizes
        }
        bases = {"自训通用": own}
        if cfg.chatglm2.is_file():
            bases["ChatGLM2"] = ChatGLMTokenizer(cfg.chatglm2)
        compression = [
            row for name, base in bases.items() for row in compress(name, base, extras, {**domain, **general})
        ]
        heads = ["原词表", "领域词表", "次序", "追加", "另加", "用到", *domain, *general]
        print(table(heads, compression), flush=True)
        learning = learn(cfg, folder, own, extras[max(extras)], domain, general)
    if cfg.out:
        write_json(cfg.out, {"heads": heads, "compression": compression, "bits_per_byte": learning})


def read_all(data: Path, files: dict[str, str]) -> dict[str, tuple[list[str], list[str]]]:
    """Of each source the texts to train on and those held out, shuffled."""
    found = {}
    for name, file in files.items():
        aside, path = SetAside(), data / file
        if file.startswith("sft"):
            rows = read_records(path, aside)
            texts = ["\n".join(message["content"] for message in row["messages"]) for row in rows]
        else:
            texts = [document.text for document in read_documents(path, aside)]
        random.Random(0).shuffle(texts)
        held_out = max(1, len(texts) // HELD_OUT)
        found[name] = texts[held_out:], texts[:held_out]
    return found


def vocabulary(folder: Path, name: str, sources: dict, size: int, characters: int) -> ChatGLMTokenizer:
    """A vocabulary of train_tokenizer.py on the training texts of the sources."""
    corpus, out = folder / f"{name}.jsonl", folder / f"{name}.model"
    with corpus.open("w", encoding="utf-8") as file:
        for train, _ in sources.values():
            file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in train)
    command = [ROOT / "train_tokenizer.py", "--data", corpus, "--out", out, "--vocab_size", size]
    command += ["--sample_characters", characters]
    subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return ChatGLMTokenizer(out)


def compress(name: str, base: ChatGLMTokenizer, extras: dict, sources: dict) -> Iterator[list]:
    """Rows of characters per token: the base alone, then expanded in each order."""
    held_out = [texts for _, texts in sources.values()]
    yield [name, "–", "–", 0, 0, 0, *per_token(base.content, held_out, 10**9)[0]]
    for size, extra in extras.items():
        expansion = expand(base, extra.content, "cjk")
        n = len(expansion.appended)
        orders = {"低于原有": None, "高于原有": range(n, 0, -1), "全为 0": [0.0] * n}
        for order, scores in orders.items():
            content, first = expansion.content, expansion.first
            if scores is not None:
                pieces = zip(expansion.appended, map(float, scores), [NORMAL] * n, strict=True)
                content, first = append_pieces(base.content, list(pieces)), base.pieces
            rates, used = per_token(content, held_out, first)
            yield [name, size, order, n, expansion.bridges, used, *rates]


def per_token(content: bytes, texts: list[list[str]], first: int) -> tuple[list[str], int]:
    """Characters per token of each source, and how many ids from `first` on came up."""
    sp, rates, used = sentencepiece.SentencePieceProcessor(model_proto=content), [], set()
    for source in texts:
        rows = sp.encode(source)
        rates.append(f"{sum(map(len, source)) / sum(map(len, rows)):.3f}")
        used.update(i for row in rows for i in row if i >= first)
    return rates, len(used)


def learn(cfg: Config, folder: Path, base: ChatGLMTokenizer, extra, domain: dict, general: dict) -> dict:
    """Bits per byte of held-out domain text for each way, at several steps."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs(WIDTH, LAYERS, HEADS, None, base.vocab_size, max_seq_len=LENGTH))
    fit(model, stream(base, general, 0, 10**9), cfg.pretrain_steps, [])
    expansion = expand(base, extra.content, "cjk")
    path = folder / "expanded.model"
    path.write_bytes(expansion.content)
    new = ChatGLMTokenizer(path)
    subtokens, results, share = encode_pieces(base, expansion.appended), {}, cfg.characters // len(domain)
    for way in ("base", *WAYS):
        tokenizer, start = base, Transformer(model.args)
        start.load_state_dict(model.state_dict())
        if way != "base":
            weights, args = add_rows(model.state_dict(), model.args, expansion.first, subtokens, way)
            tokenizer, start = new, Transformer(args)
            start.load_state_dict({**weights, "output.weight": weights["tok_embeddings.weight"]})
        held_out = stream(tokenizer, domain, 1, 20_000)
        begin, found = time.perf_counter(), [bits_per_byte(start, tokenizer, held_out)]
        tokens = stream(tokenizer, domain, 0, share)
        marks = {cfg.steps // 4, cfg.steps // 2, cfg.steps}
        fit(start, tokens, cfg.steps, found, marks, lambda m, t=tokenizer, h=held_out: bits_per_byte(m, t, h))
        results[way] = found
        figures = "  ".join(f"{value:.3f}" for value in found)
        seconds = time.perf_counter() - begin
        print(f"{way}：第 0、{sorted(marks)} 步的每字节比特数 {figures}（{seconds:.0f} 秒）", flush=True)
    return results


def stream(tokenizer: ChatGLMTokenizer, sources: dict, part: int, characters: int) -> torch.Tensor:
    """Ids of so many characters of each source, <eos> behind every text."""
    chosen = []
    for texts in sources.values():
        room = characters
        for text in texts[part]:
            if room <= 0:
                break
            chosen.append(text[:room])
            room -= len(text)
    random.Random(1).shuffle(chosen)
    eos = tokenizer.special_tokens["<eos>"]
    return torch.tensor([i for row in tokenizer.encode_batch(chosen) for i in (*row, eos)])


def fit(model: Transformer, tokens, steps: int, found: list, marks=(), measure=None) -> None:
    """Train on random windows: AdamW, 2e-3 after 10 steps, linear to 0; `measure` at the marks."""
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(1, steps + 1):
        rate = 2e-3 * min(step / 10, (steps - step + 1) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(tokens) - LENGTH - 1, (ROWS,), generator=rng)
        rows = torch.stack([tokens[s : s + LENGTH + 1] for s in starts.tolist()])  # (B, T + 1)
        model(rows[:, :-1], rows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in marks:
            found.append(measure(model))


@torch.no_grad()
def bits_per_byte(model: Transformer, tokenizer: ChatGLMTokenizer, tokens: torch.Tensor) -> float:
    """Bits per UTF-8 byte of a row of tokens, cut into windows."""
    sizes = torch.from_numpy(tokenizer.bytes_per_token())
    count = (len(tokens) - 1) // LENGTH
    inputs, targets = (tokens[i : i + count * LENGTH].view(count, LENGTH) for i in (0, 1))
    loss = sum(
        float(model(x, y, reduction="sum")) for x, y in zip(inputs.split(32), targets.split(32), strict=True)
    )
    # The first piece of a text carries a space that is not in the text.
    size = int(sizes[targets].sum()) - int((inputs == tokenizer.special_tokens["<eos>"]).sum())
    return loss / math.log(2) / size


if __name__ == "__main__":
    run_stage(Config, main)
