"""diffusers' schedulers in float64, and a whole run of one of them or of one of our samplers.

Neither needs a pipeline: the model is a function of x and t.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bench.samplers import model as toy
from minisd.config import ScheduleConfig
from minisd.samplers import schedule
from minisd.samplers.sampler import Sampler, coefficients
from minisd.samplers.schedule import Ladder, Level

ABARS = schedule.alphas_cumprod(ScheduleConfig()).tolist()

# Class: its module, and what it is not by default but for the official models.
CLASSES = {
    "DDIMScheduler": ("ddim", dict(clip_sample=False, set_alpha_to_one=False)),
    "DDPMScheduler": ("ddpm", dict(clip_sample=False, variance_type="fixed_small")),
    "EulerDiscreteScheduler": ("euler_discrete", {}),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral_discrete", {}),
    "DPMSolverMultistepScheduler": ("dpmsolver_multistep", {}),
    "UniPCMultistepScheduler": ("unipc_multistep", dict(final_sigmas_type="zero")),
    "HeunDiscreteScheduler": ("heun_discrete", {}),
    "LMSDiscreteScheduler": ("lms_discrete", {}),
    "KDPM2DiscreteScheduler": ("k_dpm_2_discrete", {}),
    "KDPM2AncestralDiscreteScheduler": ("k_dpm_2_ancestral_discrete", {}),
    "PNDMScheduler": ("pndm", dict(skip_prk_steps=True, set_alpha_to_one=False)),
    "LCMScheduler": ("lcm", {}),
    "TCDScheduler": ("tcd", {}),
}

STEPS = (1, 2, 3, 5, 20)

SPACINGS = {spacing: dict(timestep_spacing=spacing) for spacing in ("leading", "trailing")}
SPACINGS |= {
    "linspace": dict(timestep_spacing="linspace"),
    "karras": dict(timestep_spacing="linspace", use_karras_sigmas=True),
    "exponential": dict(timestep_spacing="linspace", use_exponential_sigmas=True),
    "lcm": {},
}


@cache
def lifted(name: str) -> ModuleType:
    """diffusers' own source with float64 wherever it says float32, apart from the real module."""
    spec = importlib.util.find_spec(f"diffusers.schedulers.scheduling_{name}")
    module = ModuleType(spec.name)
    module.__package__ = "diffusers.schedulers"
    source = Path(spec.origin).read_text(encoding="utf-8").replace("float32", "float64")
    exec(compile(source, spec.origin, "exec"), module.__dict__)
    module.integrate = SimpleNamespace(quad=quad)  # of LMS, which has it from SciPy
    return module


def quad(function: Callable, start: Tensor, end: Tensor, epsrel: float) -> tuple[float]:
    """Gauss's rule with 4 points, which is exact for polynomials up to degree 7."""
    points, weights = np.polynomial.legendre.leggauss(4)
    half, middle = (end - start) / 2, (start + end) / 2
    return (sum(w * float(half * function(middle + half * p)) for p, w in zip(points, weights)),)


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """The dtype of an integer tensor times a float, too."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def official(name: str, steps: int, **config):
    """That scheduler of diffusers with the official schedule, its steps set, all in float64."""
    module, own = CLASSES[name]
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                  steps_offset=1) | own | config
    with default(torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's, for its use of tensors
        scheduler = getattr(lifted(module), name).from_config(config)
        scheduler.set_timesteps(steps)
    return scheduler


def ladder_of(scheduler) -> Ladder:
    """Ours with the scheduler's own levels, however it chose them."""
    abars, t = scheduler.alphas_cumprod.tolist(), scheduler.timesteps.tolist()
    if not hasattr(scheduler, "sigmas"):
        t = list(dict.fromkeys(t))  # PNDM has its second one twice
        with_end = {"DDIMScheduler", "PNDMScheduler"}
        end = scheduler.final_alpha_cumprod if type(scheduler).__name__ in with_end else 1.0
        return Ladder([*(Level(i, abars[i]) for i in t), Level(None, float(end))], abars)
    sigmas = scheduler.sigmas.tolist()
    if type(scheduler).__name__ == "HeunDiscreteScheduler":  # each but the two ends twice
        t, sigmas = t[:1] + t[1::2], sigmas[:1] + sigmas[1::2]
    if type(scheduler).__name__.startswith("KDPM2"):         # and every second t that of a midpoint
        t, sigmas = t[::2], sigmas[:1] + sigmas[1::2]
    levels = [Level(t, 1 / (1 + sigma**2)) for t, sigma in zip([*t, None], sigmas)]
    return Ladder(levels, abars)


Model = Callable[[Tensor, float], Tensor]


def draws(like: Tensor) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def official_run(scheduler, x: Tensor, model: Model = toy, start: int = 0, **options):
    """x as the UNet sees it at every call, and the result. ``start``: the index of the first call,
    as image to image begins there."""
    noises = draws(x)
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "sigmas"):
        scheduler.set_begin_index(start)
        # These keep y = x / alpha, whose model input is x; the others keep x.
        if not type(scheduler).__name__.startswith(("DPMSolver", "UniPC")):
            x = x * (1 + scheduler.sigmas[start] ** 2) ** 0.5
    seen = []
    with default(x.dtype):
        type(scheduler).step.__globals__["randn_tensor"] = lambda shape, **_: next(noises)
        for t in timesteps:
            seen.append(scheduler.scale_model_input(x, t))
            x = scheduler.step(model(seen[-1], t.item()), t, x, **options).prev_sample
    return [*seen, x]


def run(sampler: Sampler, x: Tensor, kind: str, model: Model = toy) -> list[Tensor]:
    """The same of ours. Noise is drawn for the calls that have a weight for it."""
    noises = draws(x)
    noisy = (coefficients(sampler, kind)[:, 0, -1] != 0).tolist()
    past, seen = tuple(torch.zeros_like(x) for _ in range(sampler.memory)), [x]
    for i, level in enumerate(sampler.shown[:-1]):
        x0, eps = schedule.predicted_x0_eps(x, model(x, level.t), level.abar, kind)
        x, past = sampler.step(i, x, x0, eps, past, next(noises) if noisy[i] else 0.0)
        seen.append(x)
    return seen


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference over all x, relative to the largest value; infinity if not finite."""
    assert len(ours) == len(theirs)
    a, b = torch.stack(ours), torch.stack(theirs)
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).abs().max() / b.abs().max()).item()
