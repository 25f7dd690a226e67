"""The stored form of texts: what it changes, that it is stable, and that batches give the same."""

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_clean.keys import comparison_key
from data_clean.normalise import HALF_WIDTH, normalise, normalise_batch, simplify
from data_clean.texts import arranged, from_strings

PIECES = [
    *"中文。eéか가ａ９Ｚ，！漢發ÅK \n\r\t\x0b\x85\u2028\u00a0\u3000\u2003\u2000",
    *"\u200b\u200c\u200d\ufeff\x00\x08\x1c\x7f\u00ad\u0301\u3099\uf900\u1100\u1161\u0e33\U0001f1e8\U000e0041",
    *("文字", "\n\n", "\n\n\n", "\r\n", "  ", "👩\u200d🔬", "乾隆", "頭髮", "打坏"),
]
TEXTS = st.lists(
    st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"])), max_size=30
).map("".join)


def test_normalise_removes_only_what_cannot_be_seen():
    dirty = "\ufeff一\u200b二\r\n三\x00四 \u3000\n\n\n\n五\u00a0六\u200d七\n "
    assert normalise(dirty) == "一二\n三四\n\n五 六七"
    assert normalise("Ａ，“全角”；①\t表 ㈱") == "Ａ，“全角”；①\t表 ㈱"
    assert normalise("می\u200cخواهم 👩\u200d🔬") == "می\u200cخواهم 👩\u200d🔬"


@settings(max_examples=500, deadline=None)
@given(TEXTS)
def test_normal_forms_are_stable(text):
    once = normalise(text)
    assert normalise(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert comparison_key(comparison_key(text)) == comparison_key(text)
    assert comparison_key(f" 。{text}！\n") == comparison_key(text)


@settings(max_examples=500, deadline=None)
@given(st.lists(TEXTS, max_size=5))
def test_a_batch_is_normalised_as_its_texts_are(texts):
    assert normalise_batch(from_strings(texts)).texts() == list(map(normalise, texts))


@pytest.mark.parametrize("piece", [*PIECES, "\n\n\n", " \n", "\n ", "\u3000\n", "\n\n", "\r\r"])
def test_one_fault_alone(piece):
    texts = [f"中{piece}中", f"{piece}中", f"中{piece}", piece, f"a{piece}\nb"]
    for text in texts:
        assert normalise_batch(from_strings([text])).texts() == [normalise(text)], text


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXTS, max_size=4))
def test_options_of_batches(texts):
    batch = from_strings(texts)
    narrow = [normalise(text.translate(HALF_WIDTH)) for text in texts]
    assert normalise_batch(batch, half_width=True).texts() == narrow
    assert normalise_batch(batch, to_simplified=True).texts() == [simplify(normalise(text)) for text in texts]
    both = normalise_batch(batch, half_width=True, to_simplified=True)
    assert both.texts() == list(map(simplify, narrow))


@pytest.mark.parametrize("code_range", [(0, 0x3000), (0x3000, 0x34100), (0xE0000, 0xE0200)])
def test_every_character_alone_and_between_letters(code_range):
    chars = [chr(code) for code in range(*code_range) if not 0xD800 <= code < 0xE000]
    texts = [*chars, *(f"a{char}中" for char in chars)]
    assert normalise_batch(from_strings(texts)).texts() == list(map(normalise, texts))


def test_full_width_letters_and_digits_become_narrow_and_punctuation_stays():
    texts = from_strings(["ＡＢＣ，１２３！（ｚ）～％"])
    assert normalise_batch(texts, half_width=True).texts() == ["ABC，123！（z）～％"]
    assert normalise_batch(texts) is texts


def test_traditional_text_is_simplified_phrase_by_phrase():
    def simple(text):
        return normalise_batch(from_strings([text]), to_simplified=True).texts()[0]

    assert (
        simple("頭髮發白，乾隆年間，乾燥的麵包，理髮後發財") == "头发发白，乾隆年间，干燥的面包，理发后发财"
    )
    # Phrases for traditional text do not touch simplified lines.
    assert simple("别把它打坏了。\n這裡有書。") == "别把它打坏了。\n这里有书。"


def test_nothing_is_copied_for_normal_texts():
    rng = random.Random(0)
    normal = [
        "".join(chr(0x4E00 + rng.randrange(9000)) for _ in range(200)) + "。\nA line, 12." for _ in range(50)
    ]
    texts = from_strings(normal)
    assert normalise_batch(texts) is texts and normalise_batch(texts, half_width=True) is texts
    parts = [texts, from_strings([" 空格 ", "e\u0301"]), texts]
    mixed = arranged(parts, np.arange(sum(part.count for part in parts)))
    assert normalise_batch(mixed).texts() == [*normal, "空格", "é", *normal]
    assert normalise_batch(from_strings([])).count == 0
    part = mixed.take(np.array([50, 0, 51]))
    assert normalise_batch(part).texts() == ["空格", normal[0], "é"]
