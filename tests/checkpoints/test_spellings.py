"""Another spelling of what minisd computes is read as it; what is another function is rejected.

Which is which, diffusers and transformers say: a spelling is theirs too, or they know none such,
and what is rejected gives another output there or an error.
"""

import json
import shutil
import warnings

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from files import save_folder
from reference_models import SMALL, error, randn
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.activations import ACT2FN

from minisd.checkpoints.checkpoint import open_checkpoint
from minisd.checkpoints.diffusers_config import ACTIVATIONS
from minisd.errors import WeightError

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_folder(SMALL, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def edited(folder, file, fields):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


# File, changed fields, whether diffusers or transformers knows that spelling.
SAME = [
    (UNET, {"sample_size": [16, 16]}, True),
    (UNET, {"sample_size": 16.0}, True),
    (UNET, {"sample_size": [16.0, 16]}, True),
    (UNET, {"layers_per_block": [2, 2, 2]}, True),
    (UNET, {"layers_per_block": 2.0}, False),
    (UNET, {"layers_per_block": [2.0, 2, 2]}, False),
    (UNET, {"cross_attention_dim": [20, 20, 20]}, True),
    (UNET, {"cross_attention_dim": 20.0}, False),
    (UNET, {"attention_head_dim": [2.0, 3.0, 5.0]}, False),
    (UNET, {"num_attention_heads": [2, 3, 5]}, False),
    (UNET, {"num_attention_heads": None}, True),
    (UNET, {"block_out_channels": [16.0, 24.0, 40.0]}, False),
    (UNET, {"norm_num_groups": 4.0}, False),
    (UNET, {"in_channels": 4.0, "out_channels": 4.0}, False),
    (UNET, {"act_fn": "swish"}, True),
    (UNET, {"act_fn": "SiLU"}, True),
    (UNET, {"time_embedding_dim": 64}, True),
    (UNET, {"time_embedding_dim": 0}, True),
    (UNET, {"time_embedding_dim": None}, True),
    (UNET, {"center_input_sample": None}, True),
    (UNET, {"center_input_sample": 0}, True),
    (UNET, {"dual_cross_attention": None}, True),
    (UNET, {"use_linear_projection": None}, True),
    (UNET, {"upcast_attention": None}, True),
    (UNET, {"attention_type": None}, True),
    (UNET, {"class_embeddings_concat": None}, True),
    (UNET, {"flip_sin_to_cos": 1}, True),
    (UNET, {"freq_shift": 0.0}, True),
    (UNET, {"norm_eps": 0.00001}, True),
    (UNET, {"mid_block_scale_factor": 1.0}, True),
    (UNET, {"only_cross_attention": [False, False, False]}, True),
    (UNET, {"transformer_layers_per_block": [1, 1, 1]}, True),
    (UNET, {"transformer_layers_per_block": 1.0}, False),
    (UNET, {"reverse_transformer_layers_per_block": [1, 1, 1]}, True),
    # These three have no effect on the blocks that minisd computes.
    (UNET, {"resnet_skip_time_act": True}, True),
    (UNET, {"resnet_out_scale_factor": 2.0}, True),
    (UNET, {"cross_attention_norm": "layer_norm"}, True),
    (UNET, {"mid_block_only_cross_attention": True}, True),
    (UNET, {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 9}, True),
    (UNET, {"down_block_types": ["UNetResCrossAttnDownBlock2D"] * 2 + ["UNetResDownBlock2D"],
            "up_block_types": ["UNetResUpBlock2D"] + ["UNetResCrossAttnUpBlock2D"] * 2}, True),
    (UNET, {"down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["UNetResDownBlock2D"]}, True),
    (VAE, {"act_fn": "swish"}, True),
    (VAE, {"layers_per_block": 2.0}, False),
    (VAE, {"layers_per_block": [2, 2, 2]}, False),
    (VAE, {"latent_channels": 4.0}, False),
    (VAE, {"block_out_channels": [16.0, 24.0, 40.0]}, False),
    (VAE, {"shift_factor": 0.0}, True),
    (VAE, {"shift_factor": None, "latents_mean": None, "latents_std": None}, True),
    (VAE, {"sample_size": [256, 256]}, True),
    (VAE, {"down_block_types": ["UNetResDownEncoderBlock2D"] * 3}, True),
    (VAE, {"up_block_types": ["UpDecoderBlock2D", "UNetResUpDecoderBlock2D", "UpDecoderBlock2D"]},
     True),
    (TEXT, {"hidden_size": 20.0, "num_attention_heads": 4.0}, False),
    (TEXT, {"vocab_size": 49408.0, "max_position_embeddings": 77.0}, False),
    (TEXT, {"attention_dropout": None, "projection_dim": None}, True),
    (SCHEDULER, {"num_train_timesteps": 1000.0}, False),
    (SCHEDULER, {"trained_betas": None, "rescale_betas_zero_snr": None}, True),
    (SCHEDULER, {"clip_sample": True, "set_alpha_to_one": True, "steps_offset": 0}, True),
]


@pytest.mark.parametrize("file, fields, known", SAME, ids=lambda value: str(value)[:60])
def test_the_same_function_in_another_spelling(file, fields, known, folder, saved):
    assert open_checkpoint(edited(folder, file, fields)).config == open_checkpoint(saved).config
    kind = {UNET: "unet", VAE: "vae", TEXT: "text_encoder"}.get(file)
    if known and kind:
        assert error(answer(kind, folder), answer(kind, saved)) == 0


def answer(kind, folder):
    """What the official class, built from the folder's config, answers with the saved weights."""
    x, ids = randn(1, 4, 8, 8), torch.arange(7)[None]
    if kind == "unet":
        model = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float64)
        return model(x, 5, randn(1, 77, 20, seed=1)).sample
    if kind == "vae":
        model = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float64)
        mean = model.encode(randn(1, 3, 32, 32)).latent_dist.mean
        return torch.cat([mean.flatten(), model.decode(x).sample.flatten()])
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float64)
    return model(ids).last_hidden_state


