"""Requests that are decoded together, joining and leaving between steps (continuous batching).

The idea is Orca's (https://www.usenix.org/conference/osdi22/presentation/yu); prompts are read in pieces between the
steps of the others, so that a long one does not make them wait (https://arxiv.org/abs/2308.16369).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from generation.cache import KVCache
from generation.sampling import Logprob, Sampling, logprobs_of, penalise, sample, uniform
from model import Transformer

CHUNK = 256  # most tokens of prompts, padding included, that are read in one step


@dataclass(eq=False)
class Row:
    """A request in the batch."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    ids: list[int] = field(default_factory=list)  # what has been generated, the stop id included
    logprobs: list[Logprob | None] = field(default_factory=list)  # one for each of `ids`
    used: int = 0  # tokens in the cache
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def is_reading(self) -> bool:
        """Whether some of the prompt is yet to be read."""
        return self.used < len(self.prompt)


class Batch:
    """Up to `slots` requests over one KV cache; request i of `rows` has row i of it."""

    def __init__(
        self, model: Transformer, slots: int, stop_ids: Sequence[int] = (), vocab_size: int | None = None
    ):
        """vocab_size: ids from here on are never generated; a model may have more rows than its vocabulary."""
        self.model, self.slots, self.stop_ids = model, slots, frozenset(stop_ids)
        self.vocab_size = vocab_size
        self.limit, self.device = model.args.max_seq_len, model.rope.device
        self.cache = KVCache(model.args, slots, self.device)
        self.rows: list[Row] = []

    def check(self, prompt: Sequence[int]) -> None:
        """Raise ValueError for a prompt that cannot be continued."""
        if not prompt:
            raise ValueError("提示词至少要有一个 token")
        if len(prompt) >= self.limit:
            raise ValueError(f"提示词有 {len(prompt)} 个 token，而上下文只有 {self.limit} 个（max_seq_len）")
        rows = self.vocab_size or self.model.args.vocab_size
        if min(prompt) < 0 or max(prompt) >= rows:
            raise ValueError(f"提示词的 token 应在 0 与 {rows - 1} 之间")

    def add(self, prompt: Sequence[int], sampling: Sampling) -> Row:
        """Let a request join; ValueError for a prompt that cannot be continued. There must be a free slot."""
        self.check(prompt)
        assert len(self.rows) < self.slots, "no free slot"
        seed = int(torch.randint(2**63 - 1, ())) if sampling.seed is None else sampling.seed
        row = Row(list(map(int, prompt)), sampling, seed)
        self.rows.append(row)
        return row

    def remove(self, row: Row) -> None:
        """Let a request leave; the last row moves to its place, so that the rows stay together."""
        place, last = self.rows.index(row), self.rows.pop()
        if last is not row:
            self.cache.move(len(self.rows), place, last.used)
            self.rows[place] = last

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Read a piece of the prompts, then generate the next token of every other row; returns rows with new tokens.

        A finished row has a finish_reason; it is for the caller to remove it.
        """
        reading = [i for i, row in enumerate(self.rows) if row.is_reading]
        if reading:
            self.read(self.choose(reading))
        # Those that got their first token just now wait for the others of the next step.
        old = (i for i in range(len(self.rows)) if i not in reading)
        going = [i for i in old if self.rows[i].ids and not self.rows[i].finish_reason]
        if going:
            self.forward(going, [self.rows[i].ids[-1:] for i in going])
        return [self.rows[i] for i in (*going, *reading) if self.rows[i].ids]

    def choose(self, reading: list[int]) -> list[int]:
        """Rows whose prompts are read next: the first to come, and others as long as all fit into CHUNK."""
        chosen, longest = [], 0
        for i in reading:
            longest = max(longest, len(self.rows[i].prompt) - self.rows[i].used)
            if chosen and longest * (len(chosen) + 1) > CHUNK:
                break
            chosen.append(i)
        return chosen

    def read(self, chosen: list[int]) -> None:
        """Read the prompts of these rows, at most CHUNK tokens of each."""
        self.forward(chosen, [self.rows[i].prompt[self.rows[i].used :][:CHUNK] for i in chosen])

    def forward(self, places: list[int], tokens: list[list[int]]) -> None:
        """Put new tokens of these rows through the model; a row whose tokens are all read gets its next one."""
        rows, counts = [self.rows[i] for i in places], list(map(len, tokens))
        window = self.cache.window(places, [row.used for row in rows], counts)
        padded = [ids + [0] * (max(counts) - len(ids)) for ids in tokens]
        last = torch.tensor(counts, device=self.device) - 1
        logits = self.model(torch.tensor(padded, device=self.device), cache=window, last=last)
        logits = logits[:, 0, : self.vocab_size].float()  # (B, V)
        for row, count in zip(rows, counts, strict=True):
            row.used += count
        ready = [i for i, row in enumerate(rows) if not row.is_reading]
        if ready:
            self.extend([rows[i] for i in ready], logits[ready] if len(ready) < len(rows) else logits)

    def extend(self, rows: list[Row], logits: Tensor) -> None:
        """Choose the next token of each row from its logits (B, V)."""
        settings = [row.sampling for row in rows]
        penalised = penalise(logits, settings, [row.prompt for row in rows], [row.ids for row in rows])
        draws = [uniform(row.seed, len(row.ids)) for row in rows]
        ids = sample(penalised, settings, draws).tolist()
        for row, token, logprob in zip(rows, ids, logprobs_of(logits, ids, settings), strict=True):
            row.ids.append(token)
            row.logprobs.append(logprob)
            if token in self.stop_ids:
                row.finish_reason = "stop"
            elif min(row.sampling.max_new_tokens, self.limit - len(row.prompt)) <= len(row.ids):
                row.finish_reason = "length"


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    stop_ids: Sequence[int] = (),
    slots: int = 32,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Continue prompts, up to `slots` of them together; returns each one's new ids, without the stop id.

    sampling: of all, or of each (stop strings are the engine's, which knows the vocabulary). Of a prompt that is too
    long, the end is kept. A row ends at a stop id, after max_new_tokens, or when it fills max_seq_len. vocab_size:
    as in `Batch`.
    """
    each = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    was_training = model.training
    model.eval()
    batch = Batch(model, min(slots, max(1, len(prompts))), stop_ids, vocab_size)
    waiting, rows = list(zip(prompts, each, strict=True))[::-1], []
    try:
        while waiting or batch.rows:
            while waiting and len(batch.rows) < batch.slots:
                prompt, settings = waiting.pop()
                rows.append(batch.add(crop(prompt, settings, batch.limit), settings))
            for row in batch.step():
                if row.finish_reason:
                    batch.remove(row)
    finally:
        model.train(was_training)
    return [row.ids[:-1] if row.finish_reason == "stop" else row.ids for row in rows]


def crop(prompt: Sequence[int], sampling: Sampling, limit: int) -> list[int]:
    """The end of a prompt that does not fit into the context, as much as leaves room for the answer."""
    return list(prompt if len(prompt) < limit else prompt[-max(1, limit - sampling.max_new_tokens) :])
