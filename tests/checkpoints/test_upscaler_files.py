"""The files of the x4 upscaler: as they are published, and as they are saved."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_line import fails, run
from diffusers import StableDiffusionUpscalePipeline
from files import all_shapes, header, write
from PIL import Image
from reference_models import SMALL_X4, error, small_model
from upscalers import image

import minisd
from minisd.app.png import read_settings
from minisd.checkpoints.checkpoint import check, open_checkpoint
from minisd.checkpoints.folder import STEMS
from minisd.config import X4_UPSCALER
from minisd.errors import WeightError
from minisd.loading import build
from minisd.models.ops import TORCH

CALL = dict(prompt="a cat", image=image(8, 12), num_inference_steps=3, output_type="pt")
BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear"}
# As on the Hub.
PUBLISHED = {
    "model_index.json": {
        "_class_name": "StableDiffusionUpscalePipeline", "max_noise_level": 350,
        "low_res_scheduler": ["diffusers", "DDPMScheduler"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]},
    "low_res_scheduler/scheduler_config.json": {
        "_class_name": "DDPMScheduler", **BETAS, "clip_sample": True, "num_train_timesteps": 1000},
    "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction",
        "num_train_timesteps": 1000, "set_alpha_to_one": False, "steps_offset": 1},
    "text_encoder/config.json": {
        "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 23},
    "unet/config.json": {
        "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024],
        "cross_attention_dim": 1024, "in_channels": 7, "num_class_embeds": 1000,
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "only_cross_attention": [True, True, True, False], "sample_size": 128,
        "use_linear_projection": True},
    "vae/config.json": {
        "block_out_channels": [128, 256, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3},
}


@pytest.fixture
def published(tmp_path):
    """A folder of the published configs, with official tensors of which the data are zero."""
    for part, module in build(X4_UPSCALER, TORCH).items():
        (tmp_path / part).mkdir()
        shapes = {name: tuple(p.shape) for name, p in module.state_dict().items()}
        write(tmp_path / part / f"{STEMS[part]}.safetensors", header(shapes))
    for name, fields in PUBLISHED.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(fields))
    return tmp_path


def edit(folder, name, **fields):
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def test_the_published_folder(published):
    """Its VAE's config lacks the scaling factor, which is not that of other models."""
    found = open_checkpoint(published)
    assert found.config == X4_UPSCALER
    for part, module in build(found.config, TORCH).items():
        check(found, part, module)
    edit(published, "vae/config.json", scaling_factor=0.1)
    assert open_checkpoint(published).config.vae.scaling_factor == 0.1


def test_what_a_folder_says(published):
    edit(published, "model_index.json", max_noise_level=15)
    edit(published, "low_res_scheduler/scheduler_config.json", beta_end=0.03)
    edit(published, "unet/config.json", only_cross_attention=True)
    config = open_checkpoint(published).config
    assert (config.max_noise_level, config.noise_level) == (15, 15)
    assert config.low_res_schedule.beta_end == 0.03 and config.schedule.beta_end == 0.02
    assert config.unet.only_cross_attention == (True,) * 4


