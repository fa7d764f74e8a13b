"""torch.set_default_device is for the caller's tensors: minisd's are where the model is."""

import numpy as np
import pytest
import torch
from PIL import Image

import minisd
from minisd.samplers import schedule

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
MASK = Image.new("L", (32, 32), 255)
CALLS = {
    "text to image": {},
    "image to image": dict(image=IMAGE),
    "inpainting": dict(image=IMAGE, mask_image=MASK, eta=1.0),
    "an array": dict(output_type="np"),
    "without guidance": dict(guidance_scale=1),
}
LOADS = {"torch": dict(ops="torch"), "reference": dict(ops="reference"), "fused": dict(fused=True)}


def images(load: dict, folder) -> list[np.ndarray]:
    sd = minisd.load(device="cpu", **load)
    call = dict(num_inference_steps=2, seed=1, height=32, width=32, progress=False)
    calls = CALLS if "torch" in load.values() else ["inpainting", "without guidance"]
    found = [np.asarray(sd("a red heart", **call | CALLS[name]).images[0]) for name in calls]
    sd.save(folder)
    again = minisd.load(folder, device="cpu", **load)
    assert all(step.took for step in again.coverage(32, 32))
    return [*found, np.asarray(again("a red heart", **call).images[0])]


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_all_is_the_same_whatever_the_default_device(load, tmp_path):
    """"meta" is a device without data: whatever lands there by chance is lost."""
    want = images(load, tmp_path / "a")
    before = torch.get_default_device()
    try:
        torch.set_default_device("meta")
        found = images(load, tmp_path / "b")
    finally:
        torch.set_default_device(before)
    assert all(np.array_equal(*pair) for pair in zip(found, want, strict=True))


def test_each_part_by_itself():
    sd = minisd.load(device="cpu")
    ids = sd.tokenizer(["a red heart"])
    want = (ids, sd.text_encoder(ids), schedule.alphas_cumprod(sd.config.schedule))
    with torch.device("meta"):
        ids = sd.tokenizer(["a red heart"])
        found = (ids, sd.text_encoder(ids), schedule.alphas_cumprod(sd.config.schedule))
    assert all(torch.equal(*pair) for pair in zip(found, want))
