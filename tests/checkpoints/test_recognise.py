"""Single files are recognised by their shapes; the prediction type has several sources."""

import json
import os

import pytest
import torch
from files import all_shapes, header, official_modules, write

from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.recognise import COND_PROJ
from minisd.config import SD1, SD1_INPAINT, SD2, SD2_DEPTH, SD2_INPAINT, SD2_V, X4_UPSCALER
from minisd.errors import WeightError

TELLTALE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"


@pytest.fixture
def official(tmp_path):
    """A file with the tensors of an official checkpoint, all zero except the telltale bias."""

    def make(config, bias=0.0):
        head = header(all_shapes(config))
        path = write(tmp_path / "model.safetensors", head)
        if TELLTALE not in head:
            return path
        start, _ = head[TELLTALE]["data_offsets"]
        values = torch.full([160, 2], bias).half() * torch.tensor([1, -1])  # its std is the bias
        with open(path, "r+b") as file:
            file.seek(start - max(row["data_offsets"][1] for row in head.values()), os.SEEK_END)
            file.write(values.numpy().tobytes())
        return path

    return make


@pytest.mark.parametrize("config", [SD1, SD1_INPAINT, SD2, SD2_INPAINT, SD2_DEPTH, X4_UPSCALER],
                         ids=lambda c: c.name)
def test_official_models_are_recognised_and_complete(config, official):
    found = open_checkpoint(official(config))
    assert found.config == config
    with torch.device("meta"):
        parts = official_modules(config)
    for part, module in parts.items():
        check(found, part, module)


@pytest.mark.parametrize("shape", [(320, 7), (320, 2), (320,)])
def test_an_embedding_of_the_guidance_scale_that_cannot_be(shape, tmp_path):
    path = write(tmp_path / "a.safetensors", header({**all_shapes(SD1), COND_PROJ: shape}))
    with pytest.raises(WeightError, match="cond_proj.weight .* even number"):
        open_checkpoint(path)


@pytest.mark.parametrize(("bias", "config"), [(0.08, SD2), (0.1, SD2_V)])
def test_v_is_guessed_from_a_bias_and_reported_as_a_guess(bias, config, official):
    found = open_checkpoint(official(SD2, bias))
    assert found.config == config and found.prediction_source.startswith("a guess")


def test_v_is_not_guessed_for_versions_without_a_v_model(official):
    for config in (SD1, SD2_INPAINT):
        assert open_checkpoint(official(config, 0.5)).config == config


@pytest.mark.parametrize(
    ("text", "predicts"),
    [
        ('model:\n  params:\n    parameterization: "v"\n', "v_prediction"),
        ("model:\n  params:\n    parameterization: v  # velocity\n", "v_prediction"),
        ("model:\n  params:\n    parameterization: 'eps'\n", "epsilon"),
        ("model:\n  target: x\n  params: {}\n  # parameterization: v\n", "epsilon"),
    ],
)
def test_yaml_beside_the_file_has_priority_over_the_guess(text, predicts, official):
    path = official(SD2, 0.5)
    path.with_suffix(".yaml").write_text(text)
    found = open_checkpoint(path)
    assert found.config.schedule.prediction_type == predicts
    assert found.prediction_source == f"from {path.with_suffix('.yaml')}"


def test_priority_is_the_caller_then_the_scheduler_then_the_yaml(official):
    path = official(SD2)
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: eps}}")
    scheduler = path.parent / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    fields = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    scheduler.write_text(json.dumps(fields))
    found = open_checkpoint(path)
    assert found.config == SD2_V and found.prediction_source == f"from {scheduler}"
    found = open_checkpoint(path, prediction_type="epsilon")
    assert found.config == SD2 and found.prediction_source == "given by the caller"


def test_prediction_type_is_checked_first():
    with pytest.raises(ValueError, match="prediction_type is 'v'"):
        open_checkpoint("nowhere", prediction_type="v")