@pytest.mark.parametrize("name, fields, words", [
    ("model_index.json", {"max_noise_level": 1000}, "max_noise_level is 1000; .* 0 to 999"),
    ("low_res_scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule is"),
    ("low_res_scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "zero_snr is"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "UNet beside it is for upsc"),
    ("unet/config.json", {"num_class_embeds": None}, "7 input channels and no classes"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
])
def test_what_a_folder_cannot_say(name, fields, words, published):
    edit(published, name, **fields)
    with pytest.raises(WeightError, match=words):
        open_checkpoint(published)


def test_a_vae_of_its_own(published):
    assert open_checkpoint(published, vae=published / "vae").config == X4_UPSCALER
    edit(published, "vae/config.json", scaling_factor=0.18215)
    path = write(published / "m.safetensors", header(all_shapes(X4_UPSCALER)))
    with pytest.raises(WeightError, match="another scaling_factor"):
        open_checkpoint(path, vae=published / "vae")


def test_the_published_file(tmp_path):
    """It predicts v, on its own schedule; it holds the buffers of another schedule."""
    buffers = (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")
    shapes = all_shapes(X4_UPSCALER) | {f"low_scale_model.{name}": (1000,) for name in buffers}
    path = write(tmp_path / "x4-upscaler-ema.safetensors", header(shapes))
    found = open_checkpoint(path)
    assert found.config == X4_UPSCALER
    for part, module in build(found.config, TORCH).items():
        check(found, part, module)
    yaml = "model: {params: {parameterization: %s, linear_start: %s, scale_factor: 0.08333}}"
    path.with_suffix(".yaml").write_text(yaml % ("v", 0.0001))
    assert open_checkpoint(path).config == X4_UPSCALER
    path.with_suffix(".yaml").write_text(yaml % ("v", 0.00085))
    with pytest.raises(WeightError, match="linear_start is '0.00085', not 0.0001"):
        open_checkpoint(path)


@pytest.fixture(scope="module")
def model():
    """The small upscaler in float32."""
    return small_model(replace(SMALL_X4, name="saved x4")).to(dtype="float32")


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def drawn_by(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline, StableDiffusionUpscalePipeline)
    assert pipeline.config.max_noise_level == 350
    return pipeline(**CALL, generator=torch.Generator().manual_seed(3)).images


@pytest.mark.parametrize("layout", ["folder", "file"])
def test_what_is_saved_draws_the_same(layout, model, tmp_path):
    folder = tmp_path / "model"
    model.save(folder)
    if layout == "folder":
        again = minisd.load(folder, device="cpu")
        official = StableDiffusionUpscalePipeline.from_pretrained(folder)
    else:
        model.save(tmp_path / "m.safetensors")
        again = minisd.load(tmp_path / "m.safetensors", config=folder, device="cpu")
        official = StableDiffusionUpscalePipeline.from_single_file(
            tmp_path / "m.safetensors", config=str(folder), local_files_only=True)
    for part, module in model.parts.items():
        assert same_state(module, again.parts[part]), part
    assert replace(again.config, name="") == replace(model.config, name="")
    ours = model(seed=3, **CALL).images
    assert torch.equal(again(seed=3, **CALL).images, ours)
    assert error(drawn_by(official), ours) < 1e-5


def test_on_the_command_line(model, tmp_path):
    model.save(tmp_path / "x4")
    image(9, 6).convert("RGBA").save(tmp_path / "small.png")
    line = ["a cat", "-m", f"{tmp_path}/x4", "--image", f"{tmp_path}/small.png", "--quiet"]
    drawn = [*line, "--steps", "2", "--seed", "1", "--noise-level", "7", "-o", f"{tmp_path}/a.png"]
    assert run(drawn)[0] == 0
    made = read_settings(tmp_path / "a.png")
    assert made["noise_level"] == 7 and (made["width"], made["height"]) == (36, 24)
    call = dict(num_inference_steps=2, seed=1, noise_level=7)
    alone = model("a cat", image=tmp_path / "small.png", **call).images[0]
    assert np.array_equal(np.array(alone), np.array(Image.open(tmp_path / "a.png")))
    fails([*line, "--noise-level", "351"], 2, "--noise-level: noise_level must be an integer from ")
    fails([*line, "--noise-level", "-1"], 2, "--noise-level: -1 must be 0 or more")
    fails([*line, "--size", "36x24"], 2, "--size: height and width must not be given: an upscal")
    fails(line[:3], 2, "this is an upscaling model: give it image (--image)")
    fails(["a", *line[3:], "--noise-level", "3"], 2, "takes no noise_level (--noise-level)")
    assert "unusual size (upscaling)\n" in run(["info", f"{tmp_path}/x4"])[1]
