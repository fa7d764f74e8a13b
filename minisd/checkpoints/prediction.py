"""What the UNet of a single file predicts, and on which noise schedule: by whom it is said.

No name or shape of a tensor tells it, and with the wrong answer a model draws noise. So there is an
order of who is believed: the caller; a scheduler's config, in the caller's folder or beside the
file; the config beside the file; the file itself; a rule of thumb, which is reported as a guess.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minisd.checkpoints import ldm_yaml, names
from minisd.checkpoints.json_file import JsonFields, parse_json
from minisd.checkpoints.safetensors_file import StoredTensor, read_tensor
from minisd.checkpoints.scheduler_config import (
    SCHEDULER,
    read_schedule,
    schedule_fields,
    schedule_of,
)
from minisd.config import PREDICTION_TYPES, Config, ScheduleConfig
from minisd.errors import WeightError

# Metadata that tools write (https://github.com/Stability-AI/ModelSpec, ComfyUI, SwarmUI), and the
# words in it -> the prediction type, and whether that is with zero terminal SNR.
MODELSPEC = "modelspec.prediction_type"
PREDICT_KEY = "modelspec.predict_key"
WORDS = {
    **dict.fromkeys(("epsilon", "eps"), ("epsilon", False)),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "velocity"), ("v_prediction", False)),
    "v-zsnr": ("v_prediction", True),
}
# Of the architectures there only these two say it.
ARCHITECTURE = "modelspec.architecture"
ARCHITECTURES = {
    "stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v_prediction",
}
# minisd's own, where the schedule is not the official one.
SCHEDULE = "minisd.scheduler_config"

# The rule of thumb of AUTOMATIC1111's web UI: among descendants of the official models, those
# that predict v vary more in this bias.
TELLTALE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
TELLTALE_STD = 0.09


class Said(NamedTuple):
    """What a file says of itself in one place."""

    where: str                    # "the file's ..."
    prediction_type: str | None   # the word itself, if minisd does not know it
    zero_snr: bool = False


def find_schedule(
    path: Path, folder: Path | None, config: Config, tensors: Mapping[str, StoredTensor],
    metadata: Mapping[str, str], prediction_type: str | None,
) -> tuple[ScheduleConfig, str]:
    """The schedule of the model in ``path``, and in words how its prediction type is known.

    ``folder`` and ``prediction_type`` are the caller's; ``config`` has the schedule of ``folder``.
    """
    schedule, scheduler = _beside(path, folder, config)
    own, stored = _own(path, tensors, metadata)
    if scheduler is None and stored is not None:
        schedule = stored
    elif scheduler is None and any(said.zero_snr for said in own):
        # Both belong together: other timesteps than trailing ones leave the last of training out.
        schedule = replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    if prediction_type is not None:
        return replace(schedule, prediction_type=prediction_type), "given by the caller"
    if scheduler is not None:
        found, source = schedule.prediction_type, f"from {scheduler}"
    else:
        found, source = (
            _sidecar(path, folder, config) or _itself(path, own) or _guess(config, tensors))
    schedule = replace(schedule, prediction_type=found)
    _warn_of_contradiction(path, own, schedule, source)
    return schedule, source


def _beside(
    path: Path, folder: Path | None, config: Config
) -> tuple[ScheduleConfig, Path | None]:
    """The schedule without what the file itself says, and the scheduler's config that it is of."""
    if folder is not None and (folder / SCHEDULER).is_file():
        return config.schedule, folder / SCHEDULER
    if (path.parent / SCHEDULER).is_file():
        return read_schedule(path.parent, absent=config.schedule), path.parent / SCHEDULER
    return config.schedule, None


def _sidecar(path: Path, folder: Path | None, config: Config) -> tuple[str, str] | None:
    """What a yaml file of the same name says."""
    place = next((p for p in map(path.with_suffix, (".yaml", ".yml")) if p.is_file()), None)
    if place is None:
        return None
    params = ldm_yaml.read_params(place)
    if folder is None:
        ldm_yaml.check_official(place, params, config)
    return ldm_yaml.prediction_of(place, params), f"from {place}"


