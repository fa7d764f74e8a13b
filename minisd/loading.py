"""From a file or folder to a model that can be called."""

from os import PathLike
from typing import NotRequired, TypedDict

import torch

from minisd import checks
from minisd.backends import resolve
from minisd.checkpoints import checkpoint
from minisd.checkpoints.tokenizer_folder import read_tokenizer
from minisd.config import Config
from minisd.models.clip import TextEncoder
from minisd.models.clip_vision import ImageNormalizer, VisionTower
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import Ops
from minisd.models.unet import UNet
from minisd.models.vae import VAE, vae_dtype
from minisd.pipeline import StableDiffusion
from minisd.safety import SafetyChecker
from minisd.text.tokenizer import Tokenizer


def load(
    path: str | PathLike | None = None, *, config: Config | str | PathLike | None = None,
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto",
    ops: str | Ops = "auto", fused: bool | None = None,
    vae: str | PathLike | None = None, prediction_type: str | None = None,
    tile: int | None = None, safety_checker: str | PathLike | None = None,
) -> StableDiffusion:
    """Load a model, never touching the network.

    ``path``: nothing for the model shipped with minisd; a ``.safetensors`` file in the original
    layout; a folder in diffusers layout; or, if `minisd download` has fetched it, a short name
    such as "sd1.5" or an "owner/name".
    ``config``: the sizes, or a folder of diffusers JSON files with them, for a single file of
    unusual sizes. ``vae``: a VAE to use instead: a file, a folder, or a name as above, of a VAE
    alone or of a whole model. ``prediction_type``: "epsilon" or "v_prediction", whatever the file
    says. ``tile``: decode what is larger than this in tiles of this side, in cells of the latent
    (64 is 512 pixels in the official models), to save memory; not exact. The x4 upscaler, whose
    cells are the pixels of the given image, also draws in tiles: take 128 or more, as in its
    training. ``safety_checker``: a folder that `SafetyChecker.load` takes; `Output.nsfw` then tells
    which images it flags.

    ``device`` "auto" is cuda, then mps, then cpu; ``dtype`` "auto" is float16 on a GPU and
    float32 on a CPU. The x4 upscaler's VAE is float32 at least, because it overflows in float16.

    ``ops``, which functions compute attention and norms: "torch", "reference" (the formulas written
    out), "triton" (the GPU kernels, which raise rather than fall back), an `Ops` of your own, or
    "auto": the kernels on a GPU where they are proven, else torch's. ``fused``: whether the steps
    and the decoding run on repacked copies of the UNet and the decoder, which is faster; on a CPU
    the copies take memory. None is True on a GPU where the kernels are proven, else False.
    Hooks of the UNet are not called then. ``ops`` "fused" is short for fused=True with the kernels
    on a GPU, which it needs there, and with torch's functions on a CPU.

    Raises FileNotFoundError, WeightError (naming file and tensor), or ValueError for the rest.
    """
    device = checks.device(device)
    dtype = checks.dtype(dtype, device)
    tile = checks.tile(tile)
    backend = resolve(ops, fused, device, dtype)
    found = checkpoint.open_checkpoint(path, config=config, vae=vae,
                                       prediction_type=prediction_type)
    if found.tokenizer_folder is None:
        tokenizer = Tokenizer.clip(found.config.text.pad_token_id)
    else:
        tokenizer = read_tokenizer(found.tokenizer_folder)
    sd = StableDiffusion(found.config, tokenizer, **build(found.config, backend.ops),
                         backend=backend)
    parts = sd.parts.items()
    for part, module in parts:  # all of them, before any weight is read
        if part in found.parts:
            checkpoint.check(found, part, module)
    if safety_checker is not None:
        sd.safety_checker = SafetyChecker.load(safety_checker, device, dtype)
    for part, module in parts:
        own = vae_dtype(found.config.vae, dtype) if part == "vae" else dtype
        if part in found.parts:
            checkpoint.fill(found, part, module, own, device)
        else:
            module.to(device, own)
        module.eval().requires_grad_(False)
    sd.vae.tile = tile
    return sd


class Parts(TypedDict):
    """The networks of a model."""

    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    depth_estimator: NotRequired[DepthEstimator]
    image_encoder: NotRequired[VisionTower]
    image_normalizer: NotRequired[ImageNormalizer]


def build(config: Config, ops: Ops) -> Parts:
    """The networks of a model without their weights: on torch's "meta" device, no memory used.

    An image_normalizer has values: those of Stable unCLIP H, of which single files hold none.
    """
    with torch.device("meta"):
        parts = Parts(text_encoder=TextEncoder(config.text, ops), unet=UNet(config.unet, ops),
                      vae=VAE(config.vae, ops))
        if config.depth is not None:
            parts["depth_estimator"] = DepthEstimator(config.depth, ops)
        if config.vision is not None:
            parts["image_encoder"] = VisionTower(config.vision, ops)
    if config.normalizer_dim is not None:
        with torch.device("cpu"):
            parts["image_normalizer"] = ImageNormalizer(config.normalizer_dim)
    return parts
