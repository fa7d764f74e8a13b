"""From a prompt to an image: tokenise, encode, denoise, decode.

    prompt --tokenizer--> ids --text_encoder--> context --.
                                                          v
    seed --> noise x_T --> [ unet + guidance + DDIM step ] x S --> latent x_0 --vae--> image

This is latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752): the UNet denoises
a latent, with 1/8 of the image's height and width, and the VAE turns the result into pixels.
Classifier-free guidance is here, and so is every choice of device, dtype and seed.

B images, H W height and width in pixels, h w of the latent, D width of the context
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn
from tqdm import tqdm

from minisd import arguments, ddim, image as pictures, memory
from minisd.arguments import Request
from minisd.clip import TextEncoder
from minisd.config import Config
from minisd.coverage import coverage
from minisd.latents import MaskBlending, Noise, start
from minisd.ops import Call, choose
from minisd.save import save_model
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.vae import VAE

# (sd, index of the step, timestep, {"latents": x}) -> None, or {"latents": another x}.
Callback = Callable[["StableDiffusion", int, int, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Output:
    """What a call made: the images, and for each its seed and the settings that made it.

    ``images`` is a list of PIL images or, by ``output_type``, a (B, 3, H, W) tensor ("pt") or a
    (B, H, W, 3) array ("np") in [0, 1], or a (B, 4, h, w) tensor of scaled latents ("latent").
    """

    images: list[Image] | Tensor | np.ndarray
    seeds: list[int]
    settings: list[dict]


class StableDiffusion:
    """A text encoder, a UNet and a VAE that were trained together, ready to be called.

    The parts are attributes (config, tokenizer, text_encoder, unet, vae) and work on their own.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, text_encoder: TextEncoder,
                 unet: UNet, vae: VAE):
        self.config, self.tokenizer = config, tokenizer
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.alphas_cumprod = ddim.alphas_cumprod(config.schedule).tolist()

    @memory.explained()
    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        num_images_per_prompt: int = 1, eta: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Image | str | PathLike | None = None,
        mask_image: Image | str | PathLike | None = None, strength: float | None = None,
        output_type: str = "pil", callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
    ) -> Output:
        """Make images, in prompt-major order: all of the first prompt, then of the second.

        ``height`` and ``width`` are pixels, multiples of 8 (of the VAE's downscale). Without them
        the size is the one that the model was trained on, or that of ``image``; with one of them
        the other keeps the proportions of ``image``.
        ``num_inference_steps``, 1 to 1000, is exactly how often the UNet is asked (50).
        ``guidance_scale`` 1 is no guidance (7.5). ``eta`` 0 is DDIM, 1 as noisy as DDPM (0). None
        is always the model's own default.

        ``seed`` 0 to 2^32 - 1: image i uses seed + i; or a list, one each; None draws one.
        ``generator``: torch generators of your own instead. ``latents`` (B, 4, h, w): x_T itself.
        ``prompt_embeds``, ``negative_prompt_embeds`` (prompts, 77, D): contexts instead of text.

        ``image``: start from this image; ``strength`` in (0, 1] is how much of the way from noise
        is walked again (0.8). ``mask_image``: repaint only where it is white (strength 1); an
        inpainting model decodes the rest anew too. Both are resized to height and width.

        ``callback_on_step_end(sd, step, t, {"latents": x})`` may return {"latents": another x}.
        ``progress``: whether to draw a bar; None draws one on a terminal only.
        Raises TypeError or ValueError for a bad argument and ImageError for a bad image, before
        any work; ArithmeticError if a part gives values that are not finite; MemoryError.
        """
        opened = None if image is None else pictures.open_image(image)
        r = arguments.check(
            self.config, prompt, negative_prompt, height, width, num_inference_steps,
            guidance_scale, num_images_per_prompt, eta, seed, generator, latents, prompt_embeds,
            negative_prompt_embeds, opened, mask_image, strength, output_type,
            callback_on_step_end)
        memory.check(self.unet, self.vae, r, opened is not None, output_type != "latent")
        # Half-precision models still add up their steps in float32.
        dtype = torch.promote_types(self.dtype, torch.float32)
        like = torch.empty(1, *r.shape[1:], dtype=dtype, device=self.device)
        pixels = mask = None
        if opened is not None:
            pixels = pictures.to_tensor(opened, r.width, r.height).to(like)   # (1, 3, H, W)
        if mask_image is not None:
            mask = pictures.mask_to_tensor(mask_image, r.width, r.height).to(like)

        context = self._context(r.prompts, prompt_embeds)                    # (prompts, 77, D)
        context = context.repeat_interleave(r.num_images_per_prompt, dim=0)  # (B, 77, D)
        if r.guidance_scale != 1.0:
            # Guidance compares what the UNet says with the prompt and with the negative prompt,
            # or the empty one, so both go through it side by side: a batch of 2B.
            uncond = self._context(r.negative_prompts, negative_prompt_embeds)
            uncond = uncond.repeat_interleave(r.num_images_per_prompt, dim=0)
            context = torch.cat([uncond, context])                           # (2B, 77, D)
        _finite(context, "the text encoder")
        noise = Noise(r.generators, like)
        x, extra, blending = start(
            r, pixels, mask, noise, partial(self._with_vae, "encode"), self.alphas_cumprod)
        x = self._denoise(r, x, context, noise, blending, extra, callback_on_step_end, progress)
        seeds = [g.initial_seed() for g in r.generators]
        return Output(self._images(x, blending, output_type), seeds, r.settings())

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by name."""
        return {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What its weights are stored in."""
        return self._weight.dtype

    def to(self, device: str | torch.device | None = None,
           dtype: str | torch.dtype | None = None) -> "StableDiffusion":
        """Move the model to a device or a dtype, in the words of `minisd.load`; returns itself.

        Its ops are chosen again for the new place. Raises ValueError, before anything is moved,
        where they cannot run or there is no such device.
        """
        place = self.device if device is None else arguments.device(device)
        number = self.dtype if dtype is None else arguments.dtype(dtype, place)
        self._must_be_readable("moved")
        ops = choose(self.unet.ops.name, place, number)
        for part in self.parts.values():
            part.to(place, number)
            for module in part.modules():
                if hasattr(module, "ops"):
                    setattr(module, "ops", ops)
        return self

    def save(self, path: str | PathLike) -> None:
        """Write the model: ``path`` ending in .safetensors is one file in the original layout,
        any other is a new folder in diffusers layout.

        It is written whole or not at all, in the dtype that it has. Raises FileExistsError for a
        name that is taken, and OSError.
        """
        self._must_be_readable("saved")
        save_model(Path(path), self.config, self.tokenizer, self.parts)

    def release(self) -> None:
        """Free what calls have left for the next ones: the CUDA graphs of a fused model."""
        if not isinstance(self.unet, UNet):
            self.unet.graphs.clear()

    def coverage(self, height: int | None = None, width: int | None = None) -> list[Call]:
        """What each attention and GroupNorm of one UNet forward took, and why not a kernel.

        ``height`` and ``width`` are pixels, as in a call; two latents, as with guidance.
        """
        f, usual = self.config.vae.downscale, self.config.sample_size
        height = arguments.side("height", height, f, usual) // f
        width = arguments.side("width", width, f, usual) // f
        return coverage(self.config.unet, self.unet.ops, height, width, self.dtype)

    @property
    def _weight(self) -> Tensor:
        """Any weight: it has the device and the dtype of the model."""
        return self.unet.conv_in.weight

    def _must_be_readable(self, done: str) -> None:
        if not isinstance(self.unet, UNet):
            raise ValueError(f'a model loaded with ops="fused" is not {done}, as its weights are '
                             'repacked: load it with ops="torch" for that')

    def _context(self, texts: list[str] | None, embeds: Tensor | None) -> Tensor:
        """Texts, or the embeddings given instead -> (prompts, 77, D) as the UNet wants it."""
        if texts is not None:
            embeds = self.text_encoder(self._ids(texts).to(self.device))     # (prompts, 77, D)
        assert embeds is not None
        return embeds.to(self._weight)

    def _ids(self, texts: list[str]) -> Tensor:
        """Texts -> (prompts, 77) ids that the text encoder has."""
        tokenizer, text = self.tokenizer, self.config.text
        has = (tokenizer.vocab_size, tokenizer.length)
        room = (text.vocab_size, text.max_position_embeddings)
        if has[0] > room[0] or has[1] > room[1]:
            raise ValueError(f"the tokenizer has (tokens, length) {has}, the text encoder only "
                             f"{room}: load with its own tokenizer, or give prompt_embeds")
        return tokenizer(texts)                                              # (prompts, 77)

    def _denoise(self, r: Request, x: Tensor, context: Tensor, noise: Noise,
                 blending: MaskBlending | None, extra: Tensor | None,
                 callback: Callback | None, progress: bool | None) -> Tensor:
        """Denoise x (B, 4, h, w), a timestep after the other: Stable Diffusion is this loop."""
        # After the last timestep comes the noise level of timestep 0: a little noise is left.
        abars = [self.alphas_cumprod[t] for t in (*r.timesteps, 0)]
        prediction_type = self.config.schedule.prediction_type
        fused = not isinstance(self.unet, UNet)
        if fused:
            from minisd_kernels.fused_step import Steps, weights

            table = weights(abars, prediction_type, r.eta, r.guidance_scale)
            steps = Steps(self.unet, context, r.timesteps, table, extra)
        bar = tqdm(r.timesteps, disable=None if progress is None else not progress)
        for i, t in enumerate(bar):
            added = noise.draw() if r.eta > 0 else None
            if fused:
                x = steps(x, i, added)
            else:
                prediction = self._predict(x, t, context, r.guidance_scale, extra)
                x = ddim.step(
                    x, prediction, abars[i], abars[i + 1], prediction_type, r.eta, added)
            if blending is not None:
                x = blending.latent(x, abars[i + 1] if i + 1 < len(r.timesteps) else 1.0)
            if callback is not None:
                changes = callback(self, i, t, {"latents": x})
                x = arguments.changed_latents(changes, x)
        return _finite(x, "the UNet")

    def _predict(self, x: Tensor, t: int, context: Tensor, guidance_scale: float,
                 extra: Tensor | None = None) -> Tensor:
        """The UNet's prediction for x (B, 4, h, w), with guidance unless its scale is 1."""
        inputs = x if extra is None else torch.cat([x, extra], dim=1)        # (B, 4 or 9, h, w)
        inputs = inputs.repeat(len(context) // len(x), 1, 1, 1)              # (B or 2B, ...)
        times = torch.full((len(inputs),), t, device=x.device)
        prediction = self.unet(inputs.to(self._weight), times, context).to(x)
        if guidance_scale == 1.0:
            return prediction
        # Classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6,
        # where s = 1 + w):  eps = eps_uncond + s (eps_cond - eps_uncond)
        uncond, cond = prediction.chunk(2)                                   # (B, 4, h, w)
        return uncond + guidance_scale * (cond - uncond)

    def _images(self, x: Tensor, blending: MaskBlending | None,
                output_type: str) -> list[Image] | Tensor | np.ndarray:
        """Latents (B, 4, h, w) -> what the caller asked for."""
        if output_type == "latent":
            return x
        # One at a time: it takes less memory, and an image is the same alone or in a batch.
        image = torch.cat([self._with_vae("decode", one) for one in x.split(1)])  # (B, 3, H, W)
        if blending is not None:
            image = blending.pixels(image)
        image = ((image + 1) / 2).clamp(0, 1)                                # (B, 3, H, W)
        if output_type == "np":
            return image.permute(0, 2, 3, 1).cpu().numpy()                   # (B, H, W, 3)
        return image if output_type == "pt" else pictures.to_pil(image)

    def _with_vae(self, method: str, *inputs: Tensor) -> Tensor:
        """``vae.encode`` or ``vae.decode``: in float32 if the model's dtype overflows."""
        out = getattr(self.vae, method)(*(x.to(self._weight) for x in inputs)).to(inputs[0])
        try:
            return _finite(out, "the VAE")
        except ArithmeticError:
            if self.dtype == inputs[0].dtype:
                raise
        # Some published VAEs exceed float16 on some images.
        again = copy.deepcopy(self.vae).to(inputs[0].dtype)
        return _finite(getattr(again, method)(*inputs), "the VAE")


def _finite(x: Tensor, stage: str) -> Tensor:
    if not x.isfinite().all():
        remedy = 'try dtype="float32" or a smaller guidance_scale'
        raise ArithmeticError(f"{stage} gave values that are not finite: {remedy}")
    return x
