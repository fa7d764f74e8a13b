"""DDIM, and by other ladders and another eta: Euler, Euler ancestral and DDPM.

From x and the UNet's prediction, estimate x_0 and eps, and mix them again with less noise.

Source: Song et al. 2020, "Denoising Diffusion Implicit Models", https://arxiv.org/abs/2010.02502.
What is called alpha there is abar here.
"""

from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


def ddim(ladder: Ladder, eta: float = 0.0) -> Sampler:
    """``eta`` 0 is deterministic; 1 adds as much noise as DDPM does.

    Euler's method for the probability-flow ODE (Karras et al. 2022, algorithm 1, in x / alpha) is
    this very function with eta 0; Euler ancestral, and DDPM with the smaller of its two variances,
    with eta 1. They differ in their ladders, and in that they end without noise.
    """
    def step(i, x, x0, eps, past=(), noise=0.0):
        abar, after = ladder[i].abar, ladder[i + 1].abar
        # sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar')               (eq. 16)
        sigma = eta * ((1.0 - after) / (1.0 - abar)) ** 0.5 * (1.0 - abar / after) ** 0.5
        # x' = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma noise              (eq. 12)
        # x_0 is not clipped, as it is for models of pixels: the values of a latent have no bounds.
        direction = max(1.0 - after - sigma**2, 0.0) ** 0.5  # 0 may come out as -1e-17
        return after**0.5 * x0 + direction * eps + sigma * noise, past

    return Sampler(ladder.levels, step)
