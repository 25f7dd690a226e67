"""The compiled encoder gives id for id what SentencePiece gives, whatever the vocabulary and the text."""

import struct

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from chatglm_tokenizer import bpe
from chatglm_tokenizer.batch_encoder import BatchEncoder, token_dtype
from chatglm_tokenizer.model_file import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, read_model
from chatglm_tokenizer.tokenization_chatglm import ChatGLMTokenizer
from data_clean.texts import from_strings
from sources.aside import SetAside
from sources.pretrain_text import read_documents

EOS = 2


# --- vocabularies made by hand: what no trainer would give, SentencePiece accepts all the same ---


def message(*fields: tuple[int, int | bytes | float]) -> bytes:
    """A protocol buffer of these fields."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def model_of(pieces: dict[str, float], trainer=(), normalizer=(), kinds=()) -> bytes:
    """A serialised BPE model of pieces with scores, after the usual reserved ones."""
    rows = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    rows += [(piece, score, dict(kinds).get(piece, NORMAL)) for piece, score in pieces.items()]
    content = b"".join(
        message((1, message((1, p.encode()), (2, score), (3, kind)))) for p, score, kind in rows
    )
    content += message((2, message((3, 2), (35, 1), *trainer)))
    return content + message((3, message((1, b"identity"), (3, 1), (4, 0), *normalizer)))


# Few characters, so that pieces meet in the text and overlap; and many, so that some are unknown.
TEXT = st.text("ab ", max_size=40) | st.text("ab▁ 中文é\n\0😀", max_size=40) | st.text(max_size=20)
PIECE = st.text("ab▁", min_size=1, max_size=4) | st.text("ab▁中文é\n😀", min_size=1, max_size=5)
PIECES = st.dictionaries(PIECE, st.integers(-4, 0).map(float), max_size=25)


def encoder_of(content: bytes, folder) -> BatchEncoder:
    path = folder / f"{abs(hash(content))}.model"
    path.write_bytes(content)
    return BatchEncoder(ChatGLMTokenizer(path))


def expected(tokenizer: ChatGLMTokenizer, texts: list[str]) -> list[list[int]]:
    return [tokenizer.sp.encode(text) for text in texts]


def encoded(encoder: BatchEncoder, texts: list[str]) -> list[list[int]]:
    ids, counts = encoder.encode(from_strings(texts))
    assert len(ids) == counts.sum()
    parts = np.split(ids, np.cumsum(counts)[:-1]) if texts else []
    assert all(part[-1] == EOS for part in parts)
    return [part[:-1].tolist() for part in parts]


@settings(max_examples=400, deadline=None)
@given(pieces=PIECES, texts=st.lists(TEXT, max_size=6))
def test_any_vocabulary_any_text(tmp_path_factory, pieces, texts) -> None:
    """Scores repeat, pieces lack their parts, characters are unknown: the order of merges still agrees."""
    encoder = encoder_of(model_of({"▁": -9.0, **pieces}), tmp_path_factory.mktemp("models"))
    assert encoder.vocabulary is not None
    assert encoded(encoder, texts) == expected(encoder.tokenizer, texts)


@settings(max_examples=50, deadline=None)
@given(pieces=PIECES, texts=st.lists(TEXT, min_size=1, max_size=6), longest=st.integers(1, 5))
def test_long_parts_take_the_other_way(tmp_path_factory, pieces, texts, longest) -> None:
    encoder = encoder_of(model_of({"▁": -9.0, **pieces}), tmp_path_factory.mktemp("models"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "LONGEST", longest)
        assert encoded(encoder, texts) == expected(encoder.tokenizer, texts)


def test_very_long_parts(chatglm2) -> None:
    encoder = BatchEncoder(chatglm2)
    texts = ["短", " " * 100_000, "a" * 50_000, "中" + "=" * 1000 + "文", "", "末"]
    assert encoded(encoder, texts) == expected(chatglm2, texts)


@pytest.mark.parametrize(
    "changes",
    [
        dict(trainer=[(3, 1)]),  # unigram
        dict(trainer=[(24, 1)]),  # spaces as suffixes
        dict(normalizer=[(4, 1)]),  # extra spaces removed
        dict(normalizer=[(3, 0)]),  # no space before the text
        dict(normalizer=[(5, 0)]),  # spaces as they are
        dict(kinds=[("ab", USER_DEFINED)]),
        dict(kinds=[("ab", UNUSED)]),
        dict(kinds=[("a", CONTROL)]),  # the reserved name of a text
    ],
)
def test_other_kinds_of_models_are_left_to_sentencepiece(tmp_path, changes) -> None:
    content = model_of({"▁": -9.0, "a": -1.0, "ab": -2.0, "b": -3.0}, **changes)
    encoder = encoder_of(content, tmp_path)
    assert encoder.vocabulary is None
    texts = ["ab  a", " b", "中"]
    assert encoded(encoder, texts) == expected(encoder.tokenizer, texts)


def test_normalising_models_are_left_to_sentencepiece(tmp_path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["ＡＢ１２ 中文字符"] * 50), model_prefix=str(tmp_path / "nfkc"), vocab_size=275,
        model_type="bpe", byte_fallback=True, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    encoder = BatchEncoder(ChatGLMTokenizer(tmp_path / "nfkc.model"))
    assert encoder.vocabulary is None
    assert encoded(encoder, ["Ａ１"]) == expected(encoder.tokenizer, ["A1"])


# --- real vocabularies ---


def test_model_file_says_what_sentencepiece_says(chatglm2) -> None:
    model, sp = read_model(chatglm2.content), chatglm2.sp
    assert model.is_plain_bpe and len(model.pieces) == sp.vocab_size() == 64_789
    for i in range(0, sp.vocab_size(), 7):
        assert (model.pieces[i], model.scores[i]) == (sp.id_to_piece(i), sp.get_score(i))
        assert (model.kinds[i] == BYTE) == sp.is_byte(i) and (model.kinds[i] == CONTROL) == sp.is_control(i)


def test_real_text_and_both_vocabularies(chatglm2, vocabulary, corpus, shared) -> None:
    texts = [document.text for document in read_documents(corpus / "raw", SetAside())]
    real = read_documents(shared / "sft" / "huatuo_llama_data.json", SetAside(), "output")
    texts += [document.text for document, _ in zip(real, range(2000), strict=False)]
    for tokenizer in (chatglm2, ChatGLMTokenizer(vocabulary)):
        encoder = BatchEncoder(tokenizer)
        assert encoder.vocabulary is not None and encoder.dtype == token_dtype(tokenizer) == np.uint16
        assert encoded(encoder, texts) == expected(tokenizer, texts)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(max_size=60), max_size=5))
def test_any_text_and_the_real_vocabulary(chatglm2_encoder, texts) -> None:
    assert encoded(chatglm2_encoder, texts) == expected(chatglm2_encoder.tokenizer, texts)


@pytest.fixture(scope="module")
def chatglm2_encoder(chatglm2) -> BatchEncoder:
    return BatchEncoder(chatglm2)


def test_bytes_that_are_no_text_do_no_harm(chatglm2_encoder) -> None:
    """Texts are UTF-8 by contract; a broken one may give wrong ids but writes and reads nothing outside."""
    from data_clean.texts import Texts

    rng = np.random.default_rng(0)
    for _ in range(200):
        data = rng.integers(0, 256, 50).astype(np.uint8)
        cuts = np.sort(rng.integers(0, 51, 9))
        texts = Texts(data, np.concatenate([[0], cuts, [50]]).astype(np.int64))
        room = np.full(50 + 4 * texts.count + 100, 7, np.uint16)
        done, written = bpe.encode_texts(
            data, texts.starts, chatglm2_encoder.vocabulary, EOS, room, np.empty(texts.count, np.int64)
        )
        assert done == texts.count and written <= 50 + 4 * texts.count and (room[written:] == 7).all()
