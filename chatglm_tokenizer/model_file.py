"""What a SentencePiece model file says, and the same file with more pieces, without protobuf's own library.

The file is a protocol buffer (https://protobuf.dev/programming-guides/encoding/); the field numbers are those of
sentencepiece_model.proto (https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto).
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of pieces
BPE = 2
VOCAB_SIZE = 4  # field of the trainer's settings
SELF_TEST = 4  # field of the model


@dataclass
class ModelFile:
    """The pieces, whose positions are their ids, and the settings that encoding depends on."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # the pair with the highest merges first
    kinds: list[int] = field(default_factory=list)
    model_type: int = 1  # unigram
    byte_fallback: bool = False
    treat_whitespace_as_suffix: bool = False
    precompiled_charsmap: bytes = b""  # how characters are normalised; none: not at all
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def is_plain_bpe(self) -> bool:
        """Whether text is encoded as it is, by merges alone, and nothing is ever unknown.

        So are ChatGLM2's vocabulary, Llama's, and those of train_tokenizer.py.
        """
        changes_text = self.precompiled_charsmap or self.remove_extra_whitespaces
        usual_spaces = (
            self.add_dummy_prefix and self.escape_whitespaces and not self.treat_whitespace_as_suffix
        )
        only_merges = self.model_type == BPE and not {USER_DEFINED, UNUSED} & set(self.kinds)
        kinds = dict(zip(self.pieces, self.kinds, strict=True))
        # A reserved name that is also text would take the place of that text.
        reserved = [piece for piece, kind in kinds.items() if kind != NORMAL]
        names_differ = len(kinds) == len(self.pieces) and min(map(len, reserved)) > 1
        never_unknown = self.byte_fallback and kinds.get("▁") == NORMAL
        return bool(usual_spaces and only_merges and names_differ and never_unknown and not changes_text)


def read_model(content: bytes) -> ModelFile:
    """Read a serialised SentencePiece model that SentencePiece itself has accepted."""
    model = ModelFile()
    for number, message in _fields(content):
        if number == 1:
            piece = dict(_fields(message))
            model.pieces.append(piece[1].decode())
            model.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            model.kinds.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(message))
            model.model_type = trainer.get(3, model.model_type)
            model.byte_fallback = bool(trainer.get(35, False))
            model.treat_whitespace_as_suffix = bool(trainer.get(24, False))
        elif number == 3:
            normalizer = dict(_fields(message))
            model.precompiled_charsmap = normalizer.get(2, b"")
            model.add_dummy_prefix = bool(normalizer.get(3, True))
            model.remove_extra_whitespaces = bool(normalizer.get(4, True))
            model.escape_whitespaces = bool(normalizer.get(5, True))
    return model


def append_pieces(content: bytes, pieces: Sequence[tuple[str, float, int]]) -> bytes:
    """The model with more pieces (text, score, kind) behind its own; all the rest byte for byte as it was.

    Only `trainer_spec.vocab_size` counts the new pieces too, and samples of a self test are left out: they say
    how the old pieces encode them, and SentencePiece refuses a model that encodes them otherwise.
    """
    own, rest, count = [], [], sum(number == 1 for number, _, _ in _raw_fields(content)) + len(pieces)
    for number, value, raw in _raw_fields(content):
        if number == 2:
            trainer = b"".join(kept for n, _, kept in _raw_fields(value) if n != VOCAB_SIZE)
            raw = _message(2, trainer + _integer(VOCAB_SIZE, count))
        if number != SELF_TEST:
            (own if number == 1 else rest).append(raw)
    return b"".join([*own, *(_message(1, _piece(*piece)) for piece in pieces), *rest])


def without_prefix(content: bytes) -> bytes:
    """The model that encodes a text as it stands, with no "▁" before it and all its spaces.

    Of a message that occurs twice the later fields win, so they are just put behind.
    """
    return content + _message(3, _integer(3, 0) + _integer(4, 0))


def _piece(text: str, score: float, kind: int) -> bytes:
    body = _message(1, text.encode()) + b"\x15" + struct.pack("<f", score)  # 0x15: field 2, four bytes
    return body if kind == NORMAL else body + _integer(3, kind)


def _message(number: int, body: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(body)) + body


def _integer(number: int, value: int) -> bytes:
    return _to_varint(number << 3) + _to_varint(value)


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: number, and an integer or the raw bytes."""
    return ((number, value) for number, value, _ in _raw_fields(message))


def _raw_fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """The same, each with all its bytes: tag, length and value."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _varint(message, position)
        wire_type = tag & 7
        if wire_type == 0:
            value, position = _varint(message, position)
        else:
            size, position = (
                _varint(message, position) if wire_type == 2 else ({1: 8, 5: 4}[wire_type], position)
            )
            value = message[position : position + size]
            position += size
        yield tag >> 3, value, message[start:position]


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer of seven bits a byte, the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
