"""The depth estimator equals transformers' DPT-hybrid, and MiDaS where that differs from it."""

import pytest
import torch
from midas import depth as midas_depth
from reference_models import (
    DEPTH,
    error,
    errors_by_module,
    official_depth,
    official_dpt,
    randn,
    randomise,
    with_weights,
)

from minisd.checkpoints import names_depth
from minisd.config import DPTConfig
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import REFERENCE, TORCH

PAIR = pytest.mark.parametrize("ops", [REFERENCE, TORCH], ids=["reference", "torch"])
SIZES = pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 32), (64, 160)])


def estimator(ops=TORCH, dtype=torch.float64):
    return randomise(DepthEstimator(DEPTH, ops)).to(dtype)


@PAIR
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_every_module(ops, dtype, bound):
    ours = estimator(ops, dtype)
    official = with_weights(official_dpt(DEPTH), ours)
    image = randn(2, 3, 64, 64, dtype=dtype)
    errors = errors_by_module(ours, official, image)
    assert len(errors) > 80 and {"head.head.0", "neck.convs.3"} < set(errors)
    assert max(errors.values()) <= bound, max(errors, key=errors.get)
    depth = official(image).predicted_depth
    assert error(ours(image), depth) <= bound * depth.std()


@SIZES
def test_any_size(size):
    """transformers' class is told the size; MiDaS takes any."""
    ours, image = estimator(), randn(2, 3, *size).tanh()
    depth = ours(image)
    assert depth.shape == (2, *size) and depth.std() > 0.1
    official = with_weights(official_dpt(DEPTH), ours)
    assert error(depth, official_depth(official, image)) <= 1e-10 * depth.std()
    tensors = dict(ours.state_dict())
    stacked = {name: torch.cat([tensors[p] for p in parameters])
               for name, parameters in names_depth.depth(DEPTH).items() if parameters[0] in tensors}
    assert error(depth, midas_depth(stacked, image, DEPTH)) <= 1e-10 * depth.std()


def test_faults_of_transformers():
    """It refuses other sizes than one square; its default eps is not that of MiDaS."""
    ours = estimator()
    with pytest.raises(ValueError, match="Input image size"):
        official_dpt(DEPTH).double()(randn(1, 3, 64, 96))
    image = randn(1, 3, 64, 64)
    for embedded in (ours.dpt.embeddings.projection.weight, ours.dpt.embeddings.projection.bias,
                     ours.dpt.embeddings.position_embeddings, ours.dpt.embeddings.cls_token):
        embedded.mul_(0.01)  # where tokens are small, eps counts
    default = with_weights(official_dpt(DEPTH, layer_norm_eps=1e-12), ours)
    assert type(default.config)().layer_norm_eps == 1e-12
    assert error(ours(image), default(image).predicted_depth) > 1e-5


def test_the_official_size():
    with torch.device("meta"):
        ours, official = DepthEstimator(DPTConfig(), TORCH), official_dpt(DPTConfig())
        assert ours(torch.zeros(1, 3, 384, 576)).shape == (1, 384, 576)
    shapes, theirs = ({name: p.shape for name, p in model.state_dict().items()}
                      for model in (ours, official))
    assert shapes == theirs
    assert sum(p.numel() for p in ours.parameters()) == 122_377_985


def test_what_the_files_hold_and_nothing_reads():
    ours, image = estimator(), randn(1, 3, 32, 64)
    depth = ours(image)
    for unused in (ours.dpt.layernorm, ours.neck.fusion_stage.layers[0].residual_layer1):
        for parameter in unused.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(ours(image), depth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_answers_in_the_dtype_of_the_image(dtype):
    image = randn(1, 3, 32, 64).tanh()
    depth = estimator()(image)
    half = estimator(dtype=dtype)(image)
    assert half.dtype == torch.float64
    assert error(half, depth) < 0.2 * depth.std()


@pytest.mark.parametrize("size", [(32, 48), (31, 64), (16, 16)])
def test_sides_are_multiples_of_32(size):
    with pytest.raises(ValueError, match=f"multiples of 32 pixels, not {size[1]}x{size[0]}"):
        estimator()(randn(1, 3, *size))
