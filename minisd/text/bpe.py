"""CLIP's tokenizer as a page to read: byte pair encoding in plain Python.

    "Two Hedgehogs!"
      | NFC, lower case, words             two | hedgehogs | !
      | bytes, the last one marked         h e d g e h o g s</w>
      | merges, the most frequent first    h e d g e ho g s</w> ... hedge hogs</w>
      v ids, framed and filled up to 77    49406 1237 16229 23242 256 49407 49407 ...

The 48,894 merges were learned once: the pair of neighbouring symbols that was the most frequent in
CLIP's captions became one symbol, again and again. ``</w>`` is the end of a word. tokenizer.py
gets the same ids from a faster library; tests/text/test_bpe.py compares the two.

Sources: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909 (BPE); Radford et al. 2021,
https://arxiv.org/abs/2103.00020 (CLIP). The merges are OpenAI CLIP's (MIT licence,
bpe_simple_vocab_16e6).
"""

import gzip
import math
import re
import unicodedata
from collections.abc import Iterator
from importlib import resources

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # positions of CLIP's text encoder

MARKER = re.compile(r"<\|startoftext\|>|<\|endoftext\|>")
# A word is a marker or an English ending; else a run of letters, one digit, or a run of anything
# else but white space. The second pattern is for the kinds of the characters, one letter each.
FIXED = re.compile(MARKER.pattern + r"|'s|'t|'re|'ve|'m|'ll|'d")
RUN = re.compile("L+|N|P+| ")

# GPT-2's alphabet: each of the 256 bytes as a character that can be seen. The others come after.
SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
HIDDEN = [byte for byte in range(256) if byte not in SEEN]
ALPHABET = {byte: chr(byte) for byte in SEEN} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}

Merges = list[tuple[str, str]]
Ranks = dict[tuple[str, str], int]  # which merge a pair is, 0 for the first


def encode(text: str, vocab: dict[str, int], ranks: Ranks) -> list[int]:
    """The ids of a text, without a frame."""
    ids, start = [], 0
    for marker in MARKER.finditer(text):  # in small letters only: see words()
        ids += _encode_plain(text[start : marker.start()], vocab, ranks) + [vocab[marker[0]]]
        start = marker.end()
    return ids + _encode_plain(text[start:], vocab, ranks)


def _encode_plain(text: str, vocab: dict[str, int], ranks: Ranks) -> list[int]:
    text = unicodedata.normalize("NFC", text)
    text = "".join(map(str.lower, text))  # one by one: in a word the last Greek sigma is special
    symbols = [symbol for word in words(text) for symbol in merged(word, ranks)]
    return [vocab.get(symbol, vocab[EOS]) for symbol in symbols]


def words(text: str) -> Iterator[str]:
    """The words of a text in lower case, without white space."""
    kinds, i = "".join(map(_kind, text)), 0
    while i < len(text):
        found = FIXED.match(text, i) or RUN.match(kinds, i)
        assert found is not None
        word, kind, i = text[i : found.end()], kinds[i], found.end()
        if MARKER.fullmatch(word):  # typed in capitals; GPT-2's pattern takes it apart once more
            yield from re.findall(r"\w+|\W+", word)
        elif kind != " ":
            yield word


def _kind(character: str) -> str:
    """"L" is a letter, "N" a number, " " white space, and "P" anything else."""
    # Python alone takes the four separators below for white space; Unicode and CLIP do not.
    if character.isspace() and not "\x1c" <= character <= "\x1f":
        return " "
    major = unicodedata.category(character)[0]
    return major if major in "LN" else "P"


def merged(word: str, ranks: Ranks) -> list[str]:
    """The symbols of a word: its bytes, joined by merge after merge."""
    symbols = [ALPHABET[byte] for byte in word.encode()]
    symbols[-1] += "</w>"
    while len(symbols) > 1:
        found = [ranks.get(pair, math.inf) for pair in zip(symbols, symbols[1:])]
        best = min(found)
        if best == math.inf:
            break
        i = found.index(best)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return symbols


def frame(ids: list[int], vocab: dict[str, int], pad_token_id: int) -> list[int]:
    """What the text encoder reads: begin, the first 75 ids, end, and padding up to 77."""
    framed = [vocab[BOS], *ids[: LENGTH - 2], vocab[EOS]]
    return framed + [pad_token_id] * (LENGTH - len(framed))


def clip_merges() -> Merges:
    """CLIP's own merges, which this package ships."""
    packed = resources.files("minisd.text").joinpath("merges.txt.gz").read_bytes()
    return parse_merges(gzip.decompress(packed).decode())


def parse_merges(text: str) -> Merges:
    """The lines of a merges.txt, each as the two symbols to join."""
    # The first line is a version; "#" may also begin a merge.
    lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    pairs = (line.partition(" ") for line in lines)
    return [(left, right) for left, _, right in pairs]


def clip_vocabulary(merges: Merges) -> dict[str, int]:
    """Symbol -> id, as CLIP numbers them: 256 bytes, 256 bytes that end a word, one per merge, and
    the two markers; 49,408 with CLIP's own merges."""
    alphabet = sorted(ALPHABET.values())
    symbols = alphabet + [byte + "</w>" for byte in alphabet]
    symbols += [left + right for left, right in merges] + [BOS, EOS]
    return {symbol: index for index, symbol in enumerate(symbols)}
