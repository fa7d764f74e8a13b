"""What a file says of its own prediction: believed in the known order, told as the source, saved.

Markers are ComfyUI's, metadata ModelSpec's, ComfyUI's and SwarmUI's.
"""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from files import all_shapes, header, write
from reference_models import SMALL, SMALL_V, small_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.app.cli import main
from minisd.checkpoints import names, prediction
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.scheduler_config import schedule_fields
from minisd.config import SD1, SD1_INPAINT, SD2, SD2_V, ScheduleConfig
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH

EPS, V = ScheduleConfig(), ScheduleConfig(prediction_type="v_prediction")
ZERO = replace(V, rescale_betas_zero_snr=True, timestep_spacing="trailing")
UNET = "model.diffusion_model."
PREDICTION, KEY = "modelspec.prediction_type", "modelspec.predict_key"
ARCHITECTURE = "modelspec.architecture"


@pytest.fixture
def sd(tmp_path):
    """A file of an official model, with more tensors and with metadata: header over zeros."""

    def make(config=SD1, markers=(), **metadata):
        shapes = all_shapes(config) | {m: (0,) for m in markers}
        if not isinstance(markers, (list, tuple)):
            shapes = all_shapes(config) | markers
        size = max(row["data_offsets"][1] for row in header(shapes).values())
        rows = {"__metadata__": {k.replace("__", "."): v for k, v in metadata.items()}}
        return write(tmp_path / "m.safetensors", json.dumps(rows | header(shapes)).encode(), size)

    return make


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def scheduler(folder, **fields):
    path = folder / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"beta_schedule": "scaled_linear", **fields}))
    return path


# Markers, metadata, the schedule that is meant, words of the source.
SAID = [
    ((), {}, EPS, "the default"),
    ((), {PREDICTION: "v"}, V, f"from the file's {PREDICTION}"),
    ((), {PREDICTION: "epsilon"}, EPS, f"from the file's {PREDICTION}"),
    ((), {PREDICTION: " V_Prediction "}, V, f"from the file's {PREDICTION}"),
    ((), {PREDICTION: "v-zsnr"}, ZERO, f"from the file's {PREDICTION}"),
    ((), {PREDICTION: ""}, EPS, "the default"),
    ((), {KEY: "v"}, V, f"from the file's {KEY}"),
    ((), {KEY: "epsilon"}, EPS, f"from the file's {KEY}"),
    ((), {PREDICTION: "v", KEY: "v"}, V, f"from the file's {PREDICTION}"),
    ((), {ARCHITECTURE: "stable-diffusion-v2-768-v"}, V, f"from the file's {ARCHITECTURE}"),
    ((), {ARCHITECTURE: "stable-diffusion-v2-512"}, EPS, f"from the file's {ARCHITECTURE}"),
    ((), {ARCHITECTURE: "stable-diffusion-v1"}, EPS, "the default"),
    ((), {ARCHITECTURE: "stable-diffusion-v1", KEY: "v"}, V, f"from the file's {KEY}"),
    (("v_pred",), {}, V, "from the file's marker v_pred"),
    (("v_pred", "ztsnr"), {}, ZERO, "from the file's markers v_pred and ztsnr"),
    (("ztsnr", "v_pred"), {KEY: "v"}, ZERO, "from the file's markers v_pred and ztsnr"),
    (("ztsnr",), {PREDICTION: "v"}, ZERO, f"from the file's {PREDICTION}"),
    ((UNET + "v_pred",), {}, V, "from the file's marker v_pred"),
    ((UNET + "v_pred", UNET + "ztsnr"), {}, ZERO, "from the file's markers v_pred and ztsnr"),
    ((UNET + "v_pred", "ztsnr"), {}, ZERO, "from the file's markers v_pred and ztsnr"),
    (("v_pred", UNET + "v_pred"), {}, V, "from the file's marker v_pred"),
    ({"v_pred": (), "ztsnr": ()}, {}, ZERO, "from the file's markers v_pred and ztsnr"),
    ({"v_pred": (1,), "ztsnr": (2, 3)}, {}, ZERO, "from the file's markers v_pred and ztsnr"),
    (("module.v_pred",), {}, V, "from the file's marker v_pred"),
    ((), {"ss_v2": "True", "ss_base_model_version": "sd_v2_v"}, EPS, "the default"),
]


@pytest.mark.parametrize("markers, metadata, schedule, source", SAID)
def test_the_file_is_believed(markers, metadata, schedule, source, sd):
    found = open_checkpoint(sd(markers=markers, **metadata))
    assert found.config.schedule == schedule and found.prediction_source.startswith(source)
    for part, module in build(found.config, TORCH).items():
        check(found, part, module)  # no marker is an unexpected tensor


