"""A SentencePiece tokenizer with ChatGLM2's interface, independent of transformers.

Ids are SentencePiece's own: unknown and padding 0, `<bos>` 1, `<eos>` 2, then bytes and pieces. The ChatGLM2
vocabulary (64,789 pieces) adds special ids behind its pieces; none of them is ever produced from plain text,
so a user who writes "<eos>" or "[gMASK]" gets those characters, not a control token.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from chatglm_tokenizer.base import Tokenizer, check_surrogates
from stage import ROOT, UserError

CHATGLM2 = ROOT / "chatglm_tokenizer" / "tokenizer.model"  # where download.py puts it
CHATGLM2_SHA256 = "e7dc4c393423b76e4373e5157ddc34803a0189ba96b21ddbb40269d31468a6f2"
CHATGLM2_PIECES = 64789
# The original class counts these five; models published with this vocabulary have 64,793 rows, so the last
# one, `eop`, lies outside their embedding. Nothing here ever uses it.
CHATGLM2_SPECIALS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class ChatGLMTokenizer(Tokenizer):
    """Text <-> ids over any SentencePiece model; `encode` gives id for id what SentencePiece gives."""

    def __init__(self, vocab_file: str | Path):
        self.vocab_file = Path(vocab_file)
        if not self.vocab_file.is_file():
            raise UserError(
                f"找不到词表 {vocab_file}；请运行 python chatglm_tokenizer/download.py 下载 ChatGLM2 词表，"
                "用 python train_tokenizer.py 训练自己的词表，或用 --tokenizer 指定已有的词表。"
            )
        self.content = self.vocab_file.read_bytes()  # the file itself, for checkpoints
        self.sha256 = hashlib.sha256(self.content).hexdigest()
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=self.content or b"empty")
        except RuntimeError as error:
            raise UserError(f"{vocab_file} 不是 SentencePiece 模型或已损坏，请重新下载或训练。") from error
        self.pieces = self.sp.vocab_size()
        self.special_tokens = {"<unk>": 0, "<pad>": 0, "<bos>": self.sp.bos_id(), "<eos>": self.sp.eos_id()}
        if self.special_tokens["<bos>"] != 1 or self.special_tokens["<eos>"] != 2:
            raise UserError(f"{vocab_file} 的 <bos>/<eos> 不是 1/2；请用 train_tokenizer.py 训练词表。")
        if self.pieces == CHATGLM2_PIECES:
            self.special_tokens |= {t: self.pieces + i for i, t in enumerate(CHATGLM2_SPECIALS)}

    @property
    def vocab_size(self) -> int:
        """Rows that a model's embedding needs: 64,793 for ChatGLM2, the number of pieces for any other."""
        return self.pieces + (len(CHATGLM2_SPECIALS) - 1 if "sop" in self.special_tokens else 0)

    @property
    def files(self) -> dict[str, bytes]:
        """What a checkpoint keeps of this vocabulary, by file name."""
        return {"tokenizer.model": self.content}

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer."""
        return [self.special_tokens["<eos>"]]

    def encode_arrays(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Ids of many texts, (n,) int32 each. threads: -1 for one per processor."""
        texts = list(texts)
        try:
            return self.sp.encode(texts, return_type="numpy", num_threads=threads)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            for text in texts:
                check_surrogates(text)
            raise

    def decode(self, ids: int | Sequence[int]) -> str:
        """Text of ids; special ids (padding, `<bos>`, `<eos>`, ChatGLM2's) give nothing.

        Raises ValueError for an id outside the vocabulary.
        """
        ids = [int(i) for i in ([ids] if isinstance(ids, int) else ids)]
        highest = self.pieces + len(CHATGLM2_SPECIALS) if "sop" in self.special_tokens else self.pieces
        for i in ids:
            if not 0 <= i < highest:
                raise ValueError(f"id {i} is outside the vocabulary of {highest} ids")
        return self.sp.decode([i for i in ids if 2 < i < self.pieces])

    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64: what bits per byte are counted with."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for i in range(3, self.pieces):
            piece = self.sp.id_to_piece(i).replace("▁", " ")
            sizes[i] = 1 if self.sp.is_byte(i) else len(piece.encode())
        return sizes
