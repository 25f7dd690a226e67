"""Cross-entropy over a large vocabulary without ever holding all the logits, the way that suits the device.

Shapes: N tokens, C model width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # targets with this value bear no loss


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in fp32 of the logits x @ weight.T against targets, without ever holding all the logits.

    x: (N, C). weight: (V, C). targets: (N,), `IGNORE` where no loss is borne. reduction: "mean" or "sum".
    """
    is_bf16 = x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type)
    by_vocabulary = x.device.type == "cpu" and is_bf16  # measured: docs/LOG.md
    kernel = TiledCrossEntropy if by_vocabulary else ChunkedCrossEntropy
    total = kernel.apply(x, weight, targets, torch.is_grad_enabled())
    return total / (targets != IGNORE).sum().clamp(min=1) if reduction == "mean" else total


def chunk_tokens(device: str, vocab_size: int) -> int:
    """Tokens whose logits exist at once, on a type of device.

    On a GPU more, because each chunk adds to the whole gradient of the weight, in memory.
    """
    return max(512, 2 ** (27 if device == "cuda" else 22) // vocab_size)


def vocabulary_multiple(device: torch.device) -> int:
    """What the vocabulary is filled up to for matrix products: tensor cores want aligned rows, 64,793 is odd.

    https://docs.nvidia.com/deeplearning/performance/dl-performance-matrix-multiplication/index.html
    """
    return 64 if device.type == "cuda" else 1


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, a chunk of tokens at a time; the gradients are made while a chunk's logits exist.

    Memory is chunk * V instead of N * V, and nothing is computed twice; on CPUs it is also faster, because a
    chunk stays in the cache. The idea is Liger's fused linear cross-entropy (https://arxiv.org/abs/2410.10989).
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        V, device, total = len(weight), x.device, torch.zeros((), device=x.device)
        if extra := -V % vocabulary_multiple(device):
            is_mixed = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if is_mixed else weight.dtype
            weight = F.pad(weight.to(dtype), (0, 0, 0, extra))  # (V + extra, C)
        grad_x = torch.zeros_like(x) if with_gradients else x
        is_trained = with_gradients and ctx.needs_input_grad[1]  # a frozen head, as of adapters, is not
        grad_weight = torch.zeros_like(weight, dtype=x.dtype) if is_trained else None
        size = chunk_tokens(device.type, V)
        for xs, ts, grad_xs in zip(x.split(size), targets.split(size), grad_x.split(size), strict=True):
            bears_loss, ts = ts[:, None] != IGNORE, ts[:, None].clamp(min=0)  # (n, 1), (n, 1)
            logits = F.linear(xs, weight)  # (n, V + extra)
            logits[:, V:] = -math.inf
            log_p = logits.float().log_softmax(-1)
            total -= (log_p.gather(1, ts) * bears_loss).sum()
            if with_gradients:  # d loss / d logits = softmax - one-hot
                grad = log_p.exp_().scatter_add_(1, ts, log_p.new_full(ts.shape, -1)).mul_(bears_loss)
                grad = grad.to(xs.dtype)
                grad_xs.copy_(grad @ weight)
                if grad_weight is not None:
                    grad_weight.add_(grad.T @ xs)
        ctx.grads = [grad_x, None if grad_weight is None else grad_weight[:V]]
        return total

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx.grads, grad_total), None, None


class TiledCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy for CPUs whose bf16 products are many times faster than their memory.

    A tile is all tokens and a few vocabulary entries, small enough for the cache. The logits are made twice: for
    their log-sum-exp, and again for the gradients, so that a row of the weight's gradient is written just once.
    The idea is that of cut cross-entropy (https://arxiv.org/abs/2411.09009).
    """

    @staticmethod
    @torch.compiler.disable
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            xs, w = x.bfloat16(), weight.bfloat16()
            bears_loss, ts = targets != IGNORE, targets.clamp(min=0)  # (N,), (N,)
            size = max(512, 2**22 // max(1, len(xs)))
            lse, right = torch.full((2, len(xs)), -math.inf)  # (N,) log-sum-exp, and logits of the targets
            for i, tile in enumerate(w.split(size)):
                logits = F.linear(xs, tile).float()  # (N, size)
                place = ts - i * size  # where the target is in this tile, if it is
                found = logits.gather(1, place.clamp(0, len(tile) - 1)[:, None])[:, 0]
                right = found.where((place >= 0) & (place < len(tile)), right)
                most = logits.amax(-1, keepdim=True)  # (N, 1)
                part = logits.sub_(most).exp_().sum(-1).log_() + most[:, 0]  # logsumexp, in place
                lse = torch.logaddexp(lse, part)
            total = ((lse - right) * bears_loss).sum()
            if with_gradients:
                parts = xs, w, ts, bears_loss, lse, size
                ctx.grads = [*TiledCrossEntropy.gradients(*parts, ctx.needs_input_grad[1])]
                ctx.dtypes = x.dtype, weight.dtype
        return total

    @staticmethod
    def gradients(
        xs: Tensor, w: Tensor, ts: Tensor, bears_loss: Tensor, lse: Tensor, size: int, is_trained: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Of the sum, in fp32: of x (N, C) and, if trained, weight (V, C): d loss / d logits = softmax - one-hot."""
        xs = xs * bears_loss[:, None]
        lse = lse.where(bears_loss, math.inf)[:, None]  # (N, 1); exp(logit - inf) = 0
        grad_x, grad_w = torch.zeros(xs.shape), torch.empty(w.shape if is_trained else (0, w.shape[1]))
        xs_t = xs.T.contiguous()  # oneDNN is twice as fast at xs.T @ p as at p.T @ xs, p being the large one
        for i, tile in enumerate(w.split(size)):
            p = F.linear(xs, tile).float().sub_(lse).exp_().bfloat16()  # (N, size)
            grad_x += p @ tile
            if is_trained:
                grad_w[i * size : (i + 1) * size] = (xs_t @ p).T
        grad_x -= w[ts] * bears_loss[:, None]
        return grad_x, grad_w.index_add_(0, ts, -xs.float()) if is_trained else None

    @staticmethod
    def backward(ctx, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grads = zip(scaled(ctx.grads, grad_total), ctx.dtypes, strict=True)
        return *(None if grad is None else grad.to(dtype) for grad, dtype in grads), None, None


def scaled(grads: list[Tensor | None], factor: Tensor) -> list[Tensor | None]:
    """Take the gradients out of the list, times a factor, in the same memory: the weight's is large."""
    if not grads:
        raise RuntimeError("the gradients of this loss were used up by its first backward pass")
    taken = [None if grad is None else grad.mul_(factor) for grad in grads]
    grads.clear()
    return taken
