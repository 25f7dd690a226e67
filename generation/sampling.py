"""Choosing the next token: penalties, temperature, top-k, top-p and min-p for rows that each have their own settings.

Shapes: B rows, V vocabulary, W candidates of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CANDIDATES = 1024  # how many of the likeliest tokens are sorted before top-p resorts to sorting all of them


@dataclass(frozen=True)
class Sampling:
    """How one request is continued. Raises ValueError for values that have no meaning."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # draw among the k likeliest
    top_p: float | None = (
        None  # draw among the fewest likeliest that together reach p (https://arxiv.org/abs/1904.09751)
    )
    min_p: float | None = (
        None  # leave out what is less likely than min_p times the likeliest (https://arxiv.org/abs/2407.01082)
    )
    repetition_penalty: float = (
        1.0  # of tokens in prompt or answer (https://arxiv.org/abs/1909.05858, section 4.1)
    )
    presence_penalty: float = 0.0  # taken from the logit of each token that the answer has
    frequency_penalty: float = 0.0  # the same, times how often it has it
    seed: int | None = None
    stop: tuple[str, ...] = ()  # the answer ends before any of these
    logprobs: int | None = None  # alternatives reported for each token; 0: the chosen one alone

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "top_k": self.top_k is None or self.top_k >= 1,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
            "min_p": self.min_p is None or 0 <= self.min_p <= 1,
            "repetition_penalty": 0.01 <= self.repetition_penalty <= 100,  # beyond, logits overflow
            "presence_penalty": abs(self.presence_penalty) <= 100,
            "frequency_penalty": abs(self.frequency_penalty) <= 100,
            "stop": all(self.stop),
            "logprobs": self.logprobs is None or self.logprobs >= 0,
        }
        for name, fits in allowed.items():
            if not fits:
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token under the model itself, before penalties, temperature and the rest."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest alternatives, (id, logprob), likeliest first


def sample(logits: Tensor, settings: Sequence[Sampling], uniform: Sequence[float]) -> Tensor:
    """Draw one id per row, (B,), from logits (B, V) fp32; `uniform` holds one number of [0, 1) for each row.

    In the order of Hugging Face: temperature, top-k, top-p, min-p. A row's draw depends on nothing but the row.
    """
    ids = logits.argmax(-1)
    few = [i for i, s in enumerate(settings) if s.temperature and (s.top_k or (s.top_p or 1) < 1)]
    all_ = [i for i, s in enumerate(settings) if s.temperature and i not in few]
    for rows, draw in ((few, draw_from_few), (all_, draw_from_all)):
        if rows:
            chosen = [settings[i] for i in rows]
            scaled = logits[rows] / column([s.temperature for s in chosen], logits)
            ids[rows] = draw(scaled, chosen, column([uniform[i] for i in rows], logits))
    return ids


def draw_from_all(logits: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Ids (B,) drawn from whole rows (B, V), which need not be sorted for it."""
    if any(s.min_p for s in settings):
        ratio = column([s.min_p or 0 for s in settings], logits)
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + ratio.log(), -torch.inf)
    return invert(logits.softmax(-1), uniform)


def draw_from_few(logits: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Ids (B,) drawn from the likeliest of each row (B, V): those within top-k, top-p and min-p."""
    V = logits.shape[-1]
    k = column([min(s.top_k or V, V) for s in settings], logits)
    p = column([s.top_p or 1 for s in settings], logits)
    total = logits.logsumexp(-1, keepdim=True)  # (B, 1)
    width = max(min(s.top_k or CANDIDATES, V) for s in settings)
    values, ids = logits.topk(width)  # (B, W), likeliest first
    reached = (values - total).exp().sum(-1, keepdim=True)
    if bool(((k > width) & (reached < p)).any()):
        values, ids = logits.topk(V)
    rank = torch.arange(values.shape[-1], device=logits.device)
    within = values.masked_fill(rank >= k, -torch.inf)
    # Shares of what top-k leaves; of a row without top-k, of everything.
    total = torch.where(k < V, within.logsumexp(-1, keepdim=True), total)
    share = (within - total).exp()
    drop = share.cumsum(-1) - share >= p  # the fewest that together reach p stay
    ratio = column([s.min_p or 0 for s in settings], logits)
    drop |= values < values[:, :1] + ratio.log()
    drop[:, 0] = False
    return ids.gather(-1, invert(share.masked_fill(drop, 0), uniform)[:, None])[:, 0]


def invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The place (B,) where the running sum of weights (B, W) passes the share `uniform` (B, 1) of the whole."""
    sums = weights.cumsum(-1, dtype=torch.float64 if weights.device.type != "mps" else None)
    place = torch.searchsorted(sums, uniform.to(sums.dtype) * sums[:, -1:], right=True)
    last = torch.searchsorted(
        sums, sums[:, -1:].contiguous()
    )  # of rounding, not beyond the last that has a weight
    return torch.minimum(place, last)[:, 0]


def penalise(
    logits: Tensor,
    settings: Sequence[Sampling],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Logits (B, V) with the penalties on what prompts and answers hold so far."""
    rows = [i for i, s in enumerate(settings) if s.penalises]
    if not rows:
        return logits
    chosen = [settings[i] for i in rows]
    counts = count_tokens([answers[i] for i in rows], logits)  # (rows, V)
    seen = (counts > 0) | (count_tokens([prompts[i] for i in rows], logits) > 0)
    part = logits[rows]
    repetition = column([s.repetition_penalty for s in chosen], logits)
    part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
    part = part - column([s.presence_penalty for s in chosen], logits) * (counts > 0)
    part = part - column([s.frequency_penalty for s in chosen], logits) * counts
    logits = logits.clone()
    logits[rows] = part
    return logits


def count_tokens(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each row has each id, (B, V) fp32."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
    real = torch.tensor([[1.0] * len(row) + [0.0] * (width - len(row)) for row in rows])
    counts = like.new_zeros(len(rows), like.shape[-1])
    return counts.scatter_add_(1, ids.to(like.device), real.to(like.device, like.dtype)) if width else counts


def logprobs_of(logits: Tensor, ids: Sequence[int], settings: Sequence[Sampling]) -> list[Logprob | None]:
    """What a row's settings ask to know of the token that was chosen for it; logits (B, V) as the model gave them."""
    found: list[Logprob | None] = [None] * len(ids)
    rows = [i for i, s in enumerate(settings) if s.logprobs is not None]
    if not rows:
        return found
    logprobs = logits[rows].log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor([ids[i] for i in rows], device=logits.device)[:, None])
    most = min(max(settings[i].logprobs for i in rows), logits.shape[-1])
    values, top = (x.tolist() for x in logprobs.topk(most))
    for place, i in enumerate(rows):
        pairs = list(zip(top[place], values[place], strict=True))[: settings[i].logprobs]
        found[i] = Logprob(ids[i], float(chosen[place]), tuple(pairs))
    return found


def column(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers of rows as (B, 1), of the type and on the device of `like`."""
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def uniform(seed: int, step: int) -> float:
    """The number of [0, 1) for a request's step: a hash of both (splitmix64, https://doi.org/10.1145/2660193.2660195).

    Without a generator's state, so that a request draws the same numbers on any device and beside any others.
    """
    mixed = mix(mix(seed) + step)
    return (mixed >> 11) / (1 << 53)


def mix(z: int) -> int:
    """64 bits that depend on all of 64 bits."""
    mask = (1 << 64) - 1
    z = (z + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
