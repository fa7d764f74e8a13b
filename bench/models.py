"""The models that are timed, and minisd as a provider.

Full sizes have random weights, so that nothing is downloaded: time and memory do not depend on the
values. All providers get copies of the same weights.

B images, H W height and width in pixels, h w of the latent, D width of the context
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from minisd_kernels.fused import steps as fused_step
from torch import Tensor, nn

import minisd
from minisd.backends import resolve
from minisd.config import SD1, SD2_V, Config
from minisd.loading import build
from minisd.models.ops import TORCH
from minisd.pipeline import StableDiffusion
from minisd.steps import Steps
from minisd.text.tokenizer import Tokenizer

PROMPT = "a red heart on a blue background"
GUIDANCE = 7.5
Weights = dict[str, dict[str, Tensor]]  # by part, then by parameter

# Stable Diffusion 1 at a quarter of its widths, with heads of the same width: for a CPU.
QUARTER = replace(
    SD1, name="quarter", sample_size=192,
    text=replace(SD1.text, hidden_size=192, intermediate_size=768, num_attention_heads=4),
    unet=replace(SD1.unet, block_out_channels=(80, 160, 320, 320), num_heads=(2, 2, 2, 2),
                 cross_attention_dim=192, norm_num_groups=16),
    vae=replace(SD1.vae, block_out_channels=(32, 64, 128, 128)),
)


@dataclass(frozen=True)
class Model:
    """A config and the number of ``steps``; its weights are random unless it is ``shipped``."""

    name: str
    config: Config
    tokenizer: Tokenizer
    steps: int
    shipped: StableDiffusion | None = None

    @property
    def side(self) -> int:
        """Of the latent."""
        return self.config.sample_size // self.config.vae.downscale

    def weights(self, device: torch.device, dtype: torch.dtype) -> Weights:
        """Those of the shipped model; or random ones that keep the scale of activations."""
        if self.shipped:
            return {part: {name: p.to(device, dtype) for name, p in module.state_dict().items()}
                    for part, module in self.shipped.parts.items()}
        generator = torch.Generator(device).manual_seed(0)
        return {part: {name: random(name, p.shape, generator, dtype)
                       for name, p in module.state_dict().items()}
                for part, module in build(self.config, TORCH).items()}

    def noise(self, batch: int) -> Tensor:
        """x_T (B, 4, h, w), float32 on the CPU."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(batch, self.config.vae.latent_channels, self.side, self.side,
                           generator=generator)


def shipped(steps: int) -> Model:
    sd = minisd.load(device="cpu")
    return Model("tiny", sd.config, sd.tokenizer, steps, sd)


def full(name: str, config: Config, steps: int) -> Model:
    return Model(name, config, Tokenizer.clip(config.text.pad_token_id), steps)


def standard(quick: bool) -> dict[str, Callable[[], Model]]:
    """By name, the most important first."""
    if quick:
        return {"tiny": lambda: shipped(20), "quarter": lambda: full("quarter", QUARTER, 2)}
    return {"SD1.5-512": lambda: full("SD1.5-512", SD1, 50), "tiny": lambda: shipped(20),
            "SD2.1-768": lambda: full("SD2.1-768", SD2_V, 50)}


def random(name: str, shape: torch.Size, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=generator, device=generator.device)
    if len(shape) > 1:
        x /= shape[1:].numel() ** 0.5
    else:
        x = 0.1 * x + ("norm" in name and name.endswith("weight"))
    return x.to(dtype)


def with_copies(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module, on the meta device so far, with its own copies of the weights."""
    copies = {name: p.clone() for name, p in weights.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class Ours:
    """minisd with the ops of that name. Raises ValueError if they do not run on the device."""

    def __init__(self, model: Model, weights: Weights, name: str, device: torch.device):
        self.model, self.device = model, device
        backend = resolve(name, None, device, next(iter(weights["unet"].values())).dtype)
        parts = {part: with_copies(module, weights[part])
                 for part, module in build(model.config, backend.ops).items()}
        self.sd = StableDiffusion(model.config, model.tokenizer, **parts, backend=backend)

    def image(self, batch: int, steps: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]: text encoder, all the steps, decoder."""
        size = self.model.config.sample_size
        return self.sd(PROMPT, num_images_per_prompt=batch, num_inference_steps=steps,
                       latents=self.model.noise(batch), guidance_scale=GUIDANCE, height=size,
                       width=size, output_type="pt", progress=False).images

    def step(self) -> Callable[[], Tensor]:
        """One prediction with guidance (1, 4, h, w)."""
        context = self.sd._context(["", PROMPT], None)                      # (2, 77, D)
        x = self.model.noise(1).to(self.device, torch.promote_types(context.dtype, torch.float32))
        if fused := self.sd._fused():
            # uncond + GUIDANCE (cond - uncond), and no x: the prediction itself.
            steps = fused_step.Steps(
                fused.unet, context, [500], [[0.0, 1.0 - GUIDANCE, GUIDANCE]])
            return lambda: steps(x, 0)
        readable = Steps(self.sd.unet, context, None, [500], [], "epsilon", GUIDANCE, 0.0)
        return lambda: readable.predict(x, 500)

    def decode(self) -> Callable[[], Tensor]:
        """(1, 3, H, W), about [-1, 1]."""
        latent, fused = self.model.noise(1).to(self.sd._weight), self.sd._fused()
        return lambda: self.sd.vae.decode(latent, fused.decoder if fused else None)

    def release(self) -> None:
        """Free the CUDA graphs."""
        if fused := self.sd._fused():
            fused.unet.graphs.clear()
