"""The only place that sees words: text becomes the 77 numbers that the text encoder reads.

Byte-level BPE as CLIP has it. A word starts as its UTF-8 bytes, one symbol each, the last marked
with ``</w>``; then the merges, most frequent first, join neighbours into ever longer symbols. The
rules (lower case, NFC, how words are split) are those of transformers' CLIPTokenizer; the merges
are OpenAI CLIP's (MIT licence, bpe_simple_vocab_16e6).
"""

import gzip
import json
import warnings
from importlib import resources
from pathlib import Path

import torch

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # positions of CLIP's text encoder
MAX_FILE_BYTES = 32 * 2**20  # the official files are below 4 MB

# What counts as one word, after lower-casing: a marker, an English ending, a run of letters, one
# digit, or a run of anything else that is not white space.
WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Prompts to a (B, length) int64 tensor: begin, at most length - 2 tokens, end, padding.

    ``vocab`` maps each symbol to its id, ``merges`` lists the pairs to join, first one first.
    ``words``: those that the model was taught; None: any.
    Attributes: ``vocab_size``, ``bos_token_id``, ``eos_token_id``, ``pad_token_id``, ``length``.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        *,
        pad_token_id: int,
        bos_token: str = BOS,
        eos_token: str = EOS,
        unk_token: str = EOS,
        length: int = LENGTH,
        words: frozenset[str] | None = None,
    ):
        self.vocab_size = len(vocab)
        self.bos_token_id = vocab[bos_token]
        self.eos_token_id = vocab[eos_token]
        self.pad_token_id = pad_token_id
        self.length, self.words = length, words
        # The padding token is left out on purpose: SD2 pads with "!", and were it special, every
        # "!" that a user types would become padding too (as it does in transformers).
        self._bpe = _build_bpe(vocab, merges, unk_token, special=(bos_token, eos_token))

    @classmethod
    def clip(cls, pad_token_id: int) -> "Tokenizer":
        """CLIP's own vocabulary, 49,408 ids, from the merges that this package ships.

        The ids follow from the merges: 256 bytes, 256 bytes that end a word, one per merge, and
        the two markers. SD1 pads with 49407 (the end marker), SD2 with 0.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        packed = resources.files(__package__).joinpath("merges.txt.gz").read_bytes()
        merges = _parse_merges(gzip.decompress(packed).decode())
        alphabet = sorted(ByteLevel.alphabet())  # the order in which CLIP numbers the bytes
        symbols = alphabet + [byte + "</w>" for byte in alphabet]
        symbols += [left + right for left, right in merges] + [BOS, EOS]
        vocab = {symbol: index for index, symbol in enumerate(symbols)}
        return cls(vocab, merges, pad_token_id=pad_token_id)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The ``tokenizer/`` folder of a model in diffusers layout, old (vocab.json) or new
        (tokenizer.json). A words.txt beside the folder lists the words that the model knows.
        Raises ValueError, naming the file, if it is missing or malformed.
        """
        folder = Path(folder)
        path, vocab, merges = _read_vocabulary(folder)
        _check_vocabulary(path, vocab)
        merges = _check_merges(path, vocab, merges)
        settings = _read_settings(folder)
        defaults = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
        tokens = {key: _token(folder, settings, key, defaults[key], vocab) for key in defaults}
        pad_token_id = vocab[tokens.pop("pad_token")]
        length = settings.get("model_max_length", LENGTH)
        if type(length) is not int or length < 3:
            raise ValueError(f"{folder}: model_max_length is {length!r}, not an integer above 2")
        # transformers writes 10^30 for "never set"; CLIP has no more than 77 positions anyway.
        length = min(length, LENGTH)
        path = folder.parent / "words.txt"
        words = frozenset(_read_text(path).split()) if path.is_file() else None
        return cls(vocab, merges, pad_token_id=pad_token_id, length=length, words=words, **tokens)

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        """Ids of the prompts, (B, length) int64. What does not fit is cut, with a warning that
        quotes it; the end token always stays. Words outside ``words`` get a warning too. Raises
        TypeError for anything that is not text, ValueError for an empty list or a lone surrogate.
        """
        prompts = _check_prompts(prompts)
        ids = torch.full((len(prompts), self.length), self.pad_token_id, dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            tokens = [self.bos_token_id, *self._fit(prompt), self.eos_token_id]
            row[: len(tokens)] = torch.tensor(tokens)
        return ids  # (B, length)

    def _fit(self, prompt: str) -> list[int]:
        """The prompt's ids, without markers, cut to the room there is."""
        encoding = self._bpe.encode(prompt, add_special_tokens=False)
        room = self.length - 2
        if len(encoding.ids) > room:
            dropped = prompt[encoding.offsets[room][0] :]
            warnings.warn(
                f"the prompt is {len(encoding.ids)} tokens long and the model reads {room}; "
                f"these words were dropped: {dropped!r}",
                stacklevel=3,
            )
        if self.words is not None:
            numbers = dict.fromkeys(encoding.word_ids[:room])  # of the words, each of some tokens
            spans = (slice(*encoding.word_to_chars(number)) for number in numbers)
            said = dict.fromkeys(prompt[span].lower() for span in spans)
            unknown = [repr(word) for word in said if word not in self.words]
            if unknown:
                warnings.warn(
                    f"this model was not taught {', '.join(unknown)}: what it makes of that is "
                    "chance (`minisd words` lists what the shipped model knows)",
                    stacklevel=3,
                )
        return encoding.ids[:room]


def _build_bpe(vocab, merges, unk_token, special):
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer as Backend,
        models,
        normalizers,
        pre_tokenizers,
    )

    bpe = Backend(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=unk_token,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    utf8 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, utf8])
    bpe.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return bpe


