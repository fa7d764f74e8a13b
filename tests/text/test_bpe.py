"""The tokenizer to be read gives the ids of the one that is used."""

import random
import unicodedata
import warnings
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
from strings import KINDS, string
from test_tokenizer import STRINGS_PER_KIND
from tokenizers import Regex, pre_tokenizers

from minisd.checkpoints.tokenizer_folder import read_tokenizer
from minisd.numpy_sd import read_vocabulary
from minisd.text import bpe
from minisd.text.tokenizer import Tokenizer

MERGES = bpe.clip_merges()
VOCAB = bpe.clip_vocabulary(MERGES)
clip = cache(Tokenizer.clip)
TINY = Path(str(resources.files("minisd_weights") / "tiny" / "tokenizer"))


def ranks(merges):
    return {pair: rank for rank, pair in enumerate(merges)}


def differ(texts: list[str], tokenizer=None, vocab=VOCAB, merges=MERGES) -> list[str]:
    """Those of the texts that have other ids than the library gives them."""
    tokenizer, order = tokenizer or clip(0), ranks(merges)
    theirs = tokenizer.bpe.encode_batch(texts, add_special_tokens=False)
    return [text for text, encoding in zip(texts, theirs, strict=True)
            if bpe.encode(text, vocab, order) != encoding.ids]


def assigned(text: str) -> str:
    """Its characters of the Unicode version that Python has, and of that of the tokenizers package.

    To the older of the two a character of the newer is not yet a letter, a digit or a capital.
    """
    known = "".join(c for c in text if unicodedata.category(c) != "Cn")
    theirs = pre_tokenizers.Split(Regex(r"[^\p{Cn}]"), behavior="removed", invert=True)
    return "".join(c for c, _ in theirs.pre_tokenize_str(known))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_the_library(kind):
    rng = random.Random(f"tokens {kind}")
    texts = [string(kind, rng) for _ in range(STRINGS_PER_KIND)]
    assert [text for text in differ(texts) if assigned(text) == text] == []


def test_every_character_alone_and_beside_a_letter():
    """Of letters without case, and of private use, one in twenty from U+3400 on."""
    points = (chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and (
        i < 0x3400 or i % 20 == 0 or unicodedata.category(chr(i)) not in ("Lo", "Co")))
    known = assigned("".join(points))
    assert len(known) > 30_000
    texts = [f"{c} a{c} {c}a" for c in known]
    together = [" ".join(texts[i : i + 100]) for i in range(0, len(texts), 100)]
    assert differ(together) == []


def test_the_shipped_vocabulary():
    vocab, merges = read_vocabulary(TINY)
    rng = random.Random(0)
    texts = [string("english", rng) for _ in range(100)] + ["a red heart", "naïve ½ \x1c €"]
    assert differ(texts, read_tokenizer(TINY), vocab, merges) == []


def test_an_unknown_symbol_is_the_end_token():
    vocab = {symbol: i for i, symbol in enumerate([bpe.BOS, bpe.EOS, "a", "b</w>", "ab</w>"])}
    merges = [("a", "b</w>")]
    tokenizer = Tokenizer(vocab, merges, pad_token_id=0)
    assert differ(["ab", "abc", "cab", "é"], tokenizer, vocab, merges) == []


@pytest.mark.parametrize("pad_token_id", [0, 49407])
@pytest.mark.parametrize("prompt", ["", "a cat", "x " * 74, "x " * 75, "x " * 76, f"a {bpe.EOS} b"])
def test_the_frame(prompt, pad_token_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = clip(pad_token_id)(prompt)[0].tolist()
    assert bpe.frame(bpe.encode(prompt, VOCAB, ranks(MERGES)), VOCAB, pad_token_id) == theirs


def test_the_page_tells_the_truth():
    """The ids and the merges in the docstring."""
    assert bpe.encode("Two Hedgehogs!", VOCAB, ranks(MERGES)) == [1237, 16229, 23242, 256]
    assert list(bpe.words("two hedgehogs!")) == ["two", "hedgehogs", "!"]
    assert bpe.merged("hedgehogs", ranks(MERGES[:95])) == "h e d g e ho g s</w>".split()
    assert bpe.merged("hedgehogs", ranks(MERGES)) == ["hedge", "hogs</w>"]
    assert len(MERGES) == 48_894 and len(VOCAB) == 49_408
