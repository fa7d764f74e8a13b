"""One drawing, watched: what the page of `minisd explain` shows.

Nothing is computed beside the drawing that it could compute itself: hooks note what the networks
are given and what they answer, and the attention of the `Ops` notes who looks at which word.

B latents (1, or 2 with guidance), C channels, h w height and width of the latent or of a level,
H heads, L positions of the context (77), d channels per head
"""

import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from minisd import images
from minisd.models.ops import TORCH, split_heads
from minisd.models.transformer import SpatialTransformer
from minisd.request import Plan
from minisd.samplers.schedule import Level, predicted_x0_eps

SHOWN = 6  # calls of the UNet that are shown


class Token(NamedTuple):
    """What one position of the context stands for."""

    text: str    # the part of the prompt
    symbol: str  # as the vocabulary has it
    id: int
    word: tuple[int, int] | None  # where its word begins and ends; None for the markers


@dataclass(frozen=True)
class Moment:
    """A call of the UNet: x as it was shown, and what it took the finished latent to be."""

    i: int
    level: Level
    x: Image
    x0: Image
    halves: list[Image]   # of some calls with guidance: x0 without and with the prompt, ...
    change: np.ndarray    # ... and how far they are apart at each cell, (h, w)


@dataclass(frozen=True)
class Run:
    """All that the page shows. Arrays are NumPy's."""

    plan: Plan
    settings: dict
    tokens: list[Token]    # of the prompt, with both markers and without padding
    cut: int               # tokens of the prompt that did not fit
    contexts: np.ndarray   # (B, 77, D): with guidance that of the negative prompt first
    noise: np.ndarray      # x_T (C, h, w)
    moments: list[Moment]
    maps: dict[tuple[int, int], np.ndarray]  # size of a level -> attention (77, h, w)
    latent: np.ndarray     # (C, h, w)
    image: Image
    where: str
    seconds: float

    @property
    def words(self) -> list[tuple[str, list[int]]]:
        """The words of the prompt, each with its positions in the context."""
        found: dict[tuple[int, int], list[int]] = {}
        for position, token in enumerate(self.tokens):
            if token.word is not None:
                found.setdefault(token.word, []).append(position)
        prompt = self.settings["prompt"]
        return [(prompt[start:end], where) for (start, end), where in found.items()]


class WordMaps:
    """Torch's attention, which also notes how much each place of the image reads of each token.

    The weights softmax(q k^T / sqrt(d)) of cross-attention say it, as in "Prompt-to-Prompt" (Hertz
    et al. 2022, https://arxiv.org/abs/2208.01626) and "What the DAAM" (Tang et al. 2022,
    https://arxiv.org/abs/2210.04885). Only sums are kept, one for each size.
    """

    def __init__(self) -> None:
        self.ops = replace(TORCH, attention=self)
        self._sums: dict[tuple[int, int], Tensor] = {}
        self._counts: Counter[tuple[int, int]] = Counter()
        self._size, self._reads_prompt = (0, 0), False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int,
                 causal: bool = False) -> Tensor:
        if self._reads_prompt:
            # The last of the batch is the image with its prompt, with and without guidance.
            self._add(q[-1], k[-1], heads)
        self._reads_prompt = False
        return TORCH.attention(q, k, v, heads, causal)

    def _add(self, q: Tensor, k: Tensor, heads: int) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        q, k = (split_heads(x[None].to(wide), heads)[0] for x in (q, k))     # (H, L, d)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)  # (H, h*w, L)
        shares = weights.mean(dim=0).T.unflatten(1, self._size)              # (L, h, w)
        self._sums[self._size] = self._sums.get(self._size, 0) + shares
        self._counts[self._size] += 1

    def watch(self, unet: nn.Module, hooks: ExitStack) -> None:
        """Note the cross-attention of a UNet that was loaded with ``ops``."""
        for name, module in unet.named_modules():
            if isinstance(module, SpatialTransformer):
                hooks.enter_context(module.register_forward_pre_hook(self._at_a_size))
            if name.endswith("attn2"):  # attn1 is self-attention
                hooks.enter_context(module.register_forward_pre_hook(self._at_the_prompt))

    def _at_a_size(self, module: nn.Module, given: tuple) -> None:
        height, width = given[0].shape[-2:]
        self._size = (height, width)

    def _at_the_prompt(self, module: nn.Module, given: tuple) -> None:
        # A latent can have 77 positions too: only the module tells the two attentions apart.
        self._reads_prompt = True

    def maps(self) -> dict[tuple[int, int], np.ndarray]:
        """For each size, the largest first, (77, h, w): the mean over heads, layers and calls. At
        each place the 77 add up to 1."""
        sizes = sorted(self._sums, reverse=True)
        return {size: _array(self._sums[size] / self._counts[size]) for size in sizes}


