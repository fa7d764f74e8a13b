"""A scheduler_config.json: the noise schedule of a model in diffusers' words, read and written.

An absent field has the default of DDIMScheduler or, beside a single file, what the model has. The
class and the spacing of its timesteps are how a call samples that does not say; the other settings
of a sampler are ignored.
"""

import warnings
from pathlib import Path

from minisd.checkpoints.json_file import JsonFields, JsonFile
from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.errors import WeightError

SCHEDULER = Path("scheduler", "scheduler_config.json")
# Of an upscaler: how the noise of the small image is added.
LOW_RES_SCHEDULER = Path("low_res_scheduler", "scheduler_config.json")
FIXED = {"trained_betas": (None,)}
# diffusers' class -> the name of the sampler here, and the spacing that an absent field means.
CLASSES = {
    "DDIMScheduler": ("ddim", "leading"),
    "PNDMScheduler": ("plms", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "EulerAncestralDiscreteScheduler": ("euler_a", "linspace"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", "linspace"),
    "UniPCMultistepScheduler": ("unipc", "linspace"),
    "HeunDiscreteScheduler": ("heun", "linspace"),
    "LMSDiscreteScheduler": ("lms", "linspace"),
    "KDPM2DiscreteScheduler": ("dpm2", "linspace"),
    "DDPMScheduler": ("ddpm", "leading"),
    "LCMScheduler": ("lcm", "lcm"),
    "TCDScheduler": ("tcd", "lcm"),
}
SPACINGS = ("leading", "trailing", "linspace")
DDIM = ScheduleConfig(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02)


def read_schedule(folder: Path, absent: ScheduleConfig = DDIM) -> ScheduleConfig:
    """The schedule of a folder in diffusers layout; WeightError for one that is not computed.

    ``absent`` has the values of absent fields.
    """
    return schedule_of(JsonFile(folder / SCHEDULER), absent)


def schedule_of(file: JsonFields, absent: ScheduleConfig = DDIM) -> ScheduleConfig:
    """The schedule that the fields describe."""
    file.fixed(FIXED)
    # Absent means "linear" to diffusers, which is another schedule.
    if file.fields.get("beta_schedule") != "scaled_linear":
        raise file.fault("beta_schedule", "'scaled_linear'")
    schedule = ScheduleConfig(
        num_train_timesteps=file.whole(
            "num_train_timesteps", absent.num_train_timesteps, 1, 10**6),
        beta_start=file.real("beta_start", absent.beta_start, 1e-8, 0.999),
        beta_end=file.real("beta_end", absent.beta_end, 1e-8, 0.999),
        prediction_type=file.choice("prediction_type", "epsilon", PREDICTION_TYPES),
        rescale_betas_zero_snr=bool(
            file.choice("rescale_betas_zero_snr", False, (False, True, None))),
        **_sampling(file),
    )
    if schedule.beta_start > schedule.beta_end:
        raise file.fault("beta_start", "a beta_start of at most beta_end")
    return schedule


def check_zero_snr(path: Path, schedule: ScheduleConfig, source: str) -> None:
    """WeightError for zero terminal SNR with a model that predicts eps: the last timestep is noise
    alone, of which eps says nothing about x_0. ``source`` is how the prediction type is known.
    """
    if schedule.rescale_betas_zero_snr and schedule.prediction_type != "v_prediction":
        raise WeightError(
            f"{path} has a schedule of zero terminal SNR, which only models that predict v can "
            f"have, and it predicts {schedule.prediction_type} ({source}); if it predicts v, give "
            "prediction_type= (--prediction-type)"
        )


def schedule_fields(schedule: ScheduleConfig) -> dict:
    """What ``schedule_of`` and diffusers read as that schedule."""
    sampler, spacing = schedule.sampler, schedule.timestep_spacing
    own = "dpmpp_2m" if sampler == "dpmpp_2m_sde" else sampler
    name = next((name for name, row in CLASSES.items() if row[0] == own), "DDIMScheduler")
    sigmas = {f"use_{spacing}_sigmas": True} if spacing in ("karras", "exponential") else {}
    return {
        "_class_name": name,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": schedule.prediction_type,
        "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
        "timestep_spacing": next(each for each in (spacing, CLASSES[name][1], "leading")
                                 if each in SPACINGS),
        **sigmas,
        "clip_sample": False,
        # The noise that is left at the end: that of timestep 0, or none after trailing timesteps.
        "set_alpha_to_one": spacing != "leading",
        "steps_offset": 1,
        **({"skip_prk_steps": True} if sampler == "plms" else {}),
        **({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}),
    }


def _sampling(file: JsonFields) -> dict[str, str]:
    """The sampler, and the spacing of its timesteps."""
    name = file.fields.get("_class_name", "DDIMScheduler")
    if name not in list(CLASSES):
        warnings.warn(f"{file.path}: _class_name is {str(name)[:80]!r}, a sampler that minisd does "
                      "not have; it takes ddim", stacklevel=2)
        name = "DDIMScheduler"
    sampler, usual = CLASSES[name]
    if sampler == "dpmpp_2m" and file.fields.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    spacing = file.fields.get("timestep_spacing", usual)
    if not isinstance(spacing, str):
        raise file.fault("timestep_spacing", " or ".join(map(repr, SPACINGS)))
    if usual == "lcm":  # the field means nothing there
        spacing = usual
    elif file.choice("use_karras_sigmas", False, (False, True, None)):
        spacing = "karras"
    elif file.choice("use_exponential_sigmas", False, (False, True, None)):
        spacing = "exponential"
    elif spacing not in SPACINGS:
        warnings.warn(f"{file.path}: timestep_spacing is {spacing[:80]!r}, which minisd does not "
                      f"have; it takes {usual!r}", stacklevel=2)
        spacing = usual
    return {"sampler": sampler, "timestep_spacing": spacing}
