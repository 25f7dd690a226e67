"""What was written, read back through another program and compared with the model that it came from."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.chat import UNLIMITED, Message, encode_prompt
from exchange import llamacpp
from exchange.llama2c import read_llama2c
from model import ModelArgs, Transformer
from training import checkpoint
from training.original_pth import args_from_weights, read_pth

TEXTS = (
    "感冒了应该怎么办？多喝水，注意休息，必要时就医。",
    "The capital of China is Beijing. Philosophy, sophomore; 3.14 + 2 = 5.14",
    "混排 mixed  text：两个  空格\n换行\t制表，😀 𠮷野家 龘，\x01控制字符，﷽",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
)
DIALOGUES: tuple[list[Message], ...] = (
    [{"role": "user", "content": "中国的首都是哪里？"}],
    [
        {"role": "system", "content": "你是一个乐于助人的助手。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！有什么可以帮您？"},
        {"role": "user", "content": "Tell me about  Philosophy."},
    ],
)
LARGEST_DIFFERENCE = (
    1e-3  # of fp32 logits that another program computes; a wrong layout is off by whole units
)
# Mean KL divergence of the next token, in nats, that rounding alone does not reach.
LARGEST_KL = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2, "q8_0": 2e-2} | dict.fromkeys(
    ("q5_1", "q5_0", "q4_1", "q4_0"), 0.5
)


@dataclass
class Finding:
    """A line of the report: what was compared, with which result, and whether that is as it must be."""

    what: str
    figure: str
    ok: bool


def check_hf(
    folder: Path, model: Transformer, tokenizer: Tokenizer, template: str | None, dtype: str
) -> list[Finding]:
    """A Hugging Face folder, through transformers. dtype: torch's name; our weights are rounded to it first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    fast = AutoTokenizer.from_pretrained(folder)
    prompts = prompts_of(model, tokenizer)
    with torch.inference_mode():
        other = [theirs(torch.tensor([ids])).logits[0].numpy() for ids in prompts]
    ids = [fast(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    findings = [
        same_logits("transformers", logits_of(rounded(model, getattr(torch, dtype), folder), prompts), other)
    ]
    findings += [same_ids("AutoTokenizer", ids, tokenizer)]
    if template:
        chats = [
            fast.apply_chat_template(d, add_generation_prompt=True, return_dict=False) for d in DIALOGUES
        ]
        expected = [encode_prompt(dialogue, tokenizer, UNLIMITED) for dialogue in DIALOGUES]
        findings.append(Finding("对话模板", f"{len(chats)} 段对话的 id", chats == expected))
    return findings


def check_gguf(path: Path, model: Transformer, tokenizer: Tokenizer, dtype: str) -> list[Finding]:
    """A GGUF file, read by the gguf package and, where there is one, computed by llama.cpp."""
    from exchange.gguf_file import ROPE_FREQS, read_gguf, rope_factors

    fields, weights = read_gguf(path)
    factors = weights.pop(ROPE_FREQS, None)
    expected = rope_factors(model.args).get(ROPE_FREQS)
    same_factors = (factors is None) == (expected is None) and (
        factors is None or torch.allclose(factors, expected)
    )
    keys = {
        "context_length": "max_seq_len", "embedding_length": "dim", "block_count": "n_layers",
        "feed_forward_length": "hidden_dim", "attention.head_count": "n_heads",
        "attention.head_count_kv": "n_kv_heads", "rope.dimension_count": "head_dim", "vocab_size": "vocab_size",
        "rope.freq_base": "rope_theta",
    }  # fmt: skip
    wrong = [key for key, name in keys.items() if fields[f"llama.{key}"] != getattr(model.args, name)]
    prompts = prompts_of(model, tokenizer)
    ours = logits_of(model, prompts)
    names_count = len(fields["tokenizer.ggml.tokens"])
    findings = [
        Finding("元数据", "、".join(wrong) or "形状相同", not wrong and same_factors),
        Finding("词表", f"{names_count:,} 个条目", names_count == model.args.vocab_size),
        small_kl("gguf 包读回的权重", ours, logits_of(built(model.args, weights, path), prompts), dtype),
    ]
    python = llamacpp.find_python()
    if python is None:
        return findings
    answers = llamacpp.ask(python, path, TEXTS, prompts)
    findings.append(same_ids("llama.cpp 分词", answers.ids, tokenizer))
    if dtype == "f32":
        findings.append(same_logits("llama.cpp", ours, answers.logits))
    findings.append(small_kl("llama.cpp", ours, answers.logits, dtype))
    return findings


def check_file(path: Path, model: Transformer) -> list[Finding]:
    """A .pth of the original project, or llama2.c's .bin: read by our own readers, weight for weight."""
    if path.suffix == ".pth":
        weights = read_pth(path)
        args = args_from_weights(weights, path, model.args.n_heads)
    else:
        args, weights = read_llama2c(path)
    theirs = built(args, weights, path)
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "tie_embeddings")
    wrong = [name for name in names if asdict(args)[name] != asdict(model.args)[name]]
    state = theirs.state_dict()
    equal = [torch.equal(value.cpu().float(), state[name]) for name, value in model.state_dict().items()]
    return [
        Finding("形状", "、".join(wrong) or "相同", not wrong),
        Finding("权重", f"{sum(equal)}/{len(equal)} 逐位相同", all(equal)),
    ]


def built(args: ModelArgs, weights: dict[str, Tensor], where: Path) -> Transformer:
    """A model with these weights, the tied matrix under one name or both. where: the file, for messages."""
    return checkpoint.build(args, checkpoint.with_tied(weights, args), where).eval()


def rounded(model: Transformer, dtype: torch.dtype, where: Path) -> Transformer:
    """The model with its weights rounded to a type, computed in fp32."""
    return built(model.args, {name: v.to(dtype).float() for name, v in model.state_dict().items()}, where)


def prompts_of(model: Transformer, tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the texts and dialogues, as long as the model takes them."""
    chats = [encode_prompt(dialogue, tokenizer, UNLIMITED) for dialogue in DIALOGUES]
    return [ids[: model.args.max_seq_len] for ids in [*map(tokenizer.encode, TEXTS), *chats]]


def logits_of(model: Transformer, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """The logits of every position of each prompt, (T, V) fp32."""
    with torch.inference_mode():
        return [model(torch.tensor([p], device=model.rope.device))[0].float().cpu().numpy() for p in prompts]


def same_logits(reader: str, ours: list[np.ndarray], theirs: list[np.ndarray]) -> Finding:
    largest = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    return Finding(f"{reader}，logits", f"最大差 {largest:.1e}", largest < LARGEST_DIFFERENCE)


def small_kl(reader: str, ours: list[np.ndarray], theirs: list[np.ndarray], dtype: str) -> Finding:
    mean = divergence(ours, theirs)
    return Finding(f"{reader}，概率", f"KL 散度 {mean:.1e}", abs(mean) < LARGEST_KL[dtype])


def divergence(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Mean over all positions of KL(ours || theirs) of the next token, in nats."""
    a, b = (torch.from_numpy(np.concatenate(x)).double().log_softmax(-1) for x in (ours, theirs))
    return float((a.exp() * (a - b)).sum(-1).mean())


def same_ids(reader: str, theirs: list[list[int]], tokenizer: Tokenizer) -> Finding:
    different = [text for text, ids in zip(TEXTS, theirs, strict=True) if ids != tokenizer.encode(text)]
    return Finding(reader, f"{len(TEXTS) - len(different)}/{len(TEXTS)} 段文本的 id 相同", not different)
