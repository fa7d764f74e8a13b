"""The only place that sees words: text becomes the 77 token ids that the text encoder reads.

Byte-level BPE as CLIP has it: bpe.py explains it, in plain Python, and here the tokenizers package
computes it. The rules (lower case, NFC, how words are split) are those of transformers'
CLIPTokenizer; Radford et al. 2021, https://arxiv.org/abs/2103.00020.
"""

import re
import warnings
from collections.abc import Sequence

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from minisd.text.bpe import BOS, EOS, LENGTH, clip_merges, clip_vocabulary

# What counts as one word, after lower-casing: a marker, an English ending, a run of letters, one
# digit, or a run of anything else that is not white space.
WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class Tokenizer:
    """Prompts to a (B, length) int64 tensor: begin, at most length - 2 tokens, end, padding.

    ``vocab`` maps each symbol to its id; ``merges`` lists the pairs to join, the first one first.
    ``added`` are whole words with ids after the vocabulary's, as textual inversion adds them.
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
        added: Sequence[AddedToken] = (),
    ):
        self.vocab_size = len(vocab) + len(added)
        self.bos_token_id = vocab[bos_token]
        self.eos_token_id = vocab[eos_token]
        self.pad_token_id = pad_token_id
        self.length = length
        self.added = list(added)
        # The padding token is not declared special. SD2 pads with "!": if that were special, every
        # "!" that a user types would become padding too (as it does in transformers).
        self.bpe = _build_bpe(vocab, merges, unk_token, special=(bos_token, eos_token))
        self.bpe.add_tokens(self.added)

    @classmethod
    def clip(cls, pad_token_id: int) -> "Tokenizer":
        """CLIP's own vocabulary, 49,408 ids, from the merges that this package ships.

        The ids follow from the merges: 256 bytes, 256 bytes that end a word, one per merge, and
        the two markers. SD1 pads with 49407 (the end marker), SD2 with 0.
        """
        merges = clip_merges()
        return cls(clip_vocabulary(merges), merges, pad_token_id=pad_token_id)

    def __call__(self, prompts: str | list[str]) -> torch.Tensor:
        """Token ids of the prompts, (B, length) int64.

        What does not fit is cut, with a warning that quotes it; the end token always stays. Raises
        TypeError for anything that is not text, ValueError for an empty list or a lone surrogate.
        """
        prompts = check_texts("prompt", prompts)
        ids = torch.full((len(prompts), self.length), self.pad_token_id, dtype=torch.int64,
                         device="cpu")
        for row, prompt in zip(ids, prompts):
            tokens = [self.bos_token_id, *self._fit(prompt), self.eos_token_id]
            row[: len(tokens)] = torch.tensor(tokens, device="cpu")
        return ids  # (B, length)

    def _fit(self, prompt: str) -> list[int]:
        """The prompt's ids without the markers, cut to length - 2."""
        encoding = self.bpe.encode(prompt, add_special_tokens=False)
        room = self.length - 2
        if len(encoding.ids) > room:
            dropped = prompt[encoding.offsets[room][0] :]
            warnings.warn(
                f"the prompt is {len(encoding.ids)} tokens long and the model reads {room}; "
                f"these words were dropped: {dropped!r}",
                stacklevel=3,
            )
        return encoding.ids[:room]


def check_texts(name: str, value: object) -> list[str]:
    """A text or a list of texts, as a list: this is the one check of prompts.

    Raises TypeError for anything else and ValueError for an empty list or a lone surrogate, with
    ``name`` in the sentence.
    """
    several = isinstance(value, list | tuple)
    texts = []
    for i, text in enumerate(value if isinstance(value, list | tuple) else [value]):
        where = f"{name}[{i}]" if several else name
        if not isinstance(text, str):
            raise TypeError(f"{where} must be a string, not {type(text).__name__}")
        if surrogate := re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{where} has a lone surrogate, which is no character, "
                             f"at position {surrogate.start()}")
        texts.append(text)
    if not texts:
        raise ValueError(f"{name} is an empty list")
    return texts


def _build_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], unk_token: str, special: tuple[str, str]
) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
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
