"""Which sampler a call takes, on which levels: what is asked for, else the model's own."""

import numpy as np

from minisd import checks
from minisd.config import Config, ScheduleConfig
from minisd.samplers import SAMPLERS, Named, named
from minisd.samplers.sampler import Sampler, coefficients
from minisd.samplers.schedule import SPACINGS, Ladder


def choose(sampler: object, spacing: object, eta: object, own: ScheduleConfig) -> Named:
    """The sampler, spacing and eta that are asked for, else the model's own."""
    chosen = Named(own.sampler, own.timestep_spacing)
    if sampler is not None:
        asked = named(sampler) if isinstance(sampler, str) else None
        if asked is None:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, or like "
                             f"'DPM++ 2M Karras', not {checks.shown(sampler)}")
        # A model of few steps, or of zero terminal SNR, is made for its own timesteps.
        keeps = sampler in SAMPLERS and (
            sampler == own.sampler or own.timestep_spacing == "trailing")
        chosen = asked._replace(spacing=own.timestep_spacing) if keeps else asked
    if spacing is not None:
        if not isinstance(spacing, str) or spacing not in SPACINGS:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, "
                             f"not {checks.shown(spacing)}")
        chosen = chosen._replace(spacing=spacing)
    usual = SAMPLERS[chosen.sampler].eta if chosen.eta is None else chosen.eta
    if eta is not None:
        given = checks.real("eta", eta, 0.0, 1.0)
        usual = None if usual is None else given
    return chosen._replace(eta=usual)


def sampler_on(ladder: Ladder, chosen: Named, config: Config) -> Sampler:
    """The sampler on its ladder; ValueError where it cannot begin at noise alone."""
    sampler = SAMPLERS[chosen.sampler](ladder, chosen.eta)
    if ladder[0].abar > 0:
        return sampler
    try:
        with np.errstate(all="ignore"):
            finite = coefficients(
                sampler, config.schedule.prediction_type).isfinite().all().item()
    except ZeroDivisionError:
        finite = False
    if not finite:
        raise ValueError(
            f"sampler {chosen.sampler} cannot begin at noise alone, as this model of zero terminal "
            "SNR does with these timesteps: take ddim, euler, dpmpp_2m or unipc, or spacing karras")
    return sampler
