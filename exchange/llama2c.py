"""llama2.c's files: the .bin of version 0 that its run.c reads, and the tokenizer.bin that goes with it.

https://github.com/karpathy/llama2.c. A header of seven integers, then the weights in fp32, those of all layers
together: first all attention norms, then all wq, ... A negative vocabulary size says that the output matrix follows
at the end. What the header has no room for is fixed in run.c: rotary base, epsilon, the width of heads.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from chatglm_tokenizer.model_file import BYTE, NORMAL, read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from exchange.original import check_fixed
from exchange.pieces import piece_names
from model import ModelArgs, Transformer
from stage import UserError

HEADER = struct.Struct("<7i")  # dim, hidden_dim, n_layers, n_heads, n_kv_heads, +-vocab_size, max_seq_len
IN_LAYERS = (
    ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo")
    + ("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
)  # fmt: skip
NEVER = -1e30  # a score that run.c's encoder never takes for the best


def write_llama2c(path: Path, model: Transformer) -> None:
    """Write the weights; UserError for a model that run.c would compute otherwise."""
    a = model.args
    check_fixed(a, "llama2.c 的 run.c")
    weights = model.state_dict()
    vocab_size = a.vocab_size if a.tie_embeddings else -a.vocab_size
    cos, sin = model.rope[..., 0], model.rope[..., 1]  # (max_seq_len, D/2) each; run.c skips them
    with open(path, "wb") as file:
        file.write(
            HEADER.pack(a.dim, a.hidden_dim, a.n_layers, a.n_heads, a.n_kv_heads, vocab_size, a.max_seq_len)
        )
        for tensor in [weights[name] for name in names(a)] + [cos, sin]:
            file.write(as_bytes(tensor))
        if not a.tie_embeddings:
            file.write(as_bytes(weights["output.weight"]))


def names(args: ModelArgs) -> list[str]:
    """Our names of the weights in the order of the file, without the output matrix."""
    inside = [f"layers.{i}.{name}.weight" for name in IN_LAYERS for i in range(args.n_layers)]
    return ["tok_embeddings.weight", *inside, "norm.weight"]


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().numpy().astype("<f4").tobytes()


def read_llama2c(path: Path) -> tuple[ModelArgs, dict[str, Tensor]]:
    """The shape and the weights of a .bin of version 0; UserError if its size does not fit its header."""
    content = path.read_bytes()
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack_from(content)
    args = ModelArgs(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=abs(vocab_size),
        hidden_dim=hidden_dim, max_seq_len=max_seq_len, tie_embeddings=vocab_size > 0,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
    order = [(name, shapes[name]) for name in names(args)]
    order += [("rope", (2, max_seq_len, args.head_dim // 2))]
    order += [] if args.tie_embeddings else [("output.weight", shapes["output.weight"])]
    numbers, position, weights = np.frombuffer(content, "<f4", offset=HEADER.size), 0, {}
    if len(numbers) != sum(int(np.prod(shape)) for _, shape in order):
        raise UserError(f"{path} 的大小与它的文件头不符：不是 llama2.c（版本 0）的 .bin，或不完整。")
    for name, shape in order:
        count = int(np.prod(shape))
        weights[name] = torch.from_numpy(numbers[position : position + count].copy()).view(*shape)
        position += count
    del weights["rope"]
    return args, weights


def write_llama2c_tokenizer(path: Path, tokenizer: ChatGLMTokenizer, rows: int) -> None:
    """Write tokenizer.bin: for each id its score, length and bytes, a space for SentencePiece's mark of one.

    rows: of the model's embedding. What text must never become has a score that is never the best.
    """
    model = read_model(tokenizer.content)
    if not model.is_plain_bpe or set(model.kinds[3:259]) != {BYTE}:
        raise UserError(
            f"词表 {tokenizer.vocab_file} 不是字节从 3 开始的普通 BPE，llama2.c 的 run.c 不能用它；"
            "请用 train_tokenizer.py 训练的词表，或 --format hf、gguf。"
        )
    entries = []
    for i, name in enumerate(piece_names(tokenizer, model, rows)):
        is_text = i < len(model.pieces) and model.kinds[i] == NORMAL
        # run.c prints the names of <s> and </s>; its own vocabulary has them on lines of their own.
        name = f"\n{name}\n" if i in (1, 2) else name.replace("▁", " ")
        entries.append((model.scores[i] if is_text else NEVER, name.encode()))
    with open(path, "wb") as file:
        file.write(struct.pack("<I", max(len(name) for _, name in entries)))
        for score, name in entries:
            file.write(struct.pack("<fI", score, len(name)) + name)