@pytest.mark.parametrize("config", [SD1, SD1_INPAINT, SD2])
def test_for_every_model(config, sd):
    found = open_checkpoint(sd(config, ["v_pred", "ztsnr"]))
    assert found.config.schedule == ZERO
    want = SD2_V if config == SD2 else config
    assert found.config == replace(want, schedule=ZERO)
    assert open_checkpoint(sd(config, ["v_pred"])).config == replace(want, schedule=V)


def test_info_tells_it(sd, capsys):
    assert main(["info", str(sd(SD2, ["v_pred", "ztsnr"]))]) == 0
    told = "v_prediction, zero terminal SNR (from the file's markers v_pred and ztsnr)"
    assert f"prediction  {told}\n" in capsys.readouterr().out
    assert main(["info", str(sd(SD1, [], **{KEY: "v"}))]) == 0
    assert f"prediction  v_prediction (from the file's {KEY})\n" in capsys.readouterr().out


@pytest.mark.parametrize("word", [
    "sample", "x0", "flow", "edm", "velocity_flow", "v" * 999, "v or\n eps"])
@pytest.mark.parametrize("key", [PREDICTION, KEY])
def test_a_word_that_is_not_known_is_no_eps(key, word, sd):
    path = sd(**{key: word})
    with pytest.raises(WeightError, match=f"the file's {key} says '{word[:4]}.*prediction_type="):
        open_checkpoint(path)
    assert open_checkpoint(path, prediction_type="epsilon").config == SD1


# Who is believed before the file, and the warning that names both where they disagree.


def test_the_caller_is_believed_in_silence(sd):
    path = sd(markers=["v_pred"])
    found = open_checkpoint(path, prediction_type="epsilon")
    assert found.config == SD1 and found.prediction_source == "given by the caller"
    assert open_checkpoint(path, config=SD1).config == SD1
    path = sd(markers=["ztsnr"])
    assert open_checkpoint(path, prediction_type="v_prediction").config.schedule == ZERO


@pytest.mark.parametrize("markers, metadata, where", [
    (["v_pred"], {}, "the file's marker v_pred"),
    ([], {PREDICTION: "v"}, f"the file's {PREDICTION}"),
    ([], {KEY: "v"}, f"the file's {KEY}"),
    ([], {KEY: "flow"}, f"the file's {KEY}"),
    ([], {ARCHITECTURE: "stable-diffusion-v2-768-v"}, f"the file's {ARCHITECTURE}"),
    ([], {PREDICTION: "epsilon", KEY: "v"}, f"the file's {KEY}"),
])
def test_the_config_beside_the_file_outranks_it(markers, metadata, where, sd):
    path = sd(markers=markers, **metadata)
    beside = path.with_suffix(".yaml")
    beside.write_text("model: {params: {parameterization: eps}}")
    says = "flow" if "flow" in metadata.values() else "v_prediction"
    with pytest.warns(UserWarning) as told:
        found = open_checkpoint(path)
    assert [str(one.message) for one in told] == [
        f"{path}: {where} says {says}, but epsilon is taken, from {beside}"]
    assert found.config == SD1 and found.prediction_source == f"from {beside}"


def test_a_scheduler_beside_the_file_outranks_it(sd):
    path = sd(markers=["v_pred", "ztsnr"])
    beside = scheduler(path.parent, prediction_type="epsilon")
    with pytest.warns(UserWarning, match="markers v_pred and ztsnr says? v_pred.*but epsilon is ta"
                      ) as told:
        found = open_checkpoint(path)
    assert found.config == SD1 and found.prediction_source == f"from {beside}" and len(told) == 1
    scheduler(path.parent, prediction_type="v_prediction", rescale_betas_zero_snr=False)
    with pytest.warns(UserWarning, match="zero terminal SNR, but none is taken, from .*scheduler_co"
                      ) as told:
        assert open_checkpoint(path).config.schedule == V
    assert len(told) == 1


def test_no_warning_where_they_agree(sd):
    path = sd(markers=["v_pred", "ztsnr"], **{KEY: "v"})
    path.with_suffix(".yaml").write_text("model: {params: {parameterization: v}}")
    assert open_checkpoint(path).config.schedule == ZERO
    scheduler(path.parent, prediction_type="v_prediction", rescale_betas_zero_snr=True,
              timestep_spacing="trailing")
    assert open_checkpoint(path).config.schedule == ZERO