# File, changed fields, and words of the error.
OTHER = [
    (UNET, {"norm_num_groups": None}, "norm_num_groups is None"),
    (UNET, {"norm_num_groups": [4, 4, 4]}, "norm_num_groups is .4, 4, 4"),
    (UNET, {"flip_sin_to_cos": None}, "flip_sin_to_cos is None"),
    (UNET, {"flip_sin_to_cos": False}, "flip_sin_to_cos is False"),
    (UNET, {"freq_shift": 1}, "freq_shift is 1"),
    (UNET, {"freq_shift": None}, "freq_shift is None"),
    (UNET, {"mid_block_type": None}, "mid_block_type is None"),
    (UNET, {"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
    (UNET, {"center_input_sample": True}, "center_input_sample is True"),
    (UNET, {"act_fn": "mish"}, "act_fn is 'mish'"),
    (UNET, {"act_fn": None}, "act_fn is None"),
    (UNET, {"norm_eps": None}, "norm_eps is None"),
    (UNET, {"layers_per_block": [1, 2, 2]}, "1 to 8, the same for every level"),
    (UNET, {"layers_per_block": [2, 2]}, "1 to 8, the same for every level"),
    (UNET, {"layers_per_block": []}, "the same for every level"),
    (UNET, {"layers_per_block": [True] * 3}, "the same for every level"),
    (UNET, {"layers_per_block": "2"}, "layers_per_block is '2'"),
    (UNET, {"layers_per_block": 1e300}, "layers_per_block is 1e.300"),
    (UNET, {"cross_attention_dim": [20, 20, 24]}, "the same for every level"),
    (UNET, {"cross_attention_dim": None}, "cross_attention_dim is None"),
    (UNET, {"attention_head_dim": None}, "attention_head_dim is None"),
    (UNET, {"num_attention_heads": [2, 3, 4]}, "num_attention_heads is .2, 3, 4.; minisd computes"),
    (UNET, {"num_attention_heads": 2}, "num_attention_heads is 2"),
    (UNET, {"num_attention_heads": True}, "num_attention_heads is True"),
    (UNET, {"time_embedding_dim": 128}, "time_embedding_dim is 128; minisd computes only 64"),
    (UNET, {"time_embedding_act_fn": "silu"}, "time_embedding_act_fn"),
    (UNET, {"only_cross_attention": None}, "only_cross_attention is None"),
    (UNET, {"only_cross_attention": [False, True]}, "for each of 3 levels"),
    (UNET, {"only_cross_attention": [False, 1, False]}, "for each of 3 levels"),
    (UNET, {"transformer_layers_per_block": [1, 1]}, "1 for each of 3 levels"),
    (UNET, {"reverse_transformer_layers_per_block": [1, 2, 1]}, "reverse_transformer_layers"),
    (UNET, {"dual_cross_attention": True}, "dual_cross_attention is True"),
    (UNET, {"attention_type": "gated"}, "attention_type is 'gated'"),
    (UNET, {"resnet_time_scale_shift": None}, "resnet_time_scale_shift is None"),
    (UNET, {"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
    (UNET, {"use_linear_projection": "yes"}, "use_linear_projection is 'yes'"),
    (UNET, {"downsample_padding": 0}, "downsample_padding is 0"),
    (UNET, {"conv_in_kernel": 1}, "conv_in_kernel is 1"),
    (UNET, {"class_embeddings_concat": True}, "class_embeddings_concat is True"),
    (UNET, {"encoder_hid_dim": 20}, "encoder_hid_dim is 20"),
    (UNET, {"time_cond_proj_dim": 255}, "time_cond_proj_dim is 255"),
    (UNET, {"down_block_types": ["SimpleCrossAttnDownBlock2D"] * 3}, "down_block_types"),
    (UNET, {"sample_size": [8, 8, 8]}, "sample_size is .8, 8, 8"),
    (UNET, {"sample_size": []}, "sample_size is"),
    (UNET, {"sample_size": [0, 8]}, "sample_size is .0, 8"),
    (UNET, {"sample_size": 8.5}, "sample_size is 8.5"),
    (UNET, {"sample_size": True}, "sample_size is True"),
    (VAE, {"mid_block_add_attention": None}, "mid_block_add_attention is None"),
    (VAE, {"use_quant_conv": None}, "use_quant_conv is None"),
    (VAE, {"use_post_quant_conv": False}, "use_post_quant_conv is False"),
    (VAE, {"shift_factor": 0.5}, "shift_factor is 0.5"),
    (VAE, {"latents_mean": [0.1] * 4}, "latents_mean"),
    (VAE, {"scaling_factor": None}, "scaling_factor is None"),
    (VAE, {"down_block_types": ["DownEncoderBlock2D"]}, "for each of 3 levels"),
    (VAE, {"act_fn": "relu"}, "act_fn is 'relu'"),
    (TEXT, {"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
    (TEXT, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is"),
    (TEXT, {"hidden_act": None}, "hidden_act is None"),
    (TEXT, {"hidden_act": "QuickGELU"}, "hidden_act is 'QuickGELU'"),
    (TEXT, {"layer_norm_eps": None}, "layer_norm_eps is None"),
    (TEXT, {"text_config": {"hidden_size": 24, "num_attention_heads": 4}}, "encoder's are 24"),
    (SCHEDULER, {"num_train_timesteps": 1000.5}, "num_train_timesteps is 1000.5"),
    (SCHEDULER, {"prediction_type": None}, "prediction_type is None"),
    (SCHEDULER, {"trained_betas": []}, "trained_betas"),
    (SCHEDULER, {"beta_start": None}, "beta_start is None"),
]


@pytest.mark.parametrize("file, fields, message", OTHER, ids=lambda value: str(value)[:60])
def test_another_function_is_rejected(file, fields, message, folder):
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(edited(folder, file, fields))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file, fields", [
    (file, fields) for file, fields, _ in OTHER
    if file in (UNET, VAE) and not fields.keys() & {"sample_size", "shift_factor", "latents_mean",
                                                    "scaling_factor", "attention_type",
                                                    "time_cond_proj_dim"}
], ids=lambda value: str(value)[:60])
def test_what_is_rejected_is_another_function_to_diffusers_or_none(file, fields, folder, saved):
    """But for what the pipelines use and not the networks, and for blocks that take more inputs."""
    kind = file.split("/")[0]
    edited(folder, file, fields)
    try:
        assert error(answer(kind, folder), answer(kind, saved)) > 0
    except (ValueError, TypeError, AttributeError, RuntimeError, KeyError, IndexError):
        pass  # it cannot be built, or has other weights


@pytest.mark.parametrize("cells, side", [
    ([8, 12], 48), ([12, 8], 48), ([64.0, 96], 384), ([1, 2], 8), ([96, 95], 384)])
def test_a_model_of_no_square_is_told_and_drawn_square(cells, side, folder):
    edited(folder, UNET, {"sample_size": cells})
    with pytest.warns(UserWarning, match=f"sample_size is .*a square, {side}x{side}$") as told:
        assert open_checkpoint(folder).config.sample_size == side
    assert len(told) == 1


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_names_of_the_exact_and_the_quick_gelu(name, folder):
    x = randn(1000)
    assert error(ACT2FN[name](x), ACT2FN[ACTIVATIONS[name]](x)) < 1e-15
    found = open_checkpoint(edited(folder, TEXT, {"hidden_act": name})).config.text
    assert found.hidden_act == ACTIVATIONS[name]
    assert found.pad_token_id == (49407 if name == "quick_gelu" else 0)


@pytest.mark.parametrize("model_type", ["clip", "clip_text_model", None])
def test_the_config_of_a_whole_clip_has_the_text_encoder_inside(model_type, folder, saved):
    path = folder / TEXT
    inner = json.loads(path.read_text())
    path.write_text(json.dumps({
        "model_type": model_type, "projection_dim": 99, "hidden_size": 7, "text_config": inner,
        "vision_config": {"hidden_size": 8}}))
    assert open_checkpoint(folder).config == open_checkpoint(saved).config
    if model_type == "clip":
        assert CLIPTextConfig.from_pretrained(folder / "text_encoder").hidden_size == 20


@pytest.mark.parametrize("value", [None, [], "clip"])
def test_a_text_config_that_is_none(value, folder, saved):
    edited(folder, TEXT, {"text_config": value})
    assert open_checkpoint(folder).config == open_checkpoint(saved).config
