"""Ids of many texts as one array: what a corpus is tokenised with."""

import os
from typing import TYPE_CHECKING

import numpy as np

from chatglm_tokenizer.base import Tokenizer
from chatglm_tokenizer.model_file import read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from data_clean.texts import Texts

if TYPE_CHECKING:
    from chatglm_tokenizer.bpe import Vocabulary


class BatchEncoder:
    """Texts -> ids, `<eos>` behind every text; id for id what the tokenizer gives."""

    def __init__(self, tokenizer: Tokenizer, compiled: bool = True, threads: int = 1) -> None:
        """compiled: use bpe.py where it knows the kind of vocabulary; worth its start from some 50 MB of text on.

        threads: of the tokenizer's library (-1: one per processor); the compiled code uses one.
        """
        if threads == 1:  # one of many processes: Hugging Face's library would use all processors in each
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.tokenizer, self.threads = tokenizer, threads
        self.eos = tokenizer.special_tokens["<eos>"]
        self.dtype = token_dtype(tokenizer)
        self.vocabulary: Vocabulary | None = None
        is_ours = isinstance(tokenizer, ChatGLMTokenizer)
        if compiled and is_ours and (model := read_model(tokenizer.content)).is_plain_bpe:
            from chatglm_tokenizer.bpe import compile_vocabulary  # compiled code takes a second to load

            self.vocabulary = compile_vocabulary(model)

    def encode(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts, one behind the other, and how many each has, (n,) int64."""
        if self.vocabulary is None:
            return self._by_library(texts)
        from chatglm_tokenizer.bpe import encode_texts

        parts, counts, first = [np.empty(0, self.dtype)], np.empty(texts.count, np.int64), 0
        while first < texts.count:
            starts = texts.starts[first:]
            ids = np.empty(starts[-1] - starts[0] + 4 * len(starts), self.dtype)
            done, written = encode_texts(texts.data, starts, self.vocabulary, self.eos, ids, counts[first:])
            parts.append(ids[:written])
            first += done
            if first < texts.count:  # a text that the compiled code refuses
                rest, counts[first : first + 1] = self._by_library(
                    Texts(texts.data, texts.starts[first : first + 2])
                )
                parts.append(rest)
                first += 1
        return np.concatenate(parts), counts

    def _by_library(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        rows = self.tokenizer.encode_arrays(texts.texts(), self.threads)
        end = np.array([self.eos], np.int32)
        ids = np.concatenate([np.empty(0, np.int32), *(part for row in rows for part in (row, end))])
        return ids.astype(self.dtype), np.array([len(row) + 1 for row in rows], np.int64)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The type of ids in token files: two bytes where the vocabulary allows it."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