def _own(
    path: Path, tensors: Mapping[str, StoredTensor], metadata: Mapping[str, str]
) -> tuple[list[Said], ScheduleConfig | None]:
    """All that the file says of itself, the surest first, and the schedule if it holds one."""
    own, schedule = [], None
    if text := metadata.get(SCHEDULE):
        fields = parse_json(text.encode(), path)
        schedule = schedule_of(JsonFields(path, fields))
        own.append(Said(f"the file's {SCHEDULE}", schedule.prediction_type,
                        schedule.rescale_betas_zero_snr))
    # Before the metadata: of these some tools write a default.
    if marks := names.markers(tensors):
        where = f"the file's marker{'s' * (len(marks) > 1)} {' and '.join(marks)}"
        own.append(Said(where, "v_prediction" if "v_pred" in marks else None, "ztsnr" in marks))
    for key in (MODELSPEC, PREDICT_KEY):
        if word := " ".join(metadata.get(key, "").lower().split()):
            own.append(Said(f"the file's {key}", *WORDS.get(word, (word[:80],))))
    if kind := ARCHITECTURES.get(metadata.get(ARCHITECTURE, "")):
        own.append(Said(f"the file's {ARCHITECTURE}", kind))
    return own, schedule


def _itself(path: Path, own: list[Said]) -> tuple[str, str] | None:
    """The prediction type that is said in the surest place of the file."""
    said = next((said for said in own if said.prediction_type), None)
    if said is None or said.prediction_type is None:
        return None
    if said.prediction_type not in PREDICTION_TYPES:
        raise WeightError(f"{path}: {said.where} says {said.prediction_type!r}; minisd knows "
                          f"{' and '.join(PREDICTION_TYPES)}; if it is one of them, give "
                          "prediction_type= (--prediction-type)")
    return said.prediction_type, f"from {said.where}"


def _guess(config: Config, tensors: Mapping[str, StoredTensor]) -> tuple[str, str]:
    own, kind = config.schedule.prediction_type, (config.kind, config.unet.cross_attention_dim)
    if kind != ("text to image", 1024) or TELLTALE not in tensors:
        return own, "the default, as nothing says otherwise"
    bias = read_tensor(tensors[TELLTALE], torch.float32)
    std = bias.std(correction=0).item()
    guess = "v_prediction" if std > TELLTALE_STD else "epsilon"
    sign = ">" if std > TELLTALE_STD else "<="
    return guess, f"a guess: a bias with standard deviation {std:.3f} {sign} {TELLTALE_STD}"


def _warn_of_contradiction(
    path: Path, own: list[Said], schedule: ScheduleConfig, source: str
) -> None:
    """One sentence, if the file says of itself what somebody who outranks it denies."""
    for said in own:
        if said.prediction_type not in (None, schedule.prediction_type):
            says, taken = said.prediction_type, schedule.prediction_type
        elif said.zero_snr and not schedule.rescale_betas_zero_snr:
            says, taken = "zero terminal SNR", "none"
        else:
            continue
        warnings.warn(f"{path}: {said.where} says {says}, but {taken} is taken, {source}",
                      stacklevel=2)
        return


def written(schedule: ScheduleConfig) -> tuple[dict[str, str], tuple[str, ...]]:
    """The metadata and the names of the markers that a file says that schedule with."""
    v = schedule.prediction_type == "v_prediction"
    metadata = {MODELSPEC: "v" if v else schedule.prediction_type}
    if schedule != ScheduleConfig(prediction_type=schedule.prediction_type):
        metadata[SCHEDULE] = json.dumps(schedule_fields(schedule))
    return metadata, names.MARKERS if schedule.rescale_betas_zero_snr else ()
