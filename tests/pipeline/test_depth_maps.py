"""Depth maps: what a caller may give, what is rejected, and what the UNet is shown of it."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference_models import DEPTH, error, randn, randomise

from minisd.depth_maps import normalised, open_depth_map, prepared
from minisd.errors import ImageError
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import TORCH

LEVELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
GREY = Image.fromarray(LEVELS)
DEEP = LEVELS.astype(np.uint16) * 250 + 7
REAL = LEVELS.astype(np.float32) / 3 - 11
WHOLE = LEVELS.astype(np.int32) * 1000 - 5


@pytest.mark.parametrize("image, want", [
    (GREY, LEVELS), (Image.fromarray(DEEP), DEEP), (Image.fromarray(REAL), REAL),
    (Image.fromarray(WHOLE), WHOLE), (Image.fromarray(DEEP.astype(">u2")), DEEP),
    (Image.fromarray(LEVELS > 90), (LEVELS > 90) * 255),
    *((GREY.convert(mode), LEVELS) for mode in ("RGB", "RGBA", "LA", "P")),
], ids=lambda value: getattr(value, "mode", ""))
def test_images(image, want):
    depth = open_depth_map(image)
    assert depth.dtype == torch.float32 and depth.shape == (1, 3, 4)
    assert np.array_equal(depth[0].numpy(), want)


@pytest.mark.parametrize("name, values", [
    ("8.png", LEVELS), ("16.png", DEEP), ("16.tiff", DEEP), ("float.tiff", REAL),
    ("32.tiff", WHOLE), ("8.webp", LEVELS), ("16.pgm", DEEP),
])
def test_files(name, values, tmp_path):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(values).save(tmp_path / name, **lossless)
    assert np.array_equal(open_depth_map(tmp_path / name)[0].numpy(), values)
    assert np.array_equal(open_depth_map(str(tmp_path / name))[0].numpy(), values)


@pytest.mark.parametrize("values", [LEVELS, DEEP])
def test_a_file_is_turned_upright(values, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_depth_map(tmp_path / "a.png")[0].numpy(), np.rot90(values, -1))


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7), (1, 5, 7), (2, 1, 5, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("dtype", [
    "bool", "uint8", "int16", "uint16", "int64", "float16", "float32", "float64", ">f4", ">f8"])
def test_arrays_and_tensors(shape, dtype):
    array = (100 * randn(*shape).abs().numpy()).astype(dtype)
    want = torch.from_numpy(array.astype("float64")).reshape(-1, *shape[-2:])
    kinds = [array, array[..., ::-1][..., ::-1]]
    if dtype.isalnum():
        kinds.append(torch.from_numpy(array))
    for given in kinds:
        depth = open_depth_map(given)
        wide = dtype in ("float64", ">f8")
        assert depth.dtype == (torch.float64 if wide else torch.float32)
        assert error(depth, want) == 0


def test_a_tensor_that_wants_gradients_and_one_of_bfloat16():
    with torch.enable_grad():
        given = torch.ones(2, 3, requires_grad=True)
        assert not open_depth_map(given).requires_grad
    assert open_depth_map(given.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("given", [
    None, 3, [[1.0, 2.0]], b"depth", np.float64(1), np.zeros((2, 2), complex),
    np.array([["a"]]), np.array([[None]]), torch.zeros(2, 2, dtype=torch.complex64),
], ids=lambda given: type(given).__name__)
def test_other_things_are_a_type_error(given):
    with pytest.raises(TypeError, match="^a depth map is a path, a PIL image, or an array or a te"):
        open_depth_map(given)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4, 4), (1, 1, 1, 4, 4), (0, 4), (0, 3, 4)])
def test_other_shapes_are_a_value_error(shape):
    for given in (np.zeros(shape), torch.zeros(shape)):
        with pytest.raises(ValueError, match=r"^a depth map has the shape \(H, W\), \(B, H, W\)"):
            open_depth_map(given)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_values_that_are_not_finite(value):
    array = np.full((2, 2), value)
    with np.errstate(over="ignore"):
        image = Image.fromarray(array.astype(np.float32))
    for given in (array, torch.from_numpy(array), image):
        with pytest.raises(ValueError, match="not finite"):
            open_depth_map(given)


def test_colours_are_rejected(tmp_path):
    path = tmp_path / "turbo.png"
    Image.new("RGB", (2, 2), (10, 10, 11)).save(path)
    with pytest.raises(ImageError, match=r"^\S+turbo\.png has colours: turn it grey first$"):
        open_depth_map(path)
    with pytest.raises(ImageError, match="^the depth map has colours"):
        open_depth_map(Image.open(path))


def test_files_that_are_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"depth")
    with pytest.raises(ImageError, match="is not an image"):
        open_depth_map(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        open_depth_map(tmp_path / "b.png")
    with pytest.raises(ImageError, match="is an address"):
        open_depth_map("https://example.org/depth.png")
    with pytest.raises(ImageError, match="no pixels"):
        open_depth_map(Image.new("F", (0, 3)))


# --- what the UNet is shown -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (3, 5), (20, 30), (1, 2)])
def test_each_map_spans_the_whole_range(size):
    cells = normalised(torch.stack([randn(9, 14), 1e4 + randn(9, 14, seed=1)]), size)
    assert cells.shape == (2, 1, *size)
    assert (cells.amin((1, 2, 3)) == -1).all() and (cells.amax((1, 2, 3)) == 1).all()


def test_scale_and_shift_do_not_matter():
    depth = randn(2, 9, 14)
    for scale, shift in ((1e-30, 0), (1e37, 0), (0.01, 5)):
        assert error(normalised(scale * depth + shift, (4, 6)), normalised(depth, (4, 6))) < 1e-10
    assert error(normalised(-depth, (4, 6)), -normalised(depth, (4, 6))) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_dtype_is_too_narrow(dtype):
    depth = randn(1, 9, 14, dtype=dtype)
    assert error(normalised(depth, (4, 6)), normalised(depth.double(), (4, 6))) == 0
    largest = torch.finfo(dtype).max * depth.sign()
    assert normalised(largest, (4, 6)).isfinite().all()


def spike(value):
    """A map that is the same in every pixel that bicubic interpolation to 2x2 reads."""
    depth = torch.full((1, 64, 64), value, dtype=torch.float64)
    depth[0, 0, 0] = 0
    return depth


@pytest.mark.parametrize("depth", [
    torch.zeros(1, 8, 8), torch.full((1, 9, 7), 0.1), torch.full((1, 9, 7), 1e9 + 0.1), spike(0.1),
    torch.stack([randn(8, 8), torch.ones(8, 8)]), torch.rand(1, 1, 1),
], ids=["zero", "tenth", "large", "skipped", "one of two", "one pixel"])
def test_a_constant_map_is_rejected(depth):
    with pytest.raises(ValueError, match="^the depth is the same everywhere in the latent's "):
        normalised(depth, (2, 2))


def test_one_cell_has_no_range():
    with pytest.raises(ValueError, match="1x1 cells"):
        normalised(randn(1, 8, 8), (1, 1))


# --- what the estimator is shown ------------------------------------------------------------------


@pytest.mark.parametrize("given, read", [
    ((512, 512), (384, 384)), ((768, 512), (576, 384)), ((640, 480), (512, 384)),
    ((480, 640), (384, 512)), ((64, 64), (384, 384)), ((400, 384), (384, 384)),
    ((8192, 64), (384, 32)), ((3, 4000), (32, 384)), ((1, 1), (384, 384)),
])
def test_the_sides_that_the_estimator_reads(given, read):
    x = prepared(Image.new("RGB", given, (0, 51, 255)))
    assert x.dtype == torch.float32 and x.shape == (1, 3, *read[::-1])
    assert x.amax((2, 3)).tolist() == x.amin((2, 3)).tolist() == [
        pytest.approx([-1, -0.6, 1], abs=1e-6)]


def test_from_an_image_to_what_the_unet_is_shown():
    noise = Image.fromarray((255 * randn(30, 20, 3).sigmoid()).byte().numpy())
    estimator = randomise(DepthEstimator(DEPTH, TORCH)).float()
    cells = normalised(estimator(prepared(noise)), (6, 4))
    assert cells.shape == (1, 1, 6, 4) and cells.dtype == torch.float64
