"""Stable unCLIP: the UNet is also told what an image is like, as CLIP's embedding of it.

The embedding is noised before, so that the image need not be followed closely, and the UNet is told
how much (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, section 2.1, where a prior makes the
embedding; Ho et al. 2021, https://arxiv.org/abs/2106.15282, for the noise: "conditioning
augmentation").

B images, D width of the embedding
"""

import math

import torch
from torch import Tensor

from minisd.conditioning.start import Given, Start, text_to_image
from minisd.models.clip_vision import ImageNormalizer
from minisd.models.unet import timestep_embedding
from minisd.samplers import schedule

LEVELS = 1000
OFFSET = 0.008
MAX_BETA = 0.999


def alphas_cumprod() -> Tensor:
    """abar of the levels of noise of an embedding: (1000,), float64; "squaredcos_cap_v2".

    A(t) = cos((t + s) / (1 + s) pi/2)^2, beta_i = min(1 - A((i + 1) / 1000) / A(i / 1000), 0.999):
    Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17.
    """
    t = torch.arange(LEVELS + 1, dtype=torch.float64, device="cpu") / LEVELS
    a = ((t + OFFSET) / (1 + OFFSET) * math.pi / 2).cos().square()
    betas = (1 - a[1:] / a[:-1]).clamp(max=MAX_BETA)
    return torch.cumprod(1 - betas, dim=0)


def augmented(embedding: Tensor, mean: Tensor, std: Tensor, level: int, noise: Tensor) -> Tensor:
    """An embedding (B, D), noised to a level from 0 to 999, and the level -> class vector (B, 2D).

    ``mean`` and ``std`` (1, D) of CLIP's embeddings bring them to the scale of ``noise`` (B, D).
    """
    normalised = (embedding - mean) / std
    noised = schedule.add_noise(normalised, noise, alphas_cumprod()[level].item())
    levels = torch.full((len(embedding),), level, device=embedding.device)   # (B,)
    level_embedding = timestep_embedding(levels, embedding.shape[1])         # (B, D)
    return torch.cat([noised * std + mean, level_embedding.to(embedding)], dim=1)  # (B, 2D)


def start(given: Given) -> Start:
    """From noise; before, each image draws noise for the embedding (in diffusers the images of a
    prompt share it)."""
    plan, like = given.plan, given.noise.like
    assert plan.noise_level is not None
    embeds = given.embed(plan.image) if plan.image is not None else plan.image_embeds
    assert embeds is not None
    noise = given.noise.draw(embeds.shape[1])                                # (B, D)
    embeds = embeds.to(like).expand_as(noise)                                # (B, D)
    # A single file can lack it: then there is level 0 alone.
    normalizer = given.image_normalizer or ImageNormalizer(embeds.shape[1])
    vector = augmented(embeds, normalizer.mean.to(like), normalizer.std.to(like),
                       plan.noise_level, noise)                              # (B, 2D)
    if plan.guided:  # in training the whole vector was zero at times, not the embedding alone
        vector = torch.cat([torch.zeros_like(vector), vector])               # (2B, 2D)
    return text_to_image(given)._replace(class_vector=vector)
