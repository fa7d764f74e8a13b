"""The image tower equals transformers' CLIPVisionModelWithProjection, and reads the same pixels."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from files import manifest
from PIL import Image
from reference_models import (
    VISION,
    error,
    errors_by_module,
    official_safety_checker,
    official_vision_tower,
    randn,
    randomise,
    with_weights,
)
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import minisd
from minisd import images
from minisd.checkpoints import vision_config
from minisd.config import VIT_H, VIT_L
from minisd.models.clip_vision import VisionTower
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.safety import ConceptScores


@pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_module(act, ops, dtype, bound):
    config = replace(VISION, hidden_act=act)
    ours = randomise(VisionTower(config, ops)).to(dtype)
    official = with_weights(official_vision_tower(config), ours)
    pixels = randn(3, 3, 12, 12, dtype=dtype)
    errors = errors_by_module(ours, official, pixels)
    assert len(errors) > 30 and "vision_model.pre_layrnorm" in errors
    assert max(errors.values()) <= bound, max(errors, key=errors.get)
    assert error(ours(pixels), official(pixels).image_embeds) <= bound


@pytest.mark.parametrize("model, official, config, count", [
    (VisionTower, official_vision_tower, VIT_L, 303_966_208),
    (VisionTower, official_vision_tower, VIT_H, 632_076_800),
    (ConceptScores, official_safety_checker, VIT_L, 303_981_588),
], ids=["L", "H", "safety checker"])
def test_names_shapes_and_counts_of_the_official_models(model, official, config, count):
    with torch.device("meta"):
        ours, theirs = model(config, TORCH), official(config)
    shapes = {name: p.shape for name, p in ours.state_dict().items()}
    assert shapes == {name: p.shape for name, p in theirs.state_dict().items()}
    assert sum(shape.numel() for shape in shapes.values()) == count


def test_an_absent_field_is_what_transformers_takes_for_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    theirs = CLIPVisionConfig().to_dict()
    assert asdict(vision_config.read(tmp_path / "config.json")).items() <= theirs.items()


def test_the_published_names_of_the_safety_checker():
    """Its tower has one prefix more there, which transformers 5 reads and does not write."""
    with torch.device("meta"):
        ours = ConceptScores(VIT_L, TORCH).state_dict()
    published = {name.replace("vision_model.vision_model.", "vision_model."): shape
                 for name, shape in manifest("safety_checker").items()}
    assert published == {name: tuple(p.shape) for name, p in ours.items()}
    assert len(published) == 396


# --- the pixels that it reads


def drawing(width, height, channels=3):
    """Noise over a gradient, so that resizing and cutting change every pixel."""
    levels = 40 * randn(height, width, channels) + torch.linspace(0, 255, width)[:, None]
    return Image.fromarray(levels.clamp(0, 255).byte().numpy().squeeze())


@pytest.mark.parametrize("picture", [
    drawing(512, 512), drawing(401, 223), drawing(91, 300), drawing(224, 224), drawing(1, 1),
    drawing(7, 3), drawing(90, 2), drawing(225, 449, 1), drawing(60, 90).quantize(9),
], ids=lambda picture: f"{picture.mode} {picture.width}x{picture.height}")
def test_preprocessing_is_that_of_the_image_processor(picture):
    theirs = CLIPImageProcessorPil()(picture, return_tensors="pt").pixel_values
    ours = images.to_clip(picture)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert error(ours, theirs) <= 3e-7


def test_what_is_transparent_is_white():
    """As wherever minisd reads an image; the image processor takes the colour that is hidden."""
    opaque, clear = drawing(90, 50), Image.new("L", (90, 50), 255)
    clear.paste(0, (10, 10, 60, 30))
    opaque.paste("white", (10, 10, 60, 30))
    hidden = drawing(90, 50)
    hidden.putalpha(clear)
    theirs = CLIPImageProcessorPil()(opaque, return_tensors="pt").pixel_values
    assert error(images.to_clip(hidden), theirs) <= 3e-7


def test_an_absurdly_long_image_is_rejected():
    with pytest.raises(minisd.ImageError, match="image of 2049x1 pixels is too long"):
        images.to_clip(Image.new("L", (2049, 1)))
    assert images.to_clip(Image.new("L", (2048, 1)), 4).shape == (1, 3, 4, 4)


# --- pixels that are no image yet


def test_pixels_are_rounded_to_8_bits():
    pixels = randn(2, 3, 4, 6, dtype=torch.float32).sigmoid()
    array = pixels.permute(0, 2, 3, 1).numpy()
    flipped = array[:, ::-1].copy()[:, ::-1]  # a negative stride, and another order of bytes
    for given in (pixels, array, pixels.double(), flipped, array.astype(">f4")):
        levels = [torch.tensor(np.array(image)).permute(2, 0, 1)
                  for image in images.open_images(given)]
        assert torch.equal(torch.stack(levels), (255 * pixels).round().byte())


@pytest.mark.parametrize("given, kind, words", [
    (torch.zeros(3, 8, 8), minisd.ImageError, r"not of shape \(3, 8, 8\)"),
    (torch.zeros(1, 8, 8, 3), minisd.ImageError, r"tensor \(B, 3, H, W\) or an array"),
    (np.zeros((1, 3, 8, 8)), minisd.ImageError, r"not of shape \(1, 3, 8, 8\)"),
    (np.zeros(()), minisd.ImageError, r"not of shape \(\)"),
    (torch.zeros(0, 3, 8, 8), minisd.ImageError, "not of shape"),
    (torch.full((1, 3, 8, 8), 1.01), minisd.ImageError, "from 0 to 1, and some are not"),
    (torch.full((1, 3, 8, 8), float("nan")), minisd.ImageError, "from 0 to 1, and some are not"),
    (np.zeros((1, 8, 8, 3), np.uint8), TypeError, "floats from 0 to 1, not uint8"),
    (np.array([None]), TypeError, "floats from 0 to 1, not object"),
    (3, TypeError, "an image is a path or a PIL image, not int"),
    ([torch.zeros(3, 8, 8)], TypeError, "not Tensor"),
    (["https://example.org/a.png"], minisd.ImageError, "is an address"),
])
def test_what_are_no_images_is_rejected(given, kind, words):
    with pytest.raises(kind, match=words):
        images.open_images(given)
