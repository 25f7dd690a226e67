"""The Llama-2 model: shape and layers; its loss is in loss.py, generating with it in generation/.

Parameter names and the rotary layout are Meta's (and llama2.c's), so original `.pth` files load as they are.
Shapes: B batch, T tokens, C model width, H query heads, K key/value heads, D head width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loss import IGNORE as IGNORE  # part of what this module offers
from loss import cross_entropy
from rope import rope_table, standard_scaling


@dataclass
class ModelArgs:
    """The shape of a model. Field names are Meta's; the defaults are the published 92M model."""

    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention
    vocab_size: int = 64793
    hidden_dim: int | None = None  # feed-forward width; by default 8/3 dim, rounded up to multiple_of
    multiple_of: int = 32
    norm_eps: float = 1e-5
    max_seq_len: int = 512
    rope_theta: float = 10000.0
    dropout: float = 0.0
    tie_embeddings: bool = True  # the output matrix is the embedding matrix
    head_dim: int | None = None  # width of a head; by default dim / n_heads
    rope_scaling: dict | None = None  # extension of the context, under Hugging Face's keys (rope.py)

    def __post_init__(self) -> None:
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        if self.hidden_dim is None:
            self.hidden_dim = self.multiple_of * math.ceil(int(8 * self.dim / 3) / self.multiple_of)
        if min(self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.max_seq_len, self.vocab_size) < 1:
            raise ValueError("every size of a model must be at least 1")
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads if self.dim % self.n_heads == 0 else 1
        if self.n_heads % self.n_kv_heads or self.head_dim % 2 or self.head_dim < 2:
            raise ValueError("n_heads must divide dim into an even width, and n_kv_heads divide n_heads")
        self.rope_scaling = standard_scaling(self.rope_scaling, self.max_seq_len)