def test_a_file_that_contradicts_itself(sd):
    path = sd(markers=["v_pred"], **{PREDICTION: "epsilon", KEY: "epsilon"})
    with pytest.warns(UserWarning, match=f"{PREDICTION} says epsilon, but v_prediction is taken, "
                      "from the file's marker v_pred") as told:
        assert open_checkpoint(path).config.schedule == V
    assert len(told) == 1


def test_the_file_outranks_the_rule_of_thumb(sd, monkeypatch):
    monkeypatch.setattr(prediction, "read_tensor", lambda *_: torch.tensor([-1.0, 1.0]))
    assert open_checkpoint(sd(SD2)).config == SD2_V
    assert open_checkpoint(sd(SD2, **{PREDICTION: "epsilon"})).config == SD2


# Zero-terminal SNR.


@pytest.mark.parametrize("markers, metadata", [
    (["ztsnr"], {}), (["ztsnr"], {PREDICTION: "epsilon"}), ([UNET + "ztsnr"], {KEY: "epsilon"})])
def test_zero_snr_without_v_is_an_error(markers, metadata, sd):
    path = sd(markers=markers, **metadata)
    with pytest.raises(WeightError, match="zero terminal SNR, which only.*predicts epsilon.*give"):
        open_checkpoint(path)
    assert open_checkpoint(path, prediction_type="v_prediction").config.schedule == ZERO


def test_zero_snr_of_a_scheduler_without_v_is_an_error(tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    scheduler(tmp_path / "model", rescale_betas_zero_snr=True)
    with pytest.raises(WeightError, match="zero terminal SNR.*epsilon .from scheduler/sched"):
        open_checkpoint(tmp_path / "model")
    found = open_checkpoint(tmp_path / "model", prediction_type="v_prediction")
    assert found.config.schedule.rescale_betas_zero_snr


@pytest.mark.parametrize("fields, zero, spacing", [
    ({}, False, "leading"),
    ({"rescale_betas_zero_snr": False}, False, "leading"),
    ({"rescale_betas_zero_snr": None}, False, "leading"),
    ({"rescale_betas_zero_snr": True}, True, "leading"),
    ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, True, "trailing"),
    ({"timestep_spacing": "trailing"}, False, "trailing"),
    ({"timestep_spacing": "leading"}, False, "leading"),
])
def test_fields_of_a_scheduler(fields, zero, spacing, tmp_path):
    small_model(SMALL_V).save(tmp_path / "model")
    scheduler(tmp_path / "model", prediction_type="v_prediction", **fields)
    schedule = open_checkpoint(tmp_path / "model").config.schedule
    assert (schedule.rescale_betas_zero_snr, schedule.timestep_spacing) == (zero, spacing)


