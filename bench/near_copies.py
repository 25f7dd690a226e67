"""Ways in which a text comes to be in a corpus a second time, slightly changed."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from bench.background import Background

Change = Callable[[str, float, np.random.Generator, Background], str]  # (text, rate, …) -> changed text
RATES = (0.01, 0.02, 0.03, 0.05, 0.08, 0.10, 0.15, 0.20, 0.30)

# What copying from one page to another does to signs; the right column as ASCII keyboards have it.
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)})
HALF_WIDTH = str.maketrans("，。！？：；（）“”‘’、", ",.!?:;()\"\"'',")


def same(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Change nothing."""
    return text


def scattered(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Substitute, delete and insert single characters all over the text, a third of each."""
    codes = _codes(text)
    edits = max(1, round(rate * len(codes)))
    places = random.permutation(len(codes))[:edits]
    deed = random.integers(3, size=len(places))
    letters = random.choice(background.letters, len(places))
    codes[places[deed == 0]] = letters[deed == 0]
    times = np.ones(len(codes), np.int64)
    times[places[deed == 1]] = 0
    times[places[deed == 2]] = 2
    result = np.repeat(codes, times)
    result[times.cumsum()[places[deed == 2]] - 1] = letters[deed == 2]
    return _text(result)


def one_block(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Replace one stretch by another passage."""
    size = max(1, round(rate * len(text)))
    start = random.integers(len(text) - size + 1)
    return text[:start] + _text(background.passage(random, size)) + text[start + size :]


def cut_off(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Leave out the end, as a page does that shows only the beginning."""
    return text[: max(1, round((1 - rate) * len(text)))]


def other_signs(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Other punctuation, widths, case and white space; every word stays."""
    text = text.translate(HALF_WIDTH if random.random() < 0.5 else FULL_WIDTH)
    text = text.upper() if random.random() < 0.5 else text
    codes = _codes(text)
    places = np.sort(random.permutation(len(codes))[: len(codes) // 20])
    return _text(np.insert(codes, places, random.choice([0x20, 0x0A, 0x3000, 0xB7], len(places))))


def traditional(text: str, rate: float, random: np.random.Generator, background: Background) -> str:
    """Replace simplified characters by traditional ones, as OpenCC's phrases tell."""
    return _opencc().convert(text)


@lru_cache(maxsize=1)
def _opencc():
    from opencc import OpenCC

    return OpenCC("s2t")


def _codes(text: str) -> np.ndarray:
    """Code points of a text, writable."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4").copy()


def _text(codes: np.ndarray) -> str:
    return codes.astype("<u4").tobytes().decode("utf-32-le")
