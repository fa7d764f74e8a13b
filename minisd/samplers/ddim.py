"""The DDIM sampler: one step, as a pure function.

From x_t and the UNet's prediction, estimate x_0 and eps, and mix them again with less noise.

Source: Song et al. 2020, "Denoising Diffusion Implicit Models", https://arxiv.org/abs/2010.02502.
What is called alpha there is abar here.
"""

from minisd.samplers.schedule import X, predicted_x0_eps


def step(
    x: X, prediction: X, abar: float, abar_next: float, prediction_type: str,
    eta: float = 0.0, noise: X | None = None,
) -> X:
    """One DDIM step, from x_t at ``abar`` to the next x at ``abar_next`` (Song et al., eq. 12).

    ``eta`` 0 is deterministic; 1 adds as much ``noise`` as DDPM does (eq. 16).
    """
    # x_0 is not clipped, as it is for models of pixels: the values of a latent have no bounds. At
    # the last step abar_next is abar_0, not 1 (set_alpha_to_one=False in diffusers): the official
    # models are sampled so, and with 1 every image would differ a little (schedule.abars).
    x0, eps = predicted_x0_eps(x, prediction, abar, prediction_type)
    # sigma = eta sqrt((1 - abar_next) / (1 - abar)) sqrt(1 - abar / abar_next)
    sigma = eta * ((1.0 - abar_next) / (1.0 - abar)) ** 0.5 * (1.0 - abar / abar_next) ** 0.5
    # x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next - sigma^2) eps + sigma noise
    x = abar_next**0.5 * x0 + (1.0 - abar_next - sigma**2) ** 0.5 * eps
    return x if noise is None else x + sigma * noise
