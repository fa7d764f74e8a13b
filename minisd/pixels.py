"""Between pixels and latents: the VAE, in a dtype that holds what it computes.

B images, H W height and width in pixels, h w of the latent
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from minisd import errors
from minisd.models.vae import VAE


def encode(vae: VAE, image: Tensor, noise: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w), drawn with ``noise`` from the VAE's posterior of an image
    (1, 3, H, W)."""
    return _in_float32_if_need_be(lambda vae, *given: vae.encode(*given), vae, image, noise)


def decode(vae: VAE, latents: Tensor, decoder: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Latents (B, 4, h, w) -> images (B, 3, H, W), about [-1, 1].

    ``decoder``: a repacked one, which takes the place of the VAE's.
    """
    def run(own: VAE, latent: Tensor) -> Tensor:
        return own.decode(latent, decoder) if decoder and own is vae else own.decode(latent)

    # One at a time: it takes less memory, and an image is the same alone or in a batch.
    return torch.cat([_in_float32_if_need_be(run, vae, one) for one in latents.split(1)])


def _in_float32_if_need_be(run: Callable[..., Tensor], vae: VAE, *inputs: Tensor) -> Tensor:
    """``run`` with the VAE, and once more in float32 if the VAE's dtype overflows."""
    out = run(vae, *inputs)
    try:
        return errors.finite(out, "the VAE")
    except ArithmeticError:
        if vae.quant_conv.weight.dtype == inputs[0].dtype:
            raise
    # Some published VAEs exceed float16 on some images.
    again = copy.deepcopy(vae).to(inputs[0].dtype)
    return errors.finite(run(again, *inputs), "the VAE", ", in float32 too")
