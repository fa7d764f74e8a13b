"""Upscaling: a UNet trained for it is shown a small image, and draws its latent, of the same size.

The small image is noised before, so that its faults need not be followed closely; the UNet is told
how much, as its class (Ho et al. 2021, https://arxiv.org/abs/2106.15282, "conditioning
augmentation").

B images, h w height and width of the small image and of the latent
"""

import torch

from minisd import images
from minisd.conditioning.start import Given, Start, text_to_image
from minisd.samplers import schedule


def start(given: Given) -> Start:
    """From noise, with the small image in RGB beside; its noise is drawn first, for each image (in
    diffusers the images of a prompt share it)."""
    plan, (_, _, h, w) = given.plan, given.plan.shape
    assert plan.image is not None and plan.noise_level is not None
    assert plan.config.low_res_schedule is not None
    small = images.to_tensor(plan.image, w, h).to(given.noise.like)          # (1, 3, h, w)
    abar = schedule.alphas_cumprod(plan.config.low_res_schedule)[plan.noise_level].item()
    extra = schedule.add_noise(small, given.noise.draw(3, h, w), abar)       # (B, 3, h, w)
    x = text_to_image(given).x                                               # (B, 4, h, w)
    levels = torch.full((len(x) * (1 + plan.guided),), plan.noise_level, device=x.device)
    return Start(x, extra, class_vector=levels)
