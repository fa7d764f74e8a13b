"""Strings of every script, drawn at random: what a tokenizer must read as transformers does."""

import random
import unicodedata

from minisd.text.tokenizer import BOS, EOS

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCRIPTS = [  # first and last code point of scripts with and without case, marks and spaces
    (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1E00, 0x1FFF),
    (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFDFF), (0xFF00, 0xFFEF),
    (0x10400, 0x1044F), (0x1D400, 0x1D7FF),
]
SPACES = " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u2003\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"
ENDINGS = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "’s", "'x", "''", "'"]
MARKERS = [EOS, BOS, EOS.upper(), "<|endoftext", "|>", "<|", "</w>", EOS + EOS, "<|im_start|>"]
# Where lower-casing and NFC are subtle: final sigma, dotted I, digraphs, Kelvin, Angstrom, ...
CASES = ["Σ", "ΑΣ", "ΑΣ.", "ΑΣ Σ", "İ", "ı", "ẞ", "ß", "ﬁ", "ǅ", "\u212a", "\u212b", "e\u0301", "ſ"]


def _english(rng):
    word = "".join(rng.choices(LETTERS, k=rng.randint(1, 10)))
    return word + rng.choice(["", "", "", ",", ".", "!", "?", "-", ")", ":1.2"])


def _of_a_script(rng):
    low, high = rng.choice(SCRIPTS)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))


def _emoji(rng):
    points = [chr(rng.randint(0x1F300, 0x1FAFF)) for _ in range(rng.randint(1, 4))]
    joined = rng.choice(["", "\u200d", "\ufe0f", "\u20e3", "\U0001f3fd"]).join(points)
    return joined + rng.choice(["", "\u200d", "\ufe0f", "\U0001f1eb\U0001f1f7"])


def _marks(rng):
    marks = [chr(rng.randint(0x300, 0x36F)) for _ in range(rng.randint(0, 4))]
    word = rng.choice(LETTERS) + "".join(marks)
    return unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), word)


def _digits(rng):
    return rng.choice(["7", "2024", "3.14", "1,000", "٣٤", "½", "²", "Ⅳ", "१२", "0x1F", "4k", "8K"])


def _control(rng):
    return rng.choice(LETTERS) + chr(rng.choice([*range(0x20), *range(0x7F, 0xA0), 0xAD]))


def _any_point(rng):
    point = rng.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


KINDS = {
    "english": _english,
    "script": _of_a_script,
    "emoji": _emoji,
    "marks": _marks,
    "case": lambda rng: rng.choice(CASES),
    "ending": lambda rng: _english(rng) + rng.choice(ENDINGS),
    "digits": _digits,
    "space": lambda rng: rng.choice(LETTERS) + rng.choice(SPACES) * rng.randint(1, 3),
    "control": _control,
    "marker": lambda rng: rng.choice([*MARKERS, "a", " ", "!"]),
    "any": _any_point,
}


def string(kind: str, rng: random.Random) -> str:
    """Pieces of one kind, mixed with a few of other kinds; one in ten has more than 77 tokens."""
    count = rng.randint(100, 200) if rng.random() < 0.1 else rng.randint(0, 12)
    pieces = []
    for _ in range(count):
        make = KINDS[kind] if rng.random() < 0.8 else rng.choice(list(KINDS.values()))
        pieces.append(make(rng) + rng.choice(["", " "]))
    return "".join(pieces)
