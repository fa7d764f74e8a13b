"""The ids of any prompt equal those of transformers' CLIPTokenizer."""

import random
import warnings
from pathlib import Path

import pytest
import torch
from files import clip_merges, clip_vocab, save_tokenizer
from reference_models import official_ids
from strings import KINDS, string
from transformers import CLIPTokenizer

from minisd.text.tokenizer import EOS, Tokenizer

STRINGS_PER_KIND = 1000


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A tokenizer/ folder with the official vocabulary, like SD1's."""
    merges = clip_merges()
    return save_tokenizer(tmp_path_factory.mktemp("official") / "v1", clip_vocab(merges), merges)


@pytest.fixture(scope="module")
def theirs(official) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(official)


@pytest.fixture(scope="module")
def sd1() -> Tokenizer:
    return Tokenizer.clip(pad_token_id=49407)


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind, theirs, sd1):
    rng = random.Random(f"tokens {kind}")
    prompts = [string(kind, rng) for _ in range(STRINGS_PER_KIND)]
    differs = (sd1(prompts) != official_ids(theirs, prompts)).any(dim=1)
    assert not differs.any(), [prompts[i] for i in differs.nonzero()[:3]]


def test_known_ids(sd1):
    # Published with CLIP: the ids of its most common caption.
    assert sd1("a photo of a cat")[0, :8].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407, 49407
    ]
    assert (sd1.vocab_size, sd1.bos_token_id, sd1.eos_token_id) == (49408, 49406, 49407)


def test_shape_and_type(sd1):
    assert sd1("one").shape == (1, 77) and sd1("one").dtype == torch.int64
    assert sd1(["one", "two", ""]).shape == (3, 77)
    assert torch.equal(sd1(["one", "two"])[1:], sd1("two"))


@pytest.mark.parametrize("pad_token_id", [0, 49407])
def test_padding(pad_token_id, theirs):
    prompts = ["", "a cat", "wow!", "!!!", f"a {EOS} b", "x " * 75, "x " * 74]
    tokenizer = Tokenizer.clip(pad_token_id)
    assert torch.equal(tokenizer(prompts), official_ids(theirs, prompts, pad_token_id))


def test_exclamation_mark_is_not_padding(official):
    """transformers turns each "!" of an SD2 prompt into padding; SD2's own code does not."""
    transformers_sd2 = CLIPTokenizer.from_pretrained(official, pad_token="!")
    assert transformers_sd2("wow!").input_ids == [49406, 2781, 0, 49407]
    assert Tokenizer.clip(0)("wow!")[0, :5].tolist() == [49406, 2781, 256, 49407, 0]


@pytest.mark.parametrize("count", [75, 76, 5000])
def test_truncation_keeps_the_end_token_and_quotes_the_dropped_text(count, sd1):
    prompt = " ".join(["cat"] * 75 + ["dog"] * (count - 76) + ["Fin"] * (count > 75))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = sd1(["short", prompt])[1]
    assert ids[0] == 49406 and ids[-1] == 49407 and (ids[1:-1] == 2368).all()
    messages = [str(warning.message) for warning in caught]
    dropped = " ".join(["dog"] * (count - 76) + ["Fin"])
    assert [message.endswith(f"dropped: {dropped!r}") for message in messages] == [True] * (
        count > 75
    )


def test_dropped_text_is_quoted_as_typed(sd1):
    # Lower-casing, NFC and white space shift positions; the warning quotes the original prompt.
    start = "E\u0301  " * 75
    with pytest.warns(UserWarning, match="dropped: 'NAI\u0308VE \U0001f469'"):
        sd1(start + "NAI\u0308VE \U0001f469")


@pytest.mark.parametrize(
    "prompts, error, words",
    [
        (None, TypeError, "prompt must be a string, not NoneType"),
        (123, TypeError, "not int"),
        (b"cat", TypeError, "not bytes"),
        ({"a": 1}, TypeError, "not dict"),
        (["a", None], TypeError, r"prompt\[1\] must be a string, not NoneType"),
        (["a", "b", b"c"], TypeError, r"prompt\[2\] must be a string, not bytes"),
        ([["a"]], TypeError, r"prompt\[0\] must be a string, not list"),
        ([], ValueError, "empty"),
        ("ab\ud800c", ValueError, "prompt has a lone surrogate.* at position 2"),
        (["", "\udc00"], ValueError, r"prompt\[1\] .* at position 0"),
    ],
)
def test_rejected_prompts(prompts, error, words, sd1):
    with pytest.raises(error, match=words):
        sd1(prompts)
