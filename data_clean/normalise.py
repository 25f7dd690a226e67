"""Two normal forms of a text: a light one that is stored, and a rough key that only comparison uses."""

import re
import unicodedata

# Line separators of every kind become \n before other control characters go.
NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters, and marks that are invisible and carry nothing: zero-width spaces, direction marks.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]"
)
# Joiners matter in Persian, in Hindi and in emoji; beside Chinese characters they are rubbish.
STRAY_JOINERS = re.compile("[\u200c\u200d]+(?=[\u3000-\u9fff])|(?<=[\u3000-\u9fff])[\u200c\u200d]+")
LINE_ENDS = re.compile(r"[ \t\u00a0\u3000]+(?=\n)")
BLANK_LINES = re.compile(r"\n{3,}")
# Python's \w lacks the vowel signs and accents (category M) that carry meaning in many scripts.
MARKS = "".join(chr(code) for code in range(0x300, 0xFE00) if unicodedata.category(chr(code))[0] == "M")
NOT_CONTENT = re.compile(f"(?:[^\\w{MARKS}]|_)+")
COMPOUND_SIGNS = re.compile("[\u2100-\u214f\u3200-\u33ff]")  # signs that stand for letters, e.g. one for kg


def normalise(text: str) -> str:
    """The text as it is stored: the same to a reader, without what only a machine would see.

    Full-width forms and Chinese punctuation stay as they are.
    """
    text = NEWLINES.sub("\n", unicodedata.normalize("NFC", text))
    text = STRAY_JOINERS.sub("", INVISIBLE.sub("", text)).replace("\u00a0", " ")
    return BLANK_LINES.sub("\n\n", LINE_ENDS.sub("", text)).strip()


def comparison_key(text: str) -> str:
    """Only letters, marks and digits of every script, in one width and case: equal keys, equal content."""
    # Most text needs no NFKC once its punctuation is gone, and testing that is far cheaper than doing it.
    if COMPOUND_SIGNS.search(text):
        text = unicodedata.normalize("NFKC", text)
    key = NOT_CONTENT.sub("", text)
    if not unicodedata.is_normalized("NFKC", key):
        key = NOT_CONTENT.sub("", unicodedata.normalize("NFKC", key))
    return key.lower()
