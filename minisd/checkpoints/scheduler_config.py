"""A scheduler_config.json: the noise schedule of a model in diffusers' words, read and written.

An absent field has the default of DDIMScheduler or, beside a single file, what the model has. How
to sample is the caller's choice, so the sampler's settings in the file are ignored, all but one:
which timesteps it visits. Models of few steps and those of zero terminal SNR are made for
"trailing" ones.
"""

import warnings
from pathlib import Path

from minisd.checkpoints.json_file import JsonFields, JsonFile
from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.errors import WeightError

SCHEDULER = Path("scheduler", "scheduler_config.json")
FIXED = {"trained_betas": (None,)}
SPACINGS = ("leading", "trailing")
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
        timestep_spacing=_spacing(file),
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
    """What ``schedule_of`` and DDIMScheduler read as that schedule."""
    return {
        "_class_name": "DDIMScheduler",
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": schedule.num_train_timesteps,
        "prediction_type": schedule.prediction_type,
        "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
        "timestep_spacing": schedule.timestep_spacing,
        "clip_sample": False,
        # The noise that is left at the end: that of timestep 0, or none after trailing timesteps.
        "set_alpha_to_one": schedule.timestep_spacing != "leading",
        "steps_offset": 1,
    }


def _spacing(file: JsonFields) -> str:
    spacing = file.fields.get("timestep_spacing", "leading")
    if spacing in SPACINGS:
        return spacing
    if not isinstance(spacing, str):
        raise file.fault("timestep_spacing", " or ".join(map(repr, SPACINGS)))
    # It is the sampler's own in the files of many models that are made for either.
    warnings.warn(f"{file.path}: timestep_spacing is {spacing[:80]!r}; minisd visits the timesteps "
                  "of 'leading' instead", stacklevel=2)
    return "leading"
