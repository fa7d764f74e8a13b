"""The ``tokenizer/`` folder of a model in diffusers layout, read and written.

A folder holds vocab.json and merges.txt, or since transformers 5 one tokenizer.json. Every fault is
a WeightError that names the file.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from minisd.checkpoints.json_file import JsonFile, plain
from minisd.errors import WeightError
from minisd.text.bpe import BOS, EOS, LENGTH, parse_merges
from minisd.text.tokenizer import Tokenizer, check_texts

MAX_BYTES = 32 * 2**20  # the official files are below 4 MB
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a folder describes; WeightError where a file is missing or malformed.

    A words.txt beside the folder lists the words that the model was taught, as the shipped model's
    does: the tokenizer then warns of any other word.
    """
    path, vocab, merges = _read_vocabulary(folder)
    settings = _read_settings(folder)
    added = _read_added(folder, settings, vocab)
    ids = vocab | {token.content: len(vocab) + i for i, token in enumerate(added)}
    tokens = {key: _token(folder, settings, key, ids if key == "pad_token" else vocab)
              for key in DEFAULTS}
    length = settings.get("model_max_length")
    length = LENGTH if length is None else plain(length)
    if type(length) is not int or length < 3:
        raise WeightError(f"{folder}: model_max_length is {length!r}, not an integer above 2")
    # transformers writes 10^30 for "never set"; CLIP has no more than 77 positions anyway.
    length = min(length, LENGTH)
    options: dict[str, Any] = {"pad_token_id": ids[tokens.pop("pad_token")], "length": length,
                               "added": added, **tokens}
    words = folder.parent / "words.txt"
    if not words.is_file():
        return Tokenizer(vocab, merges, **options)
    taught = [*_read_text(words).split(), *(token.content.lower() for token in added)]
    return TaughtTokenizer(vocab, merges, taught, **options)


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Make a new folder that ``read_tokenizer`` and transformers read, words.txt beside it."""
    folder.mkdir()
    tokenizer.bpe.model.save(str(folder))  # vocab.json and merges.txt
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id,
           "pad_token": tokenizer.pad_token_id}
    tokens = {key: tokenizer.bpe.id_to_token(index) for key, index in ids.items()}
    tokens["unk_token"] = tokenizer.bpe.model.unk_token
    settings: dict[str, Any] = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.length, **tokens}
    settings["added_tokens_decoder"] = {
        str(tokenizer.bpe.token_to_id(token.content)):
            {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}
        for token in tokenizer.added}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens, indent=2) + "\n")
    if isinstance(tokenizer, TaughtTokenizer):
        (folder.parent / "words.txt").write_text("\n".join(tokenizer.words) + "\n", "utf-8")


class TaughtTokenizer(Tokenizer):
    """A tokenizer that warns of each word that its model was not taught."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]],
                 words: Iterable[str], **options):
        super().__init__(vocab, merges, **options)
        self.words = dict.fromkeys(words)  # in their order, and quick to look up

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        for prompt in check_texts("prompt", prompts):
            encoding = self.bpe.encode(prompt, add_special_tokens=False)
            numbers = dict.fromkeys(encoding.word_ids[: self.length - 2])  # each word once
            spans = (encoding.word_to_chars(number) for number in numbers if number is not None)
            said = (prompt[slice(*span)].lower() for span in spans if span is not None)
            unknown = [repr(word) for word in dict.fromkeys(said) if word not in self.words]
            if unknown:
                warnings.warn(
                    f"this model was not taught {', '.join(unknown)}: what it makes of that is "
                    "chance (`minisd words` lists what the shipped model knows)",
                    stacklevel=2,
                )
        return super().__call__(prompts)


def _read_vocabulary(folder: Path) -> tuple[Path, dict[str, int], list[tuple[str, str]]]:
    """The file to name in errors, the vocabulary and the merges, checked."""
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").exists() or not whole.exists():
        path, merges = folder / "vocab.json", parse_merges(_read_text(folder / "merges.txt"))
        vocab = _check_vocabulary(path, _read_json(path))
        return path, vocab, _check_merges(path, vocab, merges)
    # transformers 5 writes one file instead of the two.
    model = _read_json(whole).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise WeightError(f"{whole} holds no BPE model")
    vocab = _check_vocabulary(whole, model.get("vocab"))
    # Each merge is a pair, or in older files the two joined by a space.
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return whole, vocab, _check_merges(whole, vocab, pairs)


