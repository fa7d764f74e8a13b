"""The tokenizer folder of a model, as official checkpoints and transformers write it."""

import json
import random
from pathlib import Path

import pytest
import torch
from files import clip_merges, clip_vocab, save_tokenizer
from reference_models import official_ids
from transformers import CLIPTokenizer

from minisd.checkpoints.tokenizer_folder import read_tokenizer
from minisd.errors import WeightError
from minisd.text.tokenizer import EOS, Tokenizer


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


def test_folder_as_sd1(official, sd1):
    tokenizer = read_tokenizer(official)
    assert tokenizer.pad_token_id == 49407
    assert torch.equal(tokenizer("It's 2 cats!"), sd1("It's 2 cats!"))


def test_folder_as_sd2(official, tmp_path):
    """SD2's two settings files disagree about the padding; special_tokens_map.json is right."""
    merges = clip_merges()
    marker = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": True}
    folder = save_tokenizer(tmp_path / "v2", clip_vocab(merges), merges,
                            pad_token=EOS, eos_token=marker)
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    tokenizer = read_tokenizer(folder)
    assert torch.equal(tokenizer(["wow!", ""]), Tokenizer.clip(0)(["wow!", ""]))


def test_folder_as_transformers_5_writes_it(theirs, tmp_path, sd1):
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == 49407
    assert torch.equal(tokenizer("It's 2 cats!"), sd1("It's 2 cats!"))


# --- a small vocabulary: a, b, c, the same at the end of a word, "ab</w>", and no other letter ---

SMALL_VOCAB = {symbol: index for index, symbol in enumerate(
    ["a", "b", "c", "a</w>", "b</w>", "c</w>", "ab</w>", "<s>", "</s>", "_"]
)}
SMALL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "_", "pad_token": "_"}


@pytest.fixture
def small(tmp_path) -> Path:
    return save_tokenizer(tmp_path / "small", SMALL_VOCAB, ["a b</w>"], **SMALL_TOKENS)


def test_small_vocabulary(small):
    tokenizer = read_tokenizer(small)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (10, 9)
    assert tokenizer("ab CAB xa</s>")[0, :11].tolist() == [7, 6, 2, 6, 9, 3, 8, 8, 9, 9, 9]
    prompts = ["ab cab xa", "</s> a", "héb"]
    theirs = CLIPTokenizer.from_pretrained(small)
    assert torch.equal(tokenizer(prompts), official_ids(theirs, prompts))


@pytest.mark.parametrize("written, length", [
    (16, 16), (10**30, 77), (1e30, 77), (16.0, 16), (None, 77)])
def test_length_of_a_folder(written, length, tmp_path):
    settings = {**SMALL_TOKENS, "model_max_length": written}
    folder = save_tokenizer(tmp_path / "t", SMALL_VOCAB, ["a b</w>"], **settings)
    tokenizer = read_tokenizer(folder)
    assert tokenizer.length == length and tokenizer("a").shape == (1, length)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("vocab.json", None, "vocab.json is missing"),
        ("vocab.json", b"{", "vocab.json is not readable JSON"),
        ("vocab.json", b"[" * 100_000, "vocab.json is not readable JSON"),
        ("vocab.json", b"[1]", "vocab.json: the JSON in it is not an object"),
        ("vocab.json", b'{"a": "0"}', "vocab.json does not map"),
        ("vocab.json", b'{"a": true}', "vocab.json does not map"),
        ("vocab.json", b'{"a": 0, "b": 2}', "vocab.json: the ids"),
        ("vocab.json", b'{"\\ud800": 0}', "vocab.json: a token is not valid Unicode"),
        ("vocab.json", b" " * (33 << 20), "vocab.json is too large"),
        ("vocab.json", b'{"a": 0, "a": 1}', "vocab.json has 'a' twice"),
        ("vocab.json", b'{"a": 0, "b</w>": 1, "ab</w>": 2}', "bos_token is '<s>'"),
        ("merges.txt", None, "merges.txt is missing"),
        ("merges.txt", b"\xff\xfe", "merges.txt is not UTF-8"),
        ("merges.txt", b"#version: 0.2\n", "has no merges, of which the vocabulary's tokens are"),
        ("merges.txt", b"#version: 0.2\na\n", r"vocab.json: the merge \('a', ''\)"),
        ("merges.txt", b"a b c\n", "the merge"),
        ("merges.txt", b"a c</w>\n", "the merge"),
        ("tokenizer_config.json", b"nonsense", "tokenizer_config.json is not readable JSON"),
        ("tokenizer_config.json", b'{"model_max_length": "77"}', "model_max_length is '77'"),
        ("tokenizer_config.json", b'{"model_max_length": 2}', "model_max_length is 2"),
        ("tokenizer_config.json", b'{"model_max_length": 7.5}', "model_max_length is 7.5"),
        ("tokenizer_config.json", b'{"model_max_length": true}', "model_max_length is True"),
        ("special_tokens_map.json", b'{"pad_token": "!"}', "pad_token is '!'"),
        ("special_tokens_map.json", b'{"unk_token": {"contents": "a"}}', "unk_token is None"),
        ("special_tokens_map.json", b'{"eos_token": [1]}', r"eos_token is \[1\]"),
    ],
)
def test_malformed_folder(name, content, words, small):
    if name == "tokenizer_config.json" and content[:1] == b"{":
        content = json.dumps({**SMALL_TOKENS, **json.loads(content)}).encode()
    (small / name).unlink(missing_ok=True)
    if content is not None:
        (small / name).write_bytes(content)
    with pytest.raises(WeightError, match=words):
        read_tokenizer(small)


@pytest.mark.parametrize("model", [None, [], {"vocab": {"a": 0}}, {"vocab": {}, "merges": [3]}])
def test_malformed_tokenizer_json(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(WeightError, match="tokenizer.json"):
        read_tokenizer(tmp_path)


def test_damaged_folder_loads_or_raises_value_error(small):
    rng = random.Random(0)
    outcomes = {"loads": 0, "rejected": 0}
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        original = (small / name).read_bytes()
        for _ in range(200):
            damaged = bytearray(original)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.choice(b'{}[]":, \\0a\x00\xff')
            (small / name).write_bytes(damaged)
            try:
                read_tokenizer(small)("ab c!")
                outcomes["loads"] += 1
            except WeightError as error:
                assert str(small) in str(error)
                outcomes["rejected"] += 1
        (small / name).write_bytes(original)
    assert min(outcomes.values()) > 20, outcomes
