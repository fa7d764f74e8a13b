"""A wrong path, folder or config raises an error of one sentence that says what is wrong."""

import json
import re
import shutil
from pathlib import Path

import pytest
from files import all_shapes, header, save_folder, write
from reference_models import SMALL

from minisd.checkpoints.checkpoint import locate, open_checkpoint
from minisd.config import SD1
from minisd.errors import WeightError


def test_missing_path_names_similar_paths(tmp_path):
    (tmp_path / "v1-5-pruned.safetensors").touch()
    (tmp_path / "readme").touch()
    with pytest.raises(FileNotFoundError, match=r"v1-5-prunde.safetensors.*has v1-5-pruned.safet"):
        open_checkpoint(tmp_path / "v1-5-prunde.safetensors")
    with pytest.raises(FileNotFoundError, match="^../nowhere does not exist"):
        open_checkpoint("../nowhere")
    with pytest.raises(FileNotFoundError, match="has readme, v1-5-pruned.safetensors"):
        open_checkpoint(tmp_path / "0")


@pytest.mark.parametrize("path", [
    "~nobody-of-this-name/x", "x" * 5000, "x/" * 5000, "a\0b", "a--b/c", "owner/na me", "\udcff",
])
def test_path_that_cannot_be_one_is_missing_too(path):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} does not exist"):
        open_checkpoint(path)


