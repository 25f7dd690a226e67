"""Fine-tuning data: sft_data.csv -> batches in which only the answers bear loss."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chatglm_tokenizer.chat import encode_chat
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from model import IGNORE
from sources.aside import SetAside
from sources.sft_csv import read_sft_csv
from training.loader import MicroBatch

POOL = 16  # batches whose samples are sorted by length together, so that a batch holds similar lengths


@dataclass
class Sample:
    ids: np.ndarray  # (T,) int32
    bears_loss: np.ndarray  # (T,) bool: whether the id itself is to be predicted


def read_samples(path: Path, tokenizer: ChatGLMTokenizer, max_len: int, aside: SetAside) -> list[Sample]:
    """Tokenise every usable row; rows that leave no answer token within max_len are set aside."""
    samples, cut = [], 0
    eos = tokenizer.special_tokens["<eos>"]
    for row in tqdm(read_sft_csv(path, aside), "分词", unit="条", disable=None):
        try:
            encoded = encode_chat(to_messages(row), tokenizer, max_len)
        except ValueError as error:
            aside.add(path, row["row"], f"无法分词：{error}", row["prompt"])
            continue
        if encoded is None:
            aside.add(path, row["row"], f"问题太长：{max_len} 个 token 里放不下答案", row["prompt"])
            continue
        samples.append(Sample(np.array(encoded[0], dtype=np.int32), np.array(encoded[1])))
        whole_answers = int((samples[-1].ids[samples[-1].bears_loss] == eos).sum())
        cut += whole_answers < 1 + len(row["history"])
    if cut:
        print(f"{cut:,} 条样本超过 {max_len} 个 token：去掉了最早的几轮，或截短了答案的末尾。", flush=True)
    return samples


def to_messages(row: dict) -> list[dict[str, str]]:
    """A row of sft_data.csv as messages."""
    messages = [{"role": "system", "content": row["system"]}] if row["system"] else []
    for question, answer in [*row["history"], (row["prompt"], row["answer"])]:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def split_validation(samples: Sequence[Sample], fraction: float) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; a sample's own content decides, so added data moves none."""
    training, validation = [], []
    for sample in samples:
        digest = hashlib.sha256(sample.ids.tobytes()).digest()
        is_held_out = int.from_bytes(digest[:8], "little") < fraction * 2**64
        (validation if is_held_out else training).append(sample)
    return training or validation, validation


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Tokens and targets of samples padded to the longest, (b, T) int64 each; `IGNORE` off the answers."""
    width = max(len(s.ids) for s in samples) - 1
    tokens = torch.zeros(len(samples), width, dtype=torch.int64)
    targets = torch.full((len(samples), width), IGNORE)
    for row, sample in enumerate(samples):
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        end = len(ids) - 1
        tokens[row, :end] = ids[:-1]
        targets[row, :end] = torch.where(torch.from_numpy(sample.bears_loss[1:]), ids[1:], IGNORE)
    return MicroBatch(tokens, targets)


class SftBatches:
    """Batches of samples of similar length in a new random order each epoch; disjoint across processes."""

    def __init__(self, samples: list[Sample], batch: int, micro_batch: int, rank: int, world: int, seed: int):
        """batch: samples of a step, over all processes. micro_batch: samples of one forward of a process."""
        self.samples, self.batch, self.micro_batch = samples, batch, micro_batch
        self.rank, self.world, self.seed = rank, world, seed
        self.steps_per_epoch = -(-len(samples) // batch)
        content = hashlib.sha256()
        for sample in samples:
            content.update(sample.ids)
        self.signature = {
            "batch": batch,
            "samples": len(samples),
            "seed": seed,
            "content": content.hexdigest(),
        }
        self.epoch, self.order = -1, []

    def step(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.shuffled(epoch)
        batch = self.order[position]
        mine = batch[self.rank :: self.world]
        if not mine:  # a last batch with fewer samples than processes: take part, but learn nothing
            tokens, targets, _ = collate([self.samples[batch[0]]])
            return [MicroBatch(torch.zeros_like(tokens), torch.full_like(targets, IGNORE))]
        parts = [mine[i : i + self.micro_batch] for i in range(0, len(mine), self.micro_batch)]
        return [collate([self.samples[i] for i in part]) for part in parts]

    def shuffled(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch: shuffle, sort by length within pools, cut, shuffle the batches."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.samples)).tolist()
        batches = []
        for start in range(0, len(order), POOL * self.batch):
            pool = sorted(order[start : start + POOL * self.batch], key=lambda i: len(self.samples[i].ids))
            batches += [pool[i : i + self.batch] for i in range(0, len(pool), self.batch)]
        return [batches[i] for i in rng.permutation(len(batches))]
