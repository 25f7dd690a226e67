"""A SentencePiece vocabulary with the pieces of another behind its own.

Byte-pair encoding joins the pair with the highest score first, and only pairs that form a piece. Every new piece
gets a score below those of all old ones: a text is then first encoded as before, and only when nothing old is left
to join are neighbouring tokens joined into new pieces. So a new token is always a row of old ones, and a text in
which no new piece comes up keeps its ids. (Scores above the old ones, or all zero as in Chinese-LLaMA's script,
compress no better: docs/vocabulary.md.)

A piece that the old merges cut so that no pair forms it would never come up. Bridges, the pieces on the way from
those cuts to the whole, make it reachable.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np
import sentencepiece

from chatglm_tokenizer.model_file import (
    BPE,
    CONTROL,
    NORMAL,
    USER_DEFINED,
    append_pieces,
    read_model,
    without_prefix,
)
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from stage import UserError

Mode = Literal["cjk", "all"]
# Radicals, ideographs with their extensions and compatibility forms, kana, bopomofo, Hangul, and the punctuation
# of these scripts. Not: full-width letters and digits, which are Latin; “ ” and …, which English has too.
CJK = re.compile(
    "[\u1100-\u11ff\u2e80-\u312f\u3130-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff]+"
)
ROUNDS = 20  # in which bridges are added; each makes what is cut in n pieces be cut in fewer


@dataclass
class Expansion:
    """The new vocabulary, and what became of the other's pieces."""

    first: int  # id of the first new piece
    content: bytes = b""  # the model file
    appended: list[str] = field(default_factory=list)  # the new pieces, in the order of their ids
    bridges: int = 0  # how many of them the other vocabulary did not have
    present: int = 0  # pieces that were there already
    reserved: int = 0  # control symbols, bytes and the like
    not_cjk: int = 0  # pieces left out by the mode
    unreachable: list[str] = field(default_factory=list)  # pieces left out because no text gives them


def expand(base: ChatGLMTokenizer, extra: bytes, mode: Mode) -> Expansion:
    """Append the pieces of `extra`, a serialised SentencePiece model, as ids from base.vocab_size on.

    mode: "cjk" appends only pieces of CJK characters, so that a text without any keeps its ids. Special ids that
    the base has behind its pieces (ChatGLM2: 64,789 to 64,792) become control symbols in their places.
    Raises UserError for a base that is no BPE model.
    """
    old, result = read_model(base.content), Expansion(base.vocab_size)
    if old.model_type != BPE:
        raise UserError(f"{base.vocab_file} 不是 BPE 词表（例如是 unigram），没有合并的次序，不能追加条目。")
    names = special_names(base)
    kinds = dict(zip(old.pieces, old.kinds, strict=True)) | dict.fromkeys(names, CONTROL)
    pieces = list(choose(extra, kinds, mode, result))
    wanted = len(pieces)
    lowest = min(score for score, kind in zip(old.scores, old.kinds, strict=True) if kind == NORMAL)
    specials = [(name, 0.0, CONTROL) for name in names]

    def content() -> bytes:
        return append_pieces(base.content, [*specials, *scored(pieces, lowest)])

    for _ in range(ROUNDS):
        cut = cuts(content(), pieces, result.first)
        known = {*kinds, *pieces}
        bridges = dict.fromkeys(b for parts in cut.values() for b in bridges_over(parts) if b not in known)
        if not bridges:
            break
        pieces += bridges
    # What no text gives is part of nothing that a text gives: without it every text keeps its ids.
    cut = cuts(content(), pieces, result.first)
    result.bridges = sum(piece not in cut for piece in pieces[wanted:])
    result.unreachable = [piece for piece in pieces[:wanted] if piece in cut]
    result.appended = pieces = [piece for piece in pieces if piece not in cut]
    result.content = content()
    return result


def special_names(base: ChatGLMTokenizer) -> list[str]:
    """Names for the ids between the base's last piece and its vocabulary size, in brackets.

    A bare `sop` would be found inside "Philosophy" by programs that look for control symbols in the text.
    """
    found = {i: name for name, i in base.special_tokens.items()}
    names = [found.get(i, f"reserved_{i}") for i in range(base.pieces, base.vocab_size)]
    return [name if name[0] in "[<" else f"<{name}>" for name in names]


def choose(extra: bytes, kinds: dict[str, int], mode: Mode, result: Expansion) -> Iterator[str]:
    """The pieces to append, the best first; the others are counted. kinds: of what the base has, by text."""
    new = read_model(extra)
    for i in np.argsort(-np.array(new.scores), kind="stable"):
        piece = new.pieces[i]
        if new.kinds[i] not in (NORMAL, USER_DEFINED) or kinds.get(piece, NORMAL) != NORMAL:
            result.reserved += 1
        elif piece in kinds:
            result.present += 1
        elif mode == "cjk" and not CJK.fullmatch(piece):
            result.not_cjk += 1
        else:
            yield piece


def scored(pieces: Sequence[str], lowest: float) -> Iterator[tuple[str, float, int]]:
    """The pieces with falling scores below `lowest`, each a different float32."""
    score = np.float32(lowest)
    for piece in pieces:
        score = min(score - np.float32(1), np.nextafter(score, np.float32(-np.inf)))
        yield piece, float(score), NORMAL


def cuts(content: bytes, pieces: Sequence[str], first: int) -> dict[str, list[str]]:
    """Those of the pieces (ids from `first` on) that their own text does not give, and what it is cut into.

    A piece that some text gives is given by its own text too: what surrounds it took no part in its merges.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(content))
    texts = [piece.replace("▁", " ") for piece in pieces]
    rows = sp.encode(texts)
    cut = [i for i, ids in enumerate(rows) if ids != [first + i]]
    return {pieces[i]: parts_of(sp, rows[i]) for i in cut}


def parts_of(sp: sentencepiece.SentencePieceProcessor, ids: Sequence[int]) -> list[str]:
    """The texts of ids; a character that is spelt in bytes is one text."""
    parts, spelt = [], b""
    for i in ids:
        if sp.is_byte(i):
            spelt += bytes([int(sp.id_to_piece(i)[3:5], 16)])  # <0xE4>
            with suppress(UnicodeDecodeError):
                parts.append(spelt.decode())
                spelt = b""
        else:
            parts.append(sp.id_to_piece(i))
    return parts


def bridges_over(parts: Sequence[str]) -> list[str]:
    """What has to be formed on the way from the parts to the whole, from left to right."""
    return list(accumulate(parts))[1:-1]
