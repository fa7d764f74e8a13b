"""The ids of any prompt equal those of transformers' CLIPTokenizer."""

import gzip
import json
import random
import unicodedata
import warnings
from pathlib import Path

import pytest
import torch
from transformers import CLIPTokenizer

import minisd.text.tokenizer
from minisd.checkpoints.tokenizer_folder import read_tokenizer
from minisd.errors import WeightError
from minisd.text.tokenizer import BOS, EOS, Tokenizer

STRINGS_PER_KIND = 1000

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCRIPTS = [  # first and last code point of scripts with and without case, marks and spaces
    (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1E00, 0x1FFF),
    (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFDFF), (0xFF00, 0xFFEF),
    (0x10400, 0x1044F), (0x1D400, 0x1D7FF),
]  # fmt: skip
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


def _string(kind, rng):
    """Pieces of one kind, mixed with a few of other kinds; one in ten has more than 77 tokens."""
    count = rng.randint(100, 200) if rng.random() < 0.1 else rng.randint(0, 12)
    pieces = []
    for _ in range(count):
        make = KINDS[kind] if rng.random() < 0.8 else rng.choice(list(KINDS.values()))
        pieces.append(make(rng) + rng.choice(["", " "]))
    return "".join(pieces)


def _merges() -> list[str]:
    packed = Path(minisd.text.tokenizer.__file__).with_name("merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode().split("\n")[1:-1]


def _vocab(merges) -> dict[str, int]:
    """CLIP's ids, from its description: printable bytes as themselves, the others as characters
    from U+0100 on; each again as the end of a word; the merges; the special tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = len(set(range(256)) - set(printable))
    symbols = [chr(point) for point in printable + list(range(0x100, 0x100 + moved))]
    symbols += [symbol + "</w>" for symbol in symbols]
    symbols += [merge.replace(" ", "") for merge in merges] + [BOS, EOS]
    return {symbol: index for index, symbol in enumerate(symbols)}


def _write_folder(folder: Path, vocab, merges, **settings) -> Path:
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A tokenizer/ folder with the official vocabulary, like SD1's."""
    merges = _merges()
    return _write_folder(tmp_path_factory.mktemp("official") / "v1", _vocab(merges), merges)


@pytest.fixture(scope="module")
def theirs(official) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(official)


@pytest.fixture(scope="module")
def sd1() -> Tokenizer:
    return Tokenizer.clip(pad_token_id=49407)


def _official_ids(theirs, prompts, pad_token_id=None):
    out = theirs(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    if pad_token_id is None:
        return out.input_ids
    return torch.where(out.attention_mask.bool(), out.input_ids, pad_token_id)


@pytest.mark.filterwarnings("ignore:the prompt is")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_transformers(kind, theirs, sd1):
    rng = random.Random(f"tokens {kind}")
    prompts = [_string(kind, rng) for _ in range(STRINGS_PER_KIND)]
    differs = (sd1(prompts) != _official_ids(theirs, prompts)).any(dim=1)
    assert not differs.any(), [prompts[i] for i in differs.nonzero()[:3]]


def test_known_ids(sd1):
    # Published with CLIP: the ids of its most common caption.
    assert sd1("a photo of a cat")[0, :8].tolist() == [
        49406, 320, 1125, 539, 320, 2368, 49407, 49407
    ]  # fmt: skip
    assert (sd1.vocab_size, sd1.bos_token_id, sd1.eos_token_id) == (49408, 49406, 49407)


def test_shape_and_type(sd1):
    assert sd1("one").shape == (1, 77) and sd1("one").dtype == torch.int64
    assert sd1(["one", "two", ""]).shape == (3, 77)
    assert torch.equal(sd1(["one", "two"])[1:], sd1("two"))


@pytest.mark.parametrize("pad_token_id", [0, 49407])
def test_padding(pad_token_id, theirs):
    prompts = ["", "a cat", "wow!", "!!!", f"a {EOS} b", "x " * 75, "x " * 74]
    tokenizer = Tokenizer.clip(pad_token_id)
    assert torch.equal(tokenizer(prompts), _official_ids(theirs, prompts, pad_token_id))


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


def test_folder_as_sd1(official, sd1):
    tokenizer = read_tokenizer(official)
    assert tokenizer.pad_token_id == 49407
    assert torch.equal(tokenizer("It's 2 cats!"), sd1("It's 2 cats!"))


def test_folder_as_sd2(official, tmp_path):
    """SD2's two settings files disagree about the padding; special_tokens_map.json is right."""
    merges = _merges()
    marker = {"__type": "AddedToken", "content": EOS, "lstrip": False, "normalized": True}
    folder = _write_folder(tmp_path / "v2", _vocab(merges), merges, pad_token=EOS, eos_token=marker)
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
)}  # fmt: skip
SMALL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "_", "pad_token": "_"}


@pytest.fixture
def small(tmp_path) -> Path:
    return _write_folder(tmp_path / "small", SMALL_VOCAB, ["a b</w>"], **SMALL_TOKENS)


def test_small_vocabulary(small):
    tokenizer = read_tokenizer(small)
    assert (tokenizer.vocab_size, tokenizer.pad_token_id) == (10, 9)
    assert tokenizer("ab CAB xa</s>")[0, :11].tolist() == [7, 6, 2, 6, 9, 3, 8, 8, 9, 9, 9]
    prompts = ["ab cab xa", "</s> a", "héb"]
    theirs = CLIPTokenizer.from_pretrained(small)
    assert torch.equal(tokenizer(prompts), _official_ids(theirs, prompts))


@pytest.mark.parametrize("written, length", [
    (16, 16), (10**30, 77), (1e30, 77), (16.0, 16), (None, 77)])
def test_length_of_a_folder(written, length, tmp_path):
    settings = {**SMALL_TOKENS, "model_max_length": written}
    folder = _write_folder(tmp_path / "t", SMALL_VOCAB, ["a b</w>"], **settings)
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
