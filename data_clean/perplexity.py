"""An optional filter by a model of ours: what it finds too easy is boilerplate, what it finds too hard is noise.

The measure is bits per UTF-8 byte, which does not depend on the vocabulary as perplexity does. That texts in the
middle are the best to train on is CCNet's finding for Wikipedia-like models (https://arxiv.org/abs/1911.00359).
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # torch takes seconds to import, and cleaning needs it only for this
    from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
    from training.checkpoint import Checkpoint

LOW, HIGH = "困惑度过低", "困惑度过高"
LONGEST_PIECE = 16  # characters of a piece of a vocabulary, by SentencePiece's default
LOGITS = {"cpu": 1 << 26, "cuda": 1 << 30}  # computed at once: 256 MB, 4 GB in fp32


def bits_per_byte(
    texts: Sequence[str], checkpoint: Path, max_tokens: int = 512, device: str = "auto"
) -> np.ndarray:
    """How well a model predicts the beginning of each text, in bits per UTF-8 byte, (n,); NaN for empty texts.

    checkpoint: a folder or .pth as `training.checkpoint.load` takes it; UserError if it is none. max_tokens: of
    each text that are looked at, at most the model's context. The same texts give the same figures.
    """
    import torch
    import torch.nn.functional as F

    from model import IGNORE

    loaded = load(checkpoint, device)
    model, eos = loaded.model, loaded.tokenizer.special_tokens["<eos>"]
    rows, sizes = tokens_of(texts, loaded.tokenizer, min(max_tokens, model.args.max_seq_len))
    nats = np.zeros(len(texts))
    budget = LOGITS.get(model.rope.device.type, LOGITS["cpu"]) // model.args.vocab_size
    for batch in batches([len(row) for row in rows], budget):
        length = max(len(rows[i]) for i in batch)
        # Padding lies behind the text, where a causal model does not see it, and bears no loss.
        x = torch.tensor([[eos, *rows[i][:-1], *[0] * (length - len(rows[i]))] for i in batch])  # (B, T)
        y = torch.tensor([[*rows[i], *[IGNORE] * (length - len(rows[i]))] for i in batch])
        with torch.inference_mode():
            logits = model(x.to(model.rope.device)).flatten(0, 1).float()  # (B * T, V)
            loss = F.cross_entropy(logits, y.flatten().to(logits.device), reduction="none").view(y.shape)
        nats[batch] = loss.double().sum(dim=1).cpu().numpy()
    with np.errstate(invalid="ignore"):
        return nats / np.log(2) / sizes


@lru_cache(maxsize=1)
def load(checkpoint: Path, device: str) -> "Checkpoint":
    """The model, ready to predict; loaded once per process."""
    from training import checkpoint as checkpoints
    from training.runtime import choose_device

    loaded = checkpoints.load(checkpoint, choose_device(device))
    loaded.model.eval()
    return loaded


def tokens_of(
    texts: Sequence[str], tokenizer: "ChatGLMTokenizer", max_tokens: int
) -> tuple[list[list[int]], np.ndarray]:
    """Ids of the longest beginning of each text found to fit, and the UTF-8 bytes of that beginning, (n,)."""
    texts = [text[: max_tokens * LONGEST_PIECE] for text in texts]
    rows = tokenizer.encode_batch(texts)
    for i, text in enumerate(texts):
        while (
            len(rows[i]) > max_tokens
        ):  # cut between characters, so that bytes and tokens are of the same text
            text = text[: len(text) * max_tokens // len(rows[i])]
            rows[i] = tokenizer.encode(text)
        texts[i] = text
    return rows, np.array([len(text.encode()) for text in texts], np.int64)


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions in groups of similar length, of at most so many tokens with padding; empty ones are left out."""
    batch: list[int] = []
    for i in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def outside(values: np.ndarray, low: float, high: float) -> dict[str, np.ndarray]:
    """The rules that drop texts, with their positions: bits per byte, (n,), under `low` or over `high`."""
    rules = {LOW: np.flatnonzero(values < low), HIGH: np.flatnonzero(values > high)}
    return {rule: positions for rule, positions in rules.items() if len(positions)}
