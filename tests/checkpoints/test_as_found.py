"""Files as people have them: what tools add to names and beside the weights, and what is refused
with its remedy.
"""

import json
from functools import cache

import pytest
import torch
from files import as_single_file, official_modules, random_modules, save, save_folder
from reference_models import SMALL, SMALL_V

from minisd.checkpoints import names
from minisd.checkpoints.checkpoint import check, fill, open_checkpoint
from minisd.errors import WeightError

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = "cond_stage_model.transformer.text_model."
WHOLE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def modules():
    return {config: random_modules(config) for config in (SMALL, SMALL_V)}


@pytest.fixture(scope="module")
def tensors(modules):
    return {config: as_single_file(config, modules[config]) for config in modules}


@cache
def empty(config):
    """Official modules without weights. A test gives them its own: another's would be replaced."""
    with torch.device("meta"):
        return official_modules(config)


def loaded(path, config, part=None, **given):
    """Official modules, or one, filled with what the file or folder holds."""
    found = open_checkpoint(path, **given, **({} if path.is_dir() else {"config": config}))
    parts = {name: module for name, module in empty(config).items() if part in (None, name)}
    for name, module in parts.items():
        fill(found, name, module, torch.float32, torch.device("cpu"))
    return parts


def assert_equal(parts, wanted):
    for part, module in parts.items():
        want = wanted[part].state_dict()
        for name, value in module.state_dict().items():
            assert torch.equal(value, want[name].float()), name


