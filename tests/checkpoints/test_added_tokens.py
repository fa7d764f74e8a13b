"""Tokens that were added to a folder's tokenizer, by textual inversion for example, reach their ids
in every layout that transformers wrote; what cannot be understood is rejected by name."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import CLIPTokenizer

from minisd.checkpoints.tokenizer_folder import read_tokenizer, write_tokenizer
from minisd.errors import WeightError

TINY = Path(str(resources.files("minisd_weights") / "tiny" / "tokenizer"))
SIZE = len(json.loads((TINY / "vocab.json").read_text()))
TEXTS = ["a <my-cat>", "a <my-cat>!", "<my-cat> <my-cat>, a heart", "a<my-cat>b", "a <MY-CAT>",
         "a red heart", "my-cat <my -cat>", "<two> words <my-cat>"]


def folder(place: Path, name: str = "", content: object = None) -> Path:
    """The shipped tokenizer, with one file more."""
    shutil.copytree(TINY, place)
    if name:
        path = place / name
        old = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(old | content if isinstance(content, dict) else content))
    return place


OLD = {"<my-cat>": SIZE, "<two>": SIZE + 1}
DECODER = {"added_tokens_decoder": {
    str(i): {"content": text, "lstrip": False, "normalized": True, "rstrip": False,
             "single_word": False, "special": False} for text, i in OLD.items()}}


def of_transformers(place: Path) -> Path:
    theirs = CLIPTokenizer.from_pretrained(TINY)
    theirs.add_tokens(list(OLD))
    theirs.save_pretrained(place)
    return place


LAYOUTS = {
    "added_tokens.json": lambda p: folder(p, "added_tokens.json", OLD),
    "tokenizer_config.json": lambda p: folder(p, "tokenizer_config.json", DECODER),
    "both": lambda p: both(p),
    "transformers": of_transformers,
}


def both(place: Path) -> Path:
    folder(place, "added_tokens.json", OLD)
    config = place / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | DECODER))
    return place


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_as_transformers_reads_it(layout, tmp_path):
    place = LAYOUTS[layout](tmp_path / "tokenizer")
    ours, theirs = read_tokenizer(place), CLIPTokenizer.from_pretrained(place)
    assert ours.vocab_size == SIZE + 2 == len(theirs)
    for text in TEXTS:
        want = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert ours(text)[0].tolist() == want, text


def test_they_are_written_and_read_again(tmp_path):
    ours = read_tokenizer(folder(tmp_path / "a", "added_tokens.json", OLD))
    write_tokenizer(tmp_path / "b", ours)
    again, theirs = read_tokenizer(tmp_path / "b"), CLIPTokenizer.from_pretrained(tmp_path / "b")
    for text in TEXTS:
        assert again(text).tolist() == ours(text).tolist()
        want = theirs(text, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert again(text)[0].tolist() == want


def test_the_flags_of_a_token_are_heeded(tmp_path):
    decoder = {"added_tokens_decoder": {str(SIZE): {"content": "xcat", "single_word": True,
                                                    "normalized": False}}}
    ours = read_tokenizer(folder(tmp_path / "a", "tokenizer_config.json", decoder))
    assert ours.added == [AddedToken("xcat", single_word=True, normalized=False, special=False)]
    assert SIZE in ours("a xcat")[0] and SIZE not in ours("a xcatalogue")[0]
    assert SIZE not in ours("a XCAT")[0]
    write_tokenizer(tmp_path / "b", ours)
    assert read_tokenizer(tmp_path / "b").added == ours.added


def test_padding_may_be_an_added_token(tmp_path):
    place = folder(tmp_path / "a", "added_tokens.json", {"[PAD]": SIZE})
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (place / name).exists():
            (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | {
                "pad_token": "[PAD]"}))
    assert read_tokenizer(place)("a heart")[0, -1] == SIZE


BAD = {
    "a gap": ("added_tokens.json", {"<a>": SIZE + 1}, "do not follow the last of the vocabulary"),
    "inside": ("added_tokens.json", {"<a>": 5}, "'<a>' or its id, 5, is taken already"),
    "two of one id": ("added_tokens.json", {"<a>": SIZE, "<b>": SIZE}, "is taken already"),
    "a symbol": ("added_tokens.json", {"cat</w>": SIZE}, "is taken already"),
    "no id": ("added_tokens.json", {"<a>": "5"}, "has no text or no id"),
    "a truth value": ("added_tokens.json", {"<a>": True}, "has no text or no id"),
    "no text": ("tokenizer_config.json", {"added_tokens_decoder": {str(SIZE): {}}}, "no text"),
    "a row of another type": (
        "tokenizer_config.json", {"added_tokens_decoder": {str(SIZE): "<a>"}}, "no text"),
    "a key that is no number": (
        "tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "no id"),
    "a list": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "are no dict"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_understood_is_rejected(case, tmp_path):
    name, content, words = BAD[case]
    with pytest.raises(WeightError, match=words) as caught:
        read_tokenizer(folder(tmp_path / "a", name, content))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