def _check_prompts(prompts) -> list[str]:
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, list | tuple):
        raise TypeError(f"a prompt is a string or a list of strings, not {_kind(prompts)}")
    if not prompts:
        raise ValueError("the list of prompts is empty")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {index} is not a string but {_kind(prompt)}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"prompt {index} is not valid Unicode: a lone surrogate, "
                f"{prompt[error.start]!r}, at position {error.start}"
            ) from None
    return list(prompts)


def _kind(value) -> str:
    return "None" if value is None else type(value).__name__


# --- reading a tokenizer/ folder ---------------------------------------------------------------


def _read_vocabulary(folder: Path) -> tuple[Path, object, list]:
    """The file to name in errors, the vocabulary and the merges, as they stand there."""
    whole = folder / "tokenizer.json"
    if (folder / "vocab.json").exists() or not whole.exists():
        path = folder / "vocab.json"
        return path, _read_json(path), _parse_merges(_read_text(folder / "merges.txt"))
    # transformers 5 writes this one file instead of two.
    model = _read_json(whole).get("model")
    if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
        raise ValueError(f"{whole} holds no BPE model")
    # Each merge is a pair, or in older files the two joined by a space.
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return whole, model.get("vocab"), merges


def _read_settings(folder: Path) -> dict:
    """tokenizer_config.json, overruled by special_tokens_map.json: SD2's folders name the end
    token as padding in the first and "!", which the model was trained with, in the second.
    """
    settings = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            settings |= _read_json(folder / name)
    return settings


def _read_json(path: Path) -> dict:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} is larger than any tokenizer's, {MAX_FILE_BYTES >> 20} MiB")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def _parse_merges(text: str) -> list[tuple[str, ...]]:
    # The first line is a version; "#" may also begin a merge.
    lines = [line for line in text.splitlines() if line and not line.startswith("#version")]
    return [tuple(line.split(" ")) for line in lines]


def _check_vocabulary(path: Path, vocab) -> None:
    if not isinstance(vocab, dict) or any(type(index) is not int for index in vocab.values()):
        raise ValueError(f"{path} does not map tokens to integers")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"{path}: the ids are not 0 to {len(vocab) - 1}, each once")
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: a token is not valid Unicode") from None


def _check_merges(path: Path, vocab: dict[str, int], merges: list) -> list[tuple[str, str]]:
    for merge in merges:
        try:
            left, right = merge
            known = left in vocab and right in vocab and left + right in vocab
        except (TypeError, ValueError):  # not two strings
            known = False
        if not known:
            raise ValueError(f"{path}: the merge {merge!r} does not fit the vocabulary")
    return [tuple(merge) for merge in merges]


def _token(folder: Path, settings: dict, key: str, default: str, vocab: dict) -> str:
    token = settings.get(key) or default
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str) or token not in vocab:
        raise ValueError(f"{folder}: {key} is {token!r}, which the vocabulary does not have")
    return token
