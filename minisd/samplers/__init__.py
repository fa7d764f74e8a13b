"""Noise levels and steps: numbers and tensors; no network, no text.

schedule.py has the levels, sampler.py what a sampler is, and each other file one or two samplers.
A sampler is a function and a row of SAMPLERS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minisd.samplers import (
    ddim,
    dpm2,
    dpm_solver,
    heun,
    lcm,
    lms,
    schedule,
    tcd,
    unipc,
)
from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder


@dataclass(frozen=True)
class Row:
    """A sampler by name: its function, and what it uses unless it is asked for something else."""

    function: Callable[..., Sampler]
    spacing: str
    eta: float | None = None  # None: it takes no eta
    # Whether the leading timesteps end at timestep 0, with a little noise, as the official models
    # are sampled (set_alpha_to_one=False in diffusers). All other ladders end without noise.
    ends_at_0: bool = False

    def ladder(self, spacing: str, steps: int, alphas_cumprod: Sequence[float]) -> Ladder:
        end = alphas_cumprod[0] if self.ends_at_0 and spacing == "leading" else 1.0
        return schedule.ladder(spacing, steps, alphas_cumprod, end)

    def __call__(self, ladder: Ladder, eta: float | None = None) -> Sampler:
        """The sampler on that ladder, or on the last levels of one, which is image to image."""
        if self.eta is None:
            return self.function(ladder)
        return self.function(ladder, self.eta if eta is None else eta)


SAMPLERS = {
    "ddim": Row(ddim.ddim, "leading", eta=0.0, ends_at_0=True),
    "euler": Row(ddim.ddim, "linspace", eta=0.0),
    "euler_a": Row(ddim.ddim, "linspace", eta=1.0),
    "ddpm": Row(ddim.ddim, "leading", eta=1.0),
    "dpmpp_2m": Row(dpm_solver.dpmpp_2m, "karras", eta=0.0),
    "dpmpp_2m_sde": Row(dpm_solver.dpmpp_2m, "karras", eta=1.0),
    "dpmpp_2s": Row(dpm_solver.dpmpp_2s, "karras", eta=0.0),
    "unipc": Row(unipc.unipc, "linspace"),
    "heun": Row(heun.heun, "linspace"),
    "lms": Row(lms.lms, "linspace"),
    "plms": Row(lms.plms, "leading", ends_at_0=True),
    "dpm2": Row(dpm2.dpm2, "linspace", eta=0.0),
    "lcm": Row(lcm.lcm, "lcm"),
    "tcd": Row(tcd.tcd, "lcm", eta=0.3),
}


class Named(NamedTuple):
    """What a name of AUTOMATIC1111's web UI means here."""

    sampler: str
    spacing: str
    eta: float | None = None  # where it is not the sampler's own


# Its names, to which it appends " Karras" or " Exponential" for these spacings.
WEB_UI = {
    "DDIM": Named("ddim", "leading"),
    "PLMS": Named("plms", "leading"),
    "Euler": Named("euler", "linspace"),
    "Euler a": Named("euler_a", "linspace"),
    "LMS": Named("lms", "linspace"),
    "Heun": Named("heun", "linspace"),
    "DPM2": Named("dpm2", "linspace"),
    "DPM2 a": Named("dpm2", "linspace", 1.0),
    "DPM++ 2S a": Named("dpmpp_2s", "linspace", 1.0),
    "DPM++ 2M": Named("dpmpp_2m", "linspace"),
    "DPM++ 2M SDE": Named("dpmpp_2m_sde", "linspace"),
    "UniPC": Named("unipc", "linspace"),
    "LCM": Named("lcm", "lcm"),
    "TCD": Named("tcd", "lcm"),
}
WEB_UI |= {f"{name} {spacing.capitalize()}": named._replace(spacing=spacing)
           for name, named in WEB_UI.items() for spacing in ("karras", "exponential")
           if named.spacing == "linspace"}


def named(name: str) -> Named | None:
    """A sampler by its name here, or by the web UI's in any capitals; None if there is none."""
    if name in SAMPLERS:
        return Named(name, SAMPLERS[name].spacing)
    return next((row for known, row in WEB_UI.items() if known.lower() == name.lower()), None)


def web_ui_name(sampler: str, spacing: str, eta: float | None) -> str | None:
    """The web UI's name; None where it has none."""
    asked = (sampler, spacing, eta)
    return next((name for name, row in WEB_UI.items()
                 if row._replace(eta=_eta(row)) == asked), None)


def _eta(row: Named) -> float | None:
    return SAMPLERS[row.sampler].eta if row.eta is None else row.eta
