"""Small models of minisd with random weights, and the difference of two results.

They need neither diffusers nor transformers, which may be missing where the kernels are tested.
"""

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from minisd.backends import Backend
from minisd.config import (
    X4_UPSCALER,
    Config,
    DPTConfig,
    ScheduleConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from minisd.models.clip import TextEncoder
from minisd.models.clip_vision import ImageNormalizer, VisionTower
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import TORCH, Ops
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.pipeline import StableDiffusion
from minisd.text.tokenizer import Tokenizer

# The shapes of the official models at a hundredth of the size. All sizes differ, so that swapping
# two widths, heads or contexts changes the result.
TEXT = TextConfig(
    vocab_size=49408, hidden_size=20, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4,
)
DENOISER = UNetConfig(
    block_out_channels=(16, 24, 40), has_attention=(True, True, False), num_heads=(2, 3, 5),
    cross_attention_dim=20, norm_num_groups=4,
)
VISION = VisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    image_size=12, patch_size=4, projection_dim=16,
)
AUTOENCODER = VAEConfig(block_out_channels=(16, 24, 40), norm_num_groups=4)
DEPTH = DPTConfig(
    embedding_size=12, hidden_sizes=(32, 64, 96), depths=(1, 2, 2), norm_num_groups=4,
    hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    out_indices=(0, 2), image_size=64, fusion_hidden_size=10,
)
SMALL = Config("small", TEXT, DENOISER, AUTOENCODER, sample_size=64)
SMALL_V = replace(
    SMALL,
    text=replace(TEXT, hidden_act="gelu", pad_token_id=0),
    unet=replace(DENOISER, use_linear_projection=True, num_heads=(4, 6, 10)),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
)
SMALL_DEPTH = replace(SMALL, unet=replace(DENOISER, in_channels=5), depth=DEPTH)
SMALL_UNCLIP = replace(
    SMALL_V,
    unet=replace(SMALL_V.unet, projection_class_embeddings_input_dim=2 * VISION.projection_dim),
    vision=replace(VISION, hidden_act="gelu"), normalizer_dim=VISION.projection_dim,
    max_noise_level=999, num_inference_steps=20, guidance_scale=10.0,
)
# Zero terminal SNR, with the spacing that it needs.
SMALL_ZERO = replace(SMALL_V, schedule=replace(
    SMALL_V.schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
# Where the context is as wide as a level, weights of only_cross_attention fit without it too.
SMALL_X4 = replace(
    X4_UPSCALER, name="small x4", text=SMALL_V.text, sample_size=64,
    unet=replace(
        X4_UPSCALER.unet, block_out_channels=(16, 20, 24, 40), num_heads=(2, 4, 3, 5),
        cross_attention_dim=20, norm_num_groups=4),
    vae=replace(X4_UPSCALER.vae, block_out_channels=(16, 24, 40), norm_num_groups=4),
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal noise that depends only on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter, in float64: new norms are all equal, and would hide a swap."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() > 1:
            p.copy_(noise / (2 * p[0].numel()) ** 0.5)
        else:
            p.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model


@cache
def small_model(config: Config, ops: Ops = TORCH) -> StableDiffusion:
    """A whole model of minisd with random weights, in float64."""
    more = {}
    if config.depth is not None:
        more["depth_estimator"] = randomise(DepthEstimator(config.depth, ops))
    if config.vision is not None:
        more["image_encoder"] = randomise(VisionTower(config.vision, ops), 4)
        more["image_normalizer"] = randomise(ImageNormalizer(config.vision.projection_dim), 5)
        more["image_normalizer"].std.exp_()
    return StableDiffusion(
        config, Tokenizer.clip(config.text.pad_token_id),
        text_encoder=randomise(TextEncoder(config.text, ops), 1),
        unet=randomise(UNet(config.unet, ops), 2), vae=randomise(VAE(config.vae, ops), 3),
        backend=Backend(ops, asked=(ops, False)), **more,
    )


def error(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; infinity if shapes differ or a value is not finite."""
    if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return (a.double() - b.double()).abs().max().item()