def over_all_sizes(maps: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """The mean of the maps of all sizes, each enlarged to the largest, (77, h, w)."""
    size = max(maps)
    larger = [F.interpolate(torch.from_numpy(each)[None], size, mode="bilinear")[0]
              for each in maps.values()]
    return torch.stack(larger).mean(dim=0).numpy()


def watched(sd: Any, words: WordMaps, prompt: str, plan: Plan, **call: Any) -> Run:
    """Draw the prompt with a model whose ops are those of ``words``.

    ``plan`` is what the call means, of a `Request` of its own: generators draw only once.
    """
    calls = plan.sampler.calls
    last: dict[str, Tensor] = {}
    chosen = sorted({round(k * (calls - 1) / (SHOWN - 1)) for k in range(SHOWN)})
    moments: list[Moment] = []
    noise = np.empty(0)

    def note(module: nn.Module, given: tuple, prediction: Tensor) -> None:
        last.update(x=given[0][-1:], contexts=given[2], prediction=prediction)

    began = time.perf_counter()
    with ExitStack() as hooks, torch.no_grad():
        words.watch(sd.unet, hooks)
        hooks.enter_context(sd.unet.register_forward_hook(note))
        for step in sd.stream(prompt, **call):
            if step.i == 0:
                noise = _array(last["x"][0])
            if step.i in chosen:
                answers = last["prediction"].split(1) if step.i in chosen[::2] else ()
                moments.append(_moment(
                    sd, step.i, plan.sampler.shown[step.i], last["x"], answers, step.x0))
    out = step.output()
    tokens, cut = _tokens(sd.tokenizer, prompt)
    return Run(
        plan=plan, settings=out.settings[0], tokens=tokens, cut=cut,
        contexts=_array(last["contexts"]), noise=noise, moments=moments, maps=words.maps(),
        latent=_array(step.latents[0]), image=out.images[0], seconds=time.perf_counter() - began,
        where=f"{sd.device.type} in {str(sd.dtype).removeprefix('torch.')}")


def _moment(sd: Any, i: int, level: Level, x: Tensor, answers: tuple[Tensor, ...],
            x0: Tensor) -> Moment:
    prediction_type = sd.config.schedule.prediction_type
    halves, change = [], np.empty(0)
    if len(answers) == 2:
        uncond, cond = (predicted_x0_eps(x.to(x0), half.to(x0), level.abar, prediction_type)[0]
                        for half in answers)                                 # (1, C, h, w)
        halves = [decoded(sd, uncond), decoded(sd, cond)]
        change = _array((cond - uncond)[0].norm(dim=0))
    return Moment(i, level, decoded(sd, x), decoded(sd, x0), halves, change)


def decoded(sd: Any, latent: Tensor) -> Image:
    """The image of a latent (1, C, h, w)."""
    pixels = (sd.vae.decode(latent) / 2 + 0.5).clamp(0, 1)                   # (1, 3, H, W)
    return images.to_pil(pixels)[0]


def _tokens(tokenizer: Any, prompt: str) -> tuple[list[Token], int]:
    """The prompt's tokens between the markers, and how many more there were."""
    found = tokenizer.bpe.encode(prompt, add_special_tokens=False)
    tokens = [Token(prompt[start:end], symbol, index, found.word_to_chars(word))
              for (start, end), symbol, index, word
              in zip(found.offsets, found.tokens, found.ids, found.word_ids)]
    fits = tokens[: tokenizer.length - 2]
    first, last = (Token(text, tokenizer.bpe.id_to_token(index), index, None) for text, index in (
        ("start", tokenizer.bos_token_id), ("end", tokenizer.eos_token_id)))
    return [first, *fits, last], len(tokens) - len(fits)


def _array(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