def _read_settings(folder: Path) -> dict:
    """tokenizer_config.json, overruled by special_tokens_map.json: SD2's folders name the end
    token as padding in the first, and in the second "!", which the model was trained with.
    """
    settings: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings |= _read_json(folder / name)
    return settings


def _read_added(folder: Path, settings: dict, vocab: Mapping[str, int]) -> list[AddedToken]:
    """The words that were added to the vocabulary, in the order of their ids, which follow it.

    They stand in tokenizer.json, in tokenizer_config.json or, in folders until 2023, in
    added_tokens.json; what is in the vocabulary too, as the two markers are, is not added.
    """
    found: dict[int, AddedToken] = {}
    taken = set(vocab.values())
    for path, rows in _added_rows(folder, settings):
        for index, row in rows:
            content = row.get("content")
            if not isinstance(content, str) or not content or type(index) is not int:
                raise WeightError(f"{path}: the added token {row!r} has no text or no id")
            if vocab.get(content) == index:
                continue
            flags = {key: row[key] for key in FLAGS if isinstance(row.get(key), bool)}
            token = AddedToken(content, **{"special": False, **flags})
            if (content in vocab or index in taken
                    or found.setdefault(index, token).content != content):
                raise WeightError(f"{path}: {content!r} or its id, {index}, is taken already")
    if sorted(found) != list(range(len(vocab), len(vocab) + len(found))):
        raise WeightError(f"{folder}: the added tokens have the ids {sorted(found)[:5]}, which do "
                          f"not follow the last of the vocabulary, {len(vocab) - 1}")
    return [found[index] for index in sorted(found)]


def _added_rows(folder: Path, settings: dict) -> Iterator[tuple[Path, list[tuple[object, dict]]]]:
    """(file, its (id, token) pairs), of each file that may have some."""
    def checked(path: Path, rows: object, kind: type) -> Any:
        if not isinstance(rows, kind):
            raise WeightError(f"{path}: its added tokens are no {kind.__name__}")
        return rows

    def table(row: object) -> dict:
        return row if isinstance(row, dict) else {}

    whole, old = folder / "tokenizer.json", folder / "added_tokens.json"
    if whole.exists():
        rows = checked(whole, _read_json(whole).get("added_tokens") or [], list)
        yield whole, [(table(row).get("id"), table(row)) for row in rows]
    config = folder / "tokenizer_config.json"
    rows = checked(config, settings.get("added_tokens_decoder") or {}, dict)
    yield config, [(int(key) if key.isdecimal() and len(key) < 9 else None, table(row))
                   for key, row in rows.items()]
    if old.exists():
        yield old, [(index, {"content": text}) for text, index in _read_json(old).items()]


def _read_json(path: Path) -> dict:
    return JsonFile(path, MAX_BYTES).fields


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise WeightError(f"{path} is missing")
    if path.stat().st_size > MAX_BYTES:
        raise WeightError(f"{path} is larger than any tokenizer's, {MAX_BYTES >> 20} MiB")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise WeightError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_vocabulary(path: Path, vocab: object) -> dict[str, int]:
    if not isinstance(vocab, dict) or any(type(index) is not int for index in vocab.values()):
        raise WeightError(f"{path} does not map tokens to integers")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise WeightError(f"{path}: the ids are not 0 to {len(vocab) - 1}, each once")
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError:
        raise WeightError(f"{path}: a token is not valid Unicode") from None
    return vocab


def _check_merges(
    path: Path, vocab: Mapping[str, int], merges: Iterable[object]
) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        pair = list(merge) if isinstance(merge, (list, tuple)) else []
        if len(pair) != 2 or not all(isinstance(symbol, str) for symbol in pair):
            raise WeightError(f"{path}: the merge {merge!r} does not fit the vocabulary")
        left, right = pair
        if not (left in vocab and right in vocab and left + right in vocab):
            raise WeightError(f"{path}: the merge {merge!r} does not fit the vocabulary")
        pairs.append((left, right))
    if not pairs and any(len(symbol.removesuffix("</w>")) > 1 for symbol in vocab
                         if symbol not in DEFAULTS.values()):
        raise WeightError(f"{path.parent} has no merges, of which the vocabulary's tokens are made")
    return pairs


def _token(folder: Path, settings: dict, key: str, vocab: Mapping[str, int]) -> str:
    token = settings.get(key) or DEFAULTS[key]
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str) or token not in vocab:
        raise WeightError(f"{folder}: {key} is {token!r}, which the vocabulary does not have")
    return token