def renamed(tensors, old, new):
    return {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# torch's wrappers in the names.

WRAPPED = {
    "a compiled model": lambda t: prefixed(t, "_orig_mod."),
    "a compiled UNet": lambda t: renamed(t, UNET, UNET + "_orig_mod."),
    "a compiled UNet, in sgm": lambda t: renamed(t, UNET, "model._orig_mod.diffusion_model."),
    "a model in parallel": lambda t: prefixed(t, "module."),
    "a UNet in parallel": lambda t: renamed(t, UNET, UNET + "module."),
    "both": lambda t: prefixed(t, "module._orig_mod."),
    "both, the other way": lambda t: prefixed(t, "_orig_mod.module."),
    "a compiled decoder": lambda t: renamed(t, VAE + "decoder.", VAE + "decoder._orig_mod."),
    "a compiled layer": lambda t: renamed(t, ".transformer_blocks.0.", ".transformer_blocks.0."
                                          "_orig_mod."),
    "with a marker": lambda t: prefixed(t | {"v_pred": torch.zeros(0)}, "_orig_mod."),
}


@pytest.mark.parametrize("change", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_in_a_single_file(change, tensors, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", change(tensors[SMALL]))
    assert_equal(loaded(path, SMALL), modules[SMALL])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_wrappers_in_a_folder_in_shards_and_in_a_vae(prefix, modules, tmp_path):
    folder = save_folder(SMALL, tmp_path / "model")
    for part, module in modules[SMALL].items():
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        save(folder / part / f"{stem}.safetensors", prefixed(module.state_dict(), prefix))
    assert_equal(loaded(folder, SMALL), modules[SMALL])

    (folder / "unet" / WHOLE).unlink()
    rows = list(prefixed(modules[SMALL]["unet"].state_dict(), prefix).items())
    for i in (0, 1):
        save(folder / "unet" / f"{i}.safetensors", dict(rows[i::2]))
    where = {name: f"{i % 2}.safetensors" for i, (name, _) in enumerate(rows)}
    index = folder / "unet" / f"{WHOLE}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert_equal(loaded(folder, SMALL), modules[SMALL])

    other = modules[SMALL_V]["vae"]
    vae = save(tmp_path / "vae.safetensors", prefixed(other.state_dict(), prefix))
    assert_equal(loaded(folder, SMALL, "vae", vae=vae), {"vae": other})


def test_a_tensor_with_and_without_a_wrapper_is_there_twice(tensors, tmp_path):
    name = UNET + "out.2.bias"
    both = tensors[SMALL] | {"module." + name: tensors[SMALL][name].clone()}
    path = save(tmp_path / "a.safetensors", both)
    with pytest.raises(WeightError, match=f"twice: .*{name}") as caught:
        open_checkpoint(path, config=SMALL)
    assert "module." + name in str(caught.value)


def test_errors_call_a_tensor_as_the_file_does(tensors, tmp_path):
    more = prefixed(tensors[SMALL] | {UNET + "x": torch.zeros(1)}, "_orig_mod.")
    found = open_checkpoint(save(tmp_path / "a.safetensors", more), config=SMALL)
    with pytest.raises(WeightError, match=f"1 unexpected: _orig_mod.{UNET}x"):
        check(found, "unet", empty(SMALL)["unet"])


@pytest.mark.parametrize("name", [
    "modules.x", "my_module.x", "x_orig_mod.y", "x.submodule.y", "module", "a.module"])
def test_only_whole_words_are_wrappers(name):
    assert names.unwrapped(name) == name


# What lies beside the weights.

POSITIONS = torch.arange(77)[None]
BESIDE = {
    "positions": {TEXT + "embeddings.position_ids": POSITIONS},
    "positions as floats": {TEXT + "embeddings.position_ids": POSITIONS.float()},
    "positions in half precision": {TEXT + "embeddings.position_ids": POSITIONS.half()},
    "positions in 32 bits": {TEXT + "embeddings.position_ids": POSITIONS.int()},
    "positions that are wrong": {TEXT + "embeddings.position_ids": POSITIONS.to(torch.uint8) * 0},
    "averages": {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(7),
                 "model_ema.diffusion_modelout2bias": torch.zeros(4)},
    "averages of the VAE": {VAE + "model_ema.decay": torch.tensor(0.9),
                            VAE + "model_ema.num_updates": torch.tensor(7)},
    "loss of the VAE": {VAE + "loss.logvar": torch.zeros(()), VAE + "loss.x.y": torch.zeros(2)},
    "variances": {"logvar": torch.zeros(1000), "betas": torch.zeros(1000).double()},
    "optimizer": {"optimizer_states.0.state.0.exp_avg": torch.zeros(2),
                  "optimizer.step": torch.tensor(3)},
    "step": {"global_step": torch.tensor(470000)},
    "steps as bytes": {"global_step": torch.tensor([1, 2], dtype=torch.uint8)},
    "projection": {TEXT + "text_projection.weight": torch.zeros(2, 2).int(),
                   "cond_stage_model.logit_scale": torch.tensor(4.6)},
    "a truth value": {"model_ema.x": torch.tensor(True)},
    "8-bit floats": {"model_ema.x": torch.zeros(3).to(torch.float8_e4m3fn)},
    "other 8-bit floats": {"model_ema.x": torch.zeros(3).to(torch.float8_e5m2fnuz)},
    "complex numbers": {"model_ema.x": torch.zeros(3, dtype=torch.complex64)},
    "markers": {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)},
}


@pytest.mark.parametrize("more", BESIDE.values(), ids=BESIDE)
def test_what_no_image_needs_is_left_aside(more, tensors, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", tensors[SMALL] | more)
    assert_equal(loaded(path, SMALL), modules[SMALL])


@pytest.mark.parametrize("config, old, new", [
    (SMALL, TEXT, "conditioner.embedders.0.transformer.text_model."),
    (SMALL, TEXT, "cond_stage_model.transformer."),
    (SMALL_V, "cond_stage_model.model.", "conditioner.embedders.0.model."),
])
def test_prefixes_of_the_text_encoder(config, old, new, tensors, modules, tmp_path):
    path = save(tmp_path / "a.safetensors", renamed(tensors[config], old, new))
    assert_equal(loaded(path, config), modules[config])


# What changes the function, or cannot be used, is refused with what to do.

REFUSED = {
    "LoRA layers beside its own": (
        {UNET + "x.to_q.base_layer.weight": torch.zeros(1),
         UNET + "x.to_q.lora_A.default.weight": torch.zeros(1)}, "save it with the LoRA merged"),
    "scales": ({UNET + "out.2.scale_weight": torch.zeros(())}, "save the model in float16"),
    "scales of another name": ({UNET + "out.2.weight_scale": torch.zeros(())}, "in float16"),
    "4 bits": ({UNET + "x.weight.absmax": torch.zeros(2),
                UNET + "x.weight.quant_state.bitsandbytes__nf4": torch.zeros(2).byte()},
               "quantised weights"),
    "the mark of scales": ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, "quantised"),
    "EDM": ({"edm_vpred.sigma_max": torch.tensor(120.0)}, "an EDM model"),
    "EDM of Playground": ({"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}, "an EDM model"),
}


@pytest.mark.parametrize("more, message", REFUSED.values(), ids=REFUSED)
def test_what_changes_the_function_is_refused(more, message, tensors, tmp_path):
    path = save(tmp_path / "a.safetensors", tensors[SMALL] | more)
    with pytest.raises(WeightError, match=f"a.safetensors looks like .*{message}"):
        open_checkpoint(path, config=SMALL)


@pytest.mark.parametrize("more, message", [
    ({"input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, "a UNet alone .give the whole model"),
    ({"time_embed.0.weight": torch.zeros(4, 4)}, "a UNet alone .give the whole model"),
    ({"input_blocks.0.0.weight": torch.zeros(4), "zero_convs.0.0.bias": torch.zeros(4)},
     "a ControlNet"),
    ({"input_hint_block.0.bias": torch.zeros(4)}, "a ControlNet"),
])
def test_other_networks_by_their_names(more, message, tmp_path):
    with pytest.raises(WeightError, match=f"a.safetensors looks like {message}"):
        open_checkpoint(save(tmp_path / "a.safetensors", more))


@pytest.mark.parametrize("dtype", [
    torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.complex64])
def test_weights_that_are_no_plain_floats(dtype, tensors, tmp_path):
    name = UNET + "out.2.weight"
    odd = tensors[SMALL] | {name: tensors[SMALL][name].to(dtype)}
    found = open_checkpoint(save(tmp_path / "a.safetensors", odd), config=SMALL)
    with pytest.raises(WeightError, match=f"F64 .save the model in float16.: {name} "):
        check(found, "unet", empty(SMALL)["unet"])