# `pretrain.py --model NAME`. The large ones keep to widths that every quantisation format accepts.
PRESETS: dict[str, dict] = {
    "demo": dict(dim=256, n_layers=4, n_heads=4, max_seq_len=256),
    "92M": dict(dim=512, n_layers=8, n_heads=8, max_seq_len=512),
    "218M": dict(dim=1024, n_layers=12, n_heads=8, max_seq_len=1024),
    "500M": dict(dim=1280, n_layers=20, n_heads=20, max_seq_len=2048, multiple_of=256),
    "1B": dict(dim=2048, n_layers=20, n_heads=32, n_kv_heads=4, max_seq_len=2048, multiple_of=256),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        exact, weight = x.float(), self.weight.float()
        if x.device.type == "cpu" and not torch.is_grad_enabled():
            # F.rms_norm is a dozen operations on a CPU, but keeps less for the backward pass.
            mean_square = torch.linalg.vecdot(exact, exact) / len(weight)
            return (exact * torch.rsqrt(mean_square + self.eps).unsqueeze(-1) * weight).type_as(x)
        return F.rms_norm(exact, weight.shape, weight, self.eps).type_as(x)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its position's angle.

    x: (B, T, heads, D). rope: (B or 1, T, D/2, 2), cosines and sines in fp32.
    """
    pairs = x.unflatten(-1, (-1, 2))  # (B, T, heads, D/2, 2)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # A complex product reads memory in order, which is three to eight times as fast (docs/LOG.md).
        angles = torch.view_as_complex(rope).unsqueeze(2)  # (B or 1, T, 1, D/2)
        return torch.view_as_real(torch.view_as_complex(pairs.float()) * angles).flatten(-2).type_as(x)
    even, odd = pairs.unbind(-1)  # (B, T, heads, D/2)
    cos, sin = rope.to(x.dtype).unsqueeze(2).unbind(-1)  # (B or 1, T, 1, D/2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Cache(Protocol):
    """What a forward pass needs of the keys and values of earlier tokens; see generation/cache.py."""

    positions: Tensor  # (B, T) of the new tokens
    mask: Tensor | None  # (B, 1, T, S), what they may attend to; None: everything

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, T, K, D) and return all of their rows, (B, S, K, D)."""


def document_positions(documents: Tensor) -> Tensor:
    """The position of each token within its document, (B, T): how far the document's number goes back."""
    place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return place - place.where(is_first, 0).cummax(1).values


def document_mask(documents: Tensor) -> Tensor:
    """What each token may attend to, (B, 1, T, T): itself and what precedes it in its own document."""
    return (documents[:, :, None] == documents[:, None, :]).tril().unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.args, self.layer = args, layer
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)
        self.joined: nn.Module | None = None  # wq, wk and wv as one layer (generation/prepare.py)

    def forward(self, x: Tensor, rope: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        D = self.args.head_dim
        q, k, v = self.joined(x) if self.joined else (self.wq(x), self.wk(x), self.wv(x))
        q = apply_rope(q.unflatten(-1, (-1, D)), rope)  # (B, T, H, D)
        k = apply_rope(k.unflatten(-1, (-1, D)), rope)  # (B, T, K, D)
        v = v.unflatten(-1, (-1, D))  # (B, T, K, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, K, D)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, H or K, T or S, D)
        dropout = self.args.dropout if self.training else 0.0
        grouped = self.args.n_kv_heads != self.args.n_heads
        if grouped and mask is not None and q.is_cuda:
            # CUDA's fused kernels take a mask or grouped heads, not both; the fallback holds all the scores
            # (https://github.com/huggingface/transformers/pull/39412).
            k, v = (heads.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for heads in (k, v))
            grouped = False
        causal = mask is None and cache is None
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, enable_gqa=grouped)
        return F.dropout(self.wo(y.transpose(1, 2).flatten(-2)), dropout)  # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.dropout = nn.Dropout(args.dropout)
        self.joined: nn.Module | None = None  # w1 and w3 as one layer (generation/prepare.py)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.joined(x) if self.joined else (self.w1(x), self.w3(x))  # (B, T, hidden_dim) each
        return self.dropout(self.w2(F.silu(gate) * up))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, cache, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Llama-2: `model(tokens)` gives logits (B, T, V); `model(tokens, targets)` gives the loss."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.recompute = (
            False  # keep only each layer's input for backward, and make the rest again: less memory
        )
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.dropout = nn.Dropout(args.dropout)
        self.layers = nn.ModuleList(TransformerBlock(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", rope_table(args), persistent=False)
        self.init_weights()

    def init_weights(self) -> None:
        """N(0, 0.02); matrices that write to the residual stream are scaled by 1/sqrt(2 layers) (GPT-2)."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("wo.weight", "w2.weight"))
                std = 0.02 / math.sqrt(2 * self.args.n_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: Cache | None = None,
        last: Tensor | None = None,
        reduction: str = "mean",
        documents: Tensor | None = None,
        labelled: Tensor | None = None,
    ) -> Tensor:
        """Logits, or the loss when there are targets.

        tokens: (B, T) ids. targets: (B, T) ids of the next tokens, `IGNORE` where no loss is borne.
        cache: the tokens before these. last: (B,) the only place of each row whose logits are wanted.
        reduction: "mean" or "sum" over the targets that bear loss. ValueError if T exceeds max_seq_len.
        documents: (B, T) numbers of the documents (without a cache): a token sees those of its own number only,
        and positions restart where the number changes; padding has a number of its own.
        labelled: (n,) places among the B * T targets, all that bear loss among them: logits are made of these alone.
        """
        T, limit = tokens.shape[1], self.args.max_seq_len
        if limit < T:
            raise ValueError(f"{T} tokens exceed max_seq_len={limit}")
        rope, mask = self.rope[None, :T], None  # (1, T, D/2, 2)
        if cache is not None:
            rope = self.rope[cache.positions]  # (B, T, D/2, 2)
            mask = cache.mask  # (B, 1, T, S)
        elif documents is not None:
            rope = self.rope[document_positions(documents)]  # (B, T, D/2, 2)
            mask = document_mask(documents)  # (B, 1, T, T)
        x = self.dropout(self.tok_embeddings(tokens))  # (B, T, C)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, cache, mask, use_reentrant=False)
            else:
                x = layer(x, rope, cache, mask)
        if targets is not None:
            x, targets = x.flatten(0, 1), targets.flatten()  # (B * T, C), (B * T,)
            if labelled is not None:
                x, targets = x.index_select(0, labelled), targets.index_select(0, labelled)  # (n, C), (n,)
            return cross_entropy(self.norm(x), self.output.weight, targets, reduction)
        if last is not None:
            x = x[torch.arange(len(x), device=x.device), last][:, None]  # (B, 1, C)
        return self.output(self.norm(x))  # (B, T or 1, V)

    def num_params(self) -> int:
        """Number of weights; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, seq_len: int | None = None) -> int:
        """Training FLOPs per token, forward and backward: 6 N + 12 L C T (PaLM, appendix B).

        N counts every matrix that a token is multiplied with: the head, but not the embedding look-up.
        """
        lookup = 0 if self.args.tie_embeddings else self.tok_embeddings.weight.numel()
        width = self.args.n_heads * self.args.head_dim  # C, unless the heads' width is given apart
        attention = 12 * self.args.n_layers * width * (seq_len or self.args.max_seq_len)
        return 6 * (self.num_params() - lookup) + attention
