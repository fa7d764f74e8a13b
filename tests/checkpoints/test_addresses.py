"""What a path is, where it is no model: an address, another network, no name of the Hub."""

import shutil
from pathlib import Path

import pytest
from files import save_folder
from reference_models import SMALL

from minisd.checkpoints.checkpoint import locate, open_checkpoint
from minisd.errors import WeightError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_folder(SMALL, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


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