def test_folder_without_an_index(tmp_path):
    with pytest.raises(WeightError, match="no model_index.json.*beside text_encoder, unet, vae"):
        open_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_folder(SMALL, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_name_in_the_hub_cache_is_found_without_the_network(saved, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    snapshot = hub / "models--owner--name" / "snapshots" / ("a" * 40)
    shutil.copytree(saved, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert locate("owner/name") == snapshot
    with pytest.raises(FileNotFoundError, match="run `minisd download owner/other` first"):
        locate("owner/other")
    assert open_checkpoint("owner/name", vae="owner/name").parts["vae"]  # that of a whole model


@pytest.mark.parametrize("name", ["a/b--c", "a..b/c", "owner/name.git", "owner/" + "x" * 97])
def test_no_advice_to_download_what_the_hub_cannot_have(name):
    with pytest.raises(FileNotFoundError) as caught:
        locate(name)
    assert "minisd download" not in str(caught.value)


ADVICE = "download it, and give the path of the file or folder"


@pytest.mark.parametrize("address, advice", [
    ("https://example.com/v1-5.safetensors", ADVICE),
    ("http://example.com", ADVICE),
    ("s3://bucket/model", ADVICE),
    ("file:///models/v1-5.safetensors", ADVICE),
    ("https://civitai.com/models/1?a=b", ADVICE),
    ("https://huggingface.co/owner/name/resolve/main/a.safetensors", ADVICE),
    ("https://huggingface.co/owner/name..x", ADVICE),
    ("https://huggingface.co/owner/name", "run `minisd download owner/name`, then give owner/name"),
    ("https://www.huggingface.co/owner/name/", "run `minisd download owner/name`, then give own"),
    ("HTTPS://hf.co/owner/name", "run `minisd download owner/name`, then give owner/name"),
])
def test_an_address_is_called_one(saved, address, advice):
    for path in (address, Path(address)):  # pathlib writes // as /
        for given in ({"path": path}, {"path": saved, "vae": path}):
            with pytest.raises(FileNotFoundError) as caught:
                open_checkpoint(**given)
            assert str(caught.value).startswith(f"{path} is an address, which is never opened: ")
            assert advice in str(caught.value)


def test_a_path_with_a_colon_is_no_address(tmp_path):
    with pytest.raises(FileNotFoundError, match="^C:/models/x does not exist"):
        open_checkpoint("C:/models/x")
    with pytest.raises(FileNotFoundError, match="a: b does not exist"):
        open_checkpoint(tmp_path / "a: b")


# What lies there is something else: words of the error, as a model and as a VAE.
ALONE = [
    ("vae", "is a VAE alone: give it as vae= \\(--vae\\), beside a model", None),
    ("unet", "is a UNet alone: give the whole folder", "_class_name is 'UNet2DConditionModel'"),
    ("text_encoder", "has no model_index.json", "has no diffusion_pytorch_model.safetensors"),
    ("scheduler", "has no model_index.json", "has no diffusion_pytorch_model.safetensors"),
    (".", None, None),
]


@pytest.mark.parametrize("part, as_model, as_vae", ALONE)
def test_a_folder_of_something_else_is_called_what_it_is(folder, part, as_model, as_vae):
    for words, given in ((as_model, {"path": folder / part}),
                         (as_vae, {"path": folder, "vae": folder / part})):
        if words is None:
            assert open_checkpoint(**given).parts["vae"]
        else:
            with pytest.raises(WeightError, match=words) as caught:
                open_checkpoint(**given)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"[]", b"<html>", b"{", b'{"_class_name": 3}', b'{"_class_name": ["AutoencoderKL"]}',
    b'{"_class_name": "AutoencoderTiny"}', b'{"_class_name": "x\\ny"}',
])
def test_a_strange_config_beside_no_model(folder, content):
    (folder / "vae" / "config.json").write_bytes(content)
    with pytest.raises(WeightError, match="has no model_index.json"):
        open_checkpoint(folder / "vae")
    with pytest.raises(WeightError, match="config.json"):
        open_checkpoint(folder, vae=folder / "vae")


MANY = 10**18
# File, its changed fields, words of the error.
BAD_FIELDS = [
    ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "_class_name is 'Stable"),
    ("model_index.json", {"_class_name": ["x"]}, "_class_name"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae is .*AutoencoderTiny"),
    ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "T5EncoderModel"),
    ("unet/config.json", {"in_channels": 8}, "instruct-pix2pix"),
    ("unet/config.json", {"in_channels": 7}, "x4 upscaler"),
    ("unet/config.json", {"in_channels": 5}, "depth"),
    ("unet/config.json", {"in_channels": 6}, "6 input channels"),
    ("unet/config.json", {"out_channels": 8}, "8 output channels"),
    ("unet/config.json", {"block_out_channels": [MANY] * 3}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16] * 99}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24, 45]}, "norm_num_groups"),
    ("unet/config.json", {"block_out_channels": "16"}, "block_out_channels"),
    ("unet/config.json", {"block_out_channels": [16, 24]}, "up_block_types"),
    ("unet/config.json", {"down_block_types": ["DownBlock2D", "K", "DownBlock2D"]}, "down_block"),
    ("unet/config.json", {"up_block_types": ["CrossAttnUpBlock2D"] * 3}, "up_block_types"),
    ("unet/config.json", {"layers_per_block": MANY}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": 2.0}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": True}, "layers_per_block"),
    ("unet/config.json", {"layers_per_block": None}, "layers_per_block"),
    ("unet/config.json", {"attention_head_dim": 7}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": 0}, "attention_head_dim"),
    ("unet/config.json", {"attention_head_dim": [2, 3]}, "attention_head_dim"),
    ("unet/config.json", {"cross_attention_dim": 24}, "24 wide, but the text encoder's are 20"),
    ("unet/config.json", {"sample_size": -8}, "sample_size"),
    ("unet/config.json", {"act_fn": "gelu"}, "act_fn is 'gelu'; minisd computes only 'silu'"),
    ("unet/config.json", {"norm_eps": 1e-6}, "norm_eps"),
    ("unet/config.json", {"only_cross_attention": [True, False, False]}, "only_cross_attention"),
    ("unet/config.json", {"class_embed_type": "timestep"}, "class_embed_type"),
    ("unet/config.json", {"num_class_embeds": 1000}, "num_class_embeds"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type"),
    ("unet/config.json", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers"),
    ("unet/config.json", {"num_attention_heads": 8}, "num_attention_heads"),
    ("unet/config.json", {"time_embedding_type": "fourier"}, "time_embedding_type"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "scaling_factor"),
    ("vae/config.json", {"scaling_factor": 0}, "scaling_factor"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ("vae/config.json", {"use_quant_conv": False}, "use_quant_conv"),
    ("vae/config.json", {"act_fn": "relu"}, "act_fn"),
    ("vae/config.json", {"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types"),
    ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act"),
    ("text_encoder/config.json", {"layer_norm_eps": 1e-6}, "layer_norm_eps"),
    ("text_encoder/config.json", {"num_hidden_layers": MANY}, "num_hidden_layers"),
    ("text_encoder/config.json", {"num_attention_heads": 3}, "num_attention_heads"),
    ("text_encoder/config.json", {"vocab_size": "many"}, "vocab_size"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"prediction_type": {}}, "prediction_type"),
    ("scheduler/scheduler_config.json", {"beta_start": float("inf")}, "beta_start"),
    ("scheduler/scheduler_config.json", {"beta_start": 0.5}, "beta_start"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("file", "fields", "message"), BAD_FIELDS, ids=lambda value: str(value)[:50]
)
def test_config_of_a_model_that_minisd_does_not_compute(file, fields, message, folder):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(WeightError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("file", sorted({file for file, _, _ in BAD_FIELDS}))
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing|no model_index"),
        (b"", "not readable JSON"),
        (b"[1]", "not an object"),
        (b'{"a": 1, "a": 2}', "has 'a' twice"),
        (b"[" * 10**5, "not readable JSON"),
        (b" " * 10**8, "is too large"),
    ],
    ids=["missing", "empty", "array", "field twice", "deep", "100 MB"],
)
def test_config_that_is_missing_or_no_object(file, content, message, folder):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(folder)


WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../x.safetensors"}, r"names '../x.safetensors', which is not a shard in its own"),
        ({"a": "x/y.safetensors"}, "which is not a shard in its own folder"),
        ({"a": "x\\y.safetensors"}, "which is not a shard in its own folder"),
        ({"a": "/etc/passwd"}, "which is not a shard in its own folder"),
        ({"a": "pickle.bin"}, "which is not a shard in its own folder"),
        ({"a": "x.safetensors"}, "names x.safetensors, which is missing"),
        ({"a": "one.safetensors"}, "do not hold the same tensors"),
        ({"a": 1}, "no weight_map"),
        (["a"], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_wrong_shard_index(weight_map, message, folder):
    (folder / "unet" / WHOLE).rename(folder / "unet" / "one.safetensors")
    index = folder / "unet" / f"{WHOLE}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError, match=message):
        open_checkpoint(folder)


def test_folder_of_pickles_says_how_to_convert(folder):
    (folder / "vae" / WHOLE).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(WeightError, match="vae has no diffusion_pytorch_model.safetensors.*save_f"):
        open_checkpoint(folder)


def test_yaml_with_an_unknown_parameterization(tmp_path):
    (tmp_path / "a.yaml").write_text("parameterization: x0")
    path = write(tmp_path / "a.safetensors", header(all_shapes(SD1)))
    with pytest.raises(WeightError, match="parameterization is 'x0'"):
        open_checkpoint(path)
