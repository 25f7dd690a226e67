"""What every vocabulary offers, and the parts of it that do not depend on the kind."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stage import UserError


class NotText(UserError, ValueError):
    """A string that cannot be encoded as text."""


class Tokenizer:
    """Text <-> ids. Ids of control tokens never come from plain text, whatever a user writes."""

    vocab_file: Path  # the file, or the folder, that it was read from
    sha256: str  # of what ids depend on; token files are checked against it
    special_tokens: dict[str, int]  # at least "<bos>" and "<eos>"
    stop_ids: list[int]  # ids that end an answer
    chat_template: str | None = None  # Jinja, of models that have a chat format of their own (chat.py)

    @property
    def vocab_size(self) -> int:
        """Rows that the embedding of a new model needs."""
        raise NotImplementedError

    @property
    def least_rows(self) -> int:
        """Rows without which a model cannot be used with this vocabulary."""
        return self.vocab_size

    @property
    def template_names(self) -> dict[str, str]:
        """Control tokens that a chat template may write by a name such as `bos_token`."""
        return {}

    @property
    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps of this vocabulary, by file name."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. add_special_tokens: put ChatGLM2's prefix `[gMASK] sop` (others: `<bos>`) before it.

        Raises ValueError for lone surrogates, which are not text and have no UTF-8 form.
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        rows = [row.tolist() for row in self.encode_arrays(texts, threads=-1 if len(texts) > 1 else 1)]
        if not add_special_tokens:
            return rows
        special = self.special_tokens
        prefix = [special["[gMASK]"], special["sop"]] if "sop" in special else [special["<bos>"]]
        return [prefix + row for row in rows]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of many texts, (n,) int32 each. threads: -1 for one per processor."""
        raise NotImplementedError

    def decode(self, ids: int | Sequence[int]) -> str:
        """Text of ids; control tokens give nothing. Raises ValueError for an id outside the vocabulary."""
        raise NotImplementedError

    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64: what bits per byte are counted with."""
        raise NotImplementedError


def check_surrogates(text: str) -> None:
    """Raise ValueError where a text has a lone surrogate (half of a UTF-16 pair)."""
    for position, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise NotText(
                f"不是合法的文字：第 {position + 1} 个字符 U+{ord(character):04X} 是落单的代理字符；"
                '可以这样修复：text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")'
            )