@pytest.mark.parametrize("spacing", ["karras", "", "Trailing", "x" * 999])
def test_other_timesteps_are_told_in_one_line(spacing, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    path = scheduler(tmp_path / "model", timestep_spacing=spacing)
    with pytest.warns(UserWarning) as told:
        assert open_checkpoint(tmp_path / "model").config.schedule.timestep_spacing == "leading"
    (line,) = [str(one.message) for one in told]
    assert line.startswith(f"{path}: timestep_spacing is {spacing[:80]!r}") and "'leading'" in line


@pytest.mark.parametrize("value", [None, 1, ["trailing"], {}, True])
def test_timesteps_that_are_no_word_are_an_error(value, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    scheduler(tmp_path / "model", timestep_spacing=value)
    with pytest.raises(WeightError, match="timestep_spacing is .*'leading' or 'trailing'"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas"])
def test_sigmas_that_are_no_truth_value(name, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    scheduler(tmp_path / "model", **{name: "yes"})
    with pytest.raises(WeightError, match=f"{name} is 'yes'"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("value", [1.5, "true", [], [True], {}])
def test_zero_snr_that_is_no_truth_value_is_an_error(value, tmp_path):
    small_model(SMALL).save(tmp_path / "model")
    scheduler(tmp_path / "model", rescale_betas_zero_snr=value)
    with pytest.raises(WeightError, match="rescale_betas_zero_snr is"):
        open_checkpoint(tmp_path / "model")


def test_all_of_a_scheduler_beside_a_file_is_used(sd):
    path = sd()
    scheduler(path.parent, beta_start=0.0015, beta_end=0.0195, timestep_spacing="trailing")
    assert open_checkpoint(path).config.schedule == ScheduleConfig(
        beta_start=0.0015, beta_end=0.0195, timestep_spacing="trailing")
    scheduler(path.parent, prediction_type="v_prediction")  # the rest is as in the model
    assert open_checkpoint(path).config.schedule == V


# Saved and read back.

SCHEDULES = [
    EPS, V, ZERO, replace(V, rescale_betas_zero_snr=True),
    replace(V, timestep_spacing="trailing"), replace(EPS, timestep_spacing="trailing"),
    replace(EPS, beta_start=0.0015, beta_end=0.0195, num_train_timesteps=500),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_survives_a_single_file(schedule, tmp_path):
    sd = small_model(SMALL)
    config = replace(sd.config, schedule=schedule)
    minisd.checkpoints.save.save_model(tmp_path / "m.safetensors", config, sd.tokenizer, sd.parts)
    sd.save(tmp_path / "sizes")
    (tmp_path / "sizes/scheduler/scheduler_config.json").unlink()
    found = open_checkpoint(tmp_path / "m.safetensors", config=tmp_path / "sizes")
    assert found.config.schedule == schedule
    for part, module in build(found.config, TORCH).items():
        check(found, part, module)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_survives_a_folder_and_diffusers(schedule, tmp_path):
    sd = small_model(SMALL)
    config = replace(sd.config, schedule=schedule)
    minisd.checkpoints.save.save_model(tmp_path / "a", config, sd.tokenizer, sd.parts)
    assert open_checkpoint(tmp_path / "a").config.schedule == schedule
    theirs = DDIMScheduler.from_pretrained(tmp_path / "a" / "scheduler")
    assert theirs.config.timestep_spacing == schedule.timestep_spacing
    assert theirs.config.rescale_betas_zero_snr == schedule.rescale_betas_zero_snr
    assert (theirs.alphas_cumprod[-1] == 0) == schedule.rescale_betas_zero_snr
    (tmp_path / "a/scheduler/scheduler_config.json").unlink()
    theirs.save_pretrained(tmp_path / "a" / "scheduler")
    assert open_checkpoint(tmp_path / "a").config.schedule == schedule


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_file_is_written_with(schedule):
    metadata, markers = prediction.written(schedule)
    assert metadata[PREDICTION] == {"v_prediction": "v"}.get(schedule.prediction_type, "epsilon")
    official = schedule in (EPS, V)
    assert ("minisd.scheduler_config" in metadata) == (not official)
    assert markers == (("v_pred", "ztsnr") if schedule.rescale_betas_zero_snr else ())


def test_a_shipped_file_says_no_more_than_before(tmp_path):
    minisd.load(device="cpu").save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", PREDICTION: "v"}
        assert not names.markers(file.keys())


def test_other_programs_find_the_markers(tmp_path):
    sd = small_model(SMALL_V)
    config = replace(sd.config, schedule=ZERO)
    minisd.checkpoints.save.save_model(tmp_path / "m.safetensors", config, sd.tokenizer, sd.parts)
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    sd.save(tmp_path / "sizes")
    theirs = StableDiffusionPipeline.from_single_file(
        tmp_path / "m.safetensors", config=str(tmp_path / "sizes"), local_files_only=True)
    want = sd.unet.state_dict()["conv_in.weight"]
    assert torch.equal(theirs.unet.conv_in.weight.double(), want.float().double())


@pytest.mark.parametrize("text, message", [
    ("{", "not readable JSON"), ("[]", "not an object"), ("{}", "beta_schedule is None"),
    (json.dumps(schedule_fields(EPS) | {"beta_end": 7}), "beta_end is 7"),
    (json.dumps(schedule_fields(EPS) | {"prediction_type": "x0"}), "prediction_type is 'x0'"),
])
def test_a_schedule_in_the_file_is_read_with_the_same_checks(text, message, sd):
    with pytest.raises(WeightError, match=f"m.safetensors.*{message}"):
        open_checkpoint(sd(**{"minisd.scheduler_config": text}))


def test_folders_of_diffusers_keep_their_meaning(tmp_path):
    """A folder that diffusers writes with a rescaled, trailing schedule is read as such."""
    from files import save_folder

    folder = save_folder(SMALL_V, tmp_path / "a")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    pipe.save_pretrained(tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").config.schedule == ZERO


def test_markers_in_a_folder_are_no_unexpected_tensors(tmp_path):
    sd = small_model(SMALL_V)
    sd.save(tmp_path / "a")
    path = tmp_path / "a/unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"v_pred": torch.zeros(0)}, path, {"format": "pt"})
    found = open_checkpoint(tmp_path / "a")
    check(found, "unet", sd.unet)
