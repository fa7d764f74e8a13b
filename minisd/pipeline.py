"""From a prompt to an image: tokenise, encode, denoise, decode.

    prompt --tokenizer--> ids --text_encoder--> context --.
                                                          v
    seed --> noise x_T --> [ unet + guidance + step ] x S --> latent x_0 --vae--> image

This is latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752): the UNet denoises
a latent, officially of 1/8 of the image's height and width; the VAE turns it into pixels.
Classifier-free guidance is here, and so is every choice of device, dtype and seed.

B images, H W height and width in pixels, h w of the latent, D width of the context
"""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from minisd import backends, checks, errors, images, memory, pixels, tensors
from minisd.backends import Backend, Call, Repacked, coverage
from minisd.checkpoints.save import save_model
from minisd.conditioning import start
from minisd.conditioning.start import Given, Keep, Noise
from minisd.config import Config
from minisd.depth_maps import prepared
from minisd.models.clip import TextEncoder
from minisd.models.clip_vision import ImageNormalizer, VisionTower
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import REFERENCE, TORCH
from minisd.models.tiles import tiled_unet
from minisd.models.unet import UNet, guidance_embedding
from minisd.models.vae import VAE, vae_dtype
from minisd.output import Output, Step
from minisd.progress import counted
from minisd.request import Callback, Maps, Picture, Plan, Prompts, Request
from minisd.steps import Steps, first_state
from minisd.text.tokenizer import Tokenizer

UNET_REMEDY = ": try dtype float32 (--dtype) or a smaller guidance_scale (--guidance)"


class StableDiffusion:
    """A text encoder, a UNet and a VAE that were trained together, ready to be called.

    The parts are attributes (config, tokenizer, text_encoder, unet, vae) and work on their own.
    ``depth_estimator`` is None but in a depth model; ``image_encoder`` and ``image_normalizer`` are
    None but in an unCLIP model. ``safety_checker`` is None, or what tells for each of a call's
    images whether it is flagged.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, text_encoder: TextEncoder,
                 unet: UNet, vae: VAE, backend: Backend = Backend(TORCH),
                 depth_estimator: DepthEstimator | None = None,
                 image_encoder: VisionTower | None = None,
                 image_normalizer: ImageNormalizer | None = None):
        self.config, self.tokenizer, self.backend = config, tokenizer, backend
        self.safety_checker: Callable[..., list[bool]] | None = None
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.depth_estimator = depth_estimator
        self.image_encoder, self.image_normalizer = image_encoder, image_normalizer
        self._loaded = (unet, vae, vae.decoder)
        self._repacked = Repacked()

    def __call__(
        self, prompt: Prompts = None, *, negative_prompt: Prompts = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int | None = None, guidance_scale: float | None = None,
        guidance_rescale: float = 0.0, num_images_per_prompt: int = 1,
        sampler: str | None = None, spacing: str | None = None, eta: float | None = None,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Picture = None, mask_image: Picture = None, strength: float | None = None,
        depth_map: Maps = None, noise_level: int | None = None,
        image_embeds: Tensor | None = None,
        output_type: str = "pil", callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
    ) -> Output:
        """Make images, in prompt-major order: all of the first prompt, then of the second.

        ``height`` and ``width`` are pixels, multiples of 8 (of the VAE's downscale). Without them
        the size is the one that the model was trained on, or that of an ``image`` to start from
        (scaled down where it is far larger); with one the other keeps the image's proportions.
        ``num_inference_steps``, 1 to 1000, is how many steps the sampler's ladder has (50). That is
        how often the UNet is asked, but by plms once more, and by heun, dpm2 and dpmpp_2s, which
        ask twice a step, 2 S - 1 times. ``guidance_scale`` 1 is no guidance (7.5);
        ``guidance_rescale``, 0.7 for models of zero terminal SNR, takes back a share of what
        guidance adds to the prediction's contrast. None is always the model's own default.

        ``sampler``: ddim, euler, euler_a, ddpm, dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, unipc, heun, lms,
        plms, dpm2, lcm or tcd, or a name of AUTOMATIC1111's web UI ("DPM++ 2M Karras"), which says
        the spacing too. ``spacing``, which timesteps are visited: leading, trailing, linspace,
        karras, exponential or lcm. ``eta``, of those that can add noise, from 0 to 1: none, or as
        much as DDPM.

        ``seed`` 0 to 2^32 - 1: image i uses seed + i; or a list, one each; None draws one.
        ``generator``: torch generators of your own instead. ``latents`` (B, 4, h, w): x_T itself.
        ``prompt_embeds``, ``negative_prompt_embeds`` (prompts, 77, D): contexts instead of text.

        ``image``: start from this image; ``strength`` in (0, 1] is how much of the way from noise
        is walked again (0.8). ``mask_image``: repaint only where it is light and not transparent
        (strength 1); an inpainting model decodes the rest anew too. Both are resized to height and
        width. A mask that repaints nothing, as it is thinner than a latent's cell, is warned of.

        ``depth_map``, for a depth model: how near what is drawn is, larger is nearer, in any range
        and size: a path, an image in grey, or an array or a tensor of one map or of one for each
        image; alone, or with an ``image`` to start from. If it is not given, the method
        ``depth_map`` makes it of ``image``. An upscaling model makes ``image`` 4 times
        as wide and high; ``noise_level``, 0 to 350, is how much of its detail may be redrawn (20).
        An unCLIP model draws variations of ``image``, also without a prompt; ``noise_level``, 0 to
        999, is how far they may be from it (0). ``image_embeds`` instead: what `vision` makes of
        images, or a mixture of that, (D,), or one row for each prompt or image.

        ``callback_on_step_end(sd, step, t, {"latents": x})`` may return {"latents": another x}.
        ``progress``: whether to draw a bar; None draws one on a terminal only.
        Raises TypeError or ValueError for a bad argument and ImageError for a bad image, before
        any work; ArithmeticError if a part gives values that are not finite; MemoryError.
        """
        asked = Request(**{name: value for name, value in locals().items() if name != "self"})
        for step in self._stream(self._plan(asked)):
            pass
        return step.output()

    def stream(self, prompt: Prompts = None, **arguments: Any) -> Iterator[Step]:
        """The same call, with the same arguments, as a generator of its steps.

        Each has ``i``, ``t``, ``latents`` and ``x0`` (B, 4, h, w), and ``output()``: the images
        that x_0 is so far and, after the last step, what the call returns. Who leaves the loop
        stops the call, and nothing of it is kept. Arguments are checked at once.
        """
        return self._stream(self._plan(Request(prompt=prompt, **arguments)))

    def _plan(self, asked: Request) -> Plan:
        """What a request means for this model, which it fits."""
        r = asked.plan(self.config)
        if self.config.normalizer_dim is not None and self.image_normalizer is None:
            raise ValueError("the model's image_normalizer was taken away")
        for sentence in r.warnings:
            errors.warn(sentence)
        memory.check(r, self.dtype, self.device, self.vae, encodes=r.strength is not None,
                     decodes=r.output_type != "latent",
                     stores_scores=self.backend.ops.attention is REFERENCE.attention)
        return r

    @torch.no_grad()
    def _stream(self, r: Plan) -> Iterator[Step]:
        with memory.explained():
            yield from self._denoise(r)

    def _denoise(self, r: Plan) -> Iterator[Step]:
        """From noise to a latent, a call of the UNet after the other: Stable Diffusion is this."""
        # Half-precision models still add up their steps in float32.
        dtype = torch.promote_types(self.dtype, torch.float32)
        like = torch.empty(1, *r.shape[1:], dtype=dtype, device=self.device)
        context = self._context(r.prompts, r.prompt_embeds)                  # (prompts, 77, D)
        context = context.repeat_interleave(r.num_images_per_prompt, dim=0)  # (B, 77, D)
        if r.guided:  # classifier-free guidance needs both, see steps.py
            uncond = self._context(r.negative_prompts, r.negative_prompt_embeds)
            uncond = uncond.repeat_interleave(r.num_images_per_prompt, dim=0)
            context = torch.cat([uncond, context])                           # (2B, 77, D)
        errors.finite(context, "the text encoder")
        noise = Noise(r.generators, like)
        x, extra, keep, class_vector = start(Given(
            r, noise, partial(pixels.encode, self.vae), self.depth_map, self.vision,
            self.image_normalizer))
        unet: Callable[..., Tensor] = self.unet
        fused, tile = self._fused(), self.vae.tile
        if r.config.unet_in_tiles and tile is not None and max(r.shape[2:]) > tile:
            unet, fused = tiled_unet(fused.unet if fused else unet, tile, r.shape[1]), None
        readable = Steps(
            unet, context, extra, r.sampler, self.config.schedule.prediction_type,
            r.guidance_scale if r.guided else 1.0, r.guidance_rescale,
            self._told(r, class_vector))
        steps: Callable[..., Tensor] = readable
        if fused:
            steps = fused.steps(readable)

        draws, shown = readable.draws, r.sampler.shown
        state = first_state(r.sampler, x)                                    # (K + 1, B, 4, h, w)
        for i in counted(range(r.sampler.calls), r.progress):
            state = steps(state, i, noise.draw() if draws[i] else None)
            last = i + 1 == r.sampler.calls
            if keep is not None:
                state[0] = keep.latent(state[0], 1.0 if last else shown[i + 1].abar)
            if r.callback_on_step_end is not None:
                changes = r.callback_on_step_end(self, i, shown[i].t, {"latents": state[0]})
                state[0] = tensors.changed_latents(changes, state[0])
            x, x0 = state[0], state[-1]
            best = errors.finite(x, "the UNet", UNET_REMEDY) if last else x0
            yield Step(i, shown[i].t, x, x0, partial(self._output, r, best, keep))

    def _output(self, r: Plan, x: Tensor, keep: Keep | None) -> Output:
        made, nsfw = self._images(x, keep, r.output_type), None
        if self.safety_checker is not None and r.output_type != "latent":
            nsfw = list(self.safety_checker(made))
            if len(nsfw) != len(made):
                raise ValueError(f"safety_checker must give {len(made)} flags, one for each image, "
                                 f"not {len(nsfw)}")
        return Output(made, r.seeds, r.settings(), nsfw)

    def _told(self, r: Plan, class_vector: Tensor | None) -> dict[str, Tensor]:
        """What the UNet is told besides x, t and the context."""
        told = {} if class_vector is None else {"class_vector": class_vector}
        if (width := self.config.unet.time_cond_proj_dim) is not None:
            told["timestep_cond"] = guidance_embedding(r.guidance_scale, width).to(self.device)
        return told

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks, by name."""
        parts = {"text_encoder": self.text_encoder, "unet": self.unet, "vae": self.vae,
                 "depth_estimator": self.depth_estimator, "image_encoder": self.image_encoder,
                 "image_normalizer": self.image_normalizer}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the UNet's weights are stored in."""
        return self._weight.dtype

    def to(self, device: str | torch.device | torch.dtype | None = None,
           dtype: str | torch.dtype | None = None) -> "StableDiffusion":
        """Move the model to a device or a dtype, in the words of `minisd.load`; returns itself.

        What ``ops`` and ``fused`` mean is found anew for the new place. Raises ValueError, before
        anything is moved, where they cannot run or there is no such device.
        """
        if isinstance(device, torch.dtype):  # as torch's own .to(torch.float16)
            device, dtype = None, device
        device = self.device if device is None else checks.device(device)
        dtype = self.dtype if dtype is None else checks.dtype(dtype, device)
        parts = (*self.parts.values(), self.safety_checker)
        modules = [part for part in parts if isinstance(part, nn.Module)]
        self.backend, before = self.backend.at(device, dtype), self.backend
        self.release()
        for part in modules:
            part.to(device, vae_dtype(self.config.vae, dtype) if part is self.vae else dtype)
            for module in part.modules():
                if getattr(module, "ops", None) == before.ops:
                    setattr(module, "ops", self.backend.ops)
        return self

    def save(self, path: str | PathLike) -> None:
        """Write the model: ``path`` ending in .safetensors is one file in the original layout,
        any other is a new folder in diffusers layout.

        It is written whole or not at all, in the dtype that it has. A single file holds neither the
        sizes nor the tokenizer: one of unofficial sizes, as the shipped model's, needs
        ``load(file, config=folder)``. Raises FileExistsError for a name that is taken, and OSError.
        """
        for name, part in self.parts.items():
            if not isinstance(part, nn.Module):
                raise TypeError(f"{name} is a {type(part).__name__}, which has no weights to save")
        save_model(Path(os.path.expanduser(path)), self.config, self.tokenizer, self.parts)

    def release(self) -> None:
        """Free what calls have left for the next ones: repacked weights and CUDA graphs.

        To be called after a change of weights through ``weight.data``, which torch does not count.
        """
        self._repacked.clear()

    def coverage(self, height: int | None = None, width: int | None = None) -> list[Call]:
        """What each attention, norm and GEGLU of one UNet forward took, and why not a kernel.

        ``height`` and ``width`` are pixels, as in a call; two latents, as with guidance.
        """
        f, usual = self.config.vae.downscale, self.config.sample_size
        height = checks.side("height", height, f, usual) // f
        width = checks.side("width", width, f, usual) // f
        return coverage(self.config.unet, self.backend, height, width, self.dtype)

    @property
    def _weight(self) -> Tensor:
        """A weight of the UNet, or of the text encoder if the UNet is a function without any."""
        networks = (n for n in (self.unet, self.text_encoder) if isinstance(n, nn.Module))
        return next(p for network in networks for p in network.parameters())

    def _fused(self) -> "backends.Fused | None":
        """The repacked networks, if they are wanted and nobody has replaced the readable ones."""
        own = (self.unet, self.vae, self.vae.decoder)
        if not self.backend.fused or any(a is not b for a, b in zip(own, self._loaded)):
            return None
        return self._repacked(self.unet, self.vae, self.backend.ops)

    def _context(self, texts: list[str] | None, embeds: Tensor | None) -> Tensor:
        """Texts, or the embeddings given instead -> (prompts, 77, D) as the UNet wants it."""
        if texts is not None:
            embeds = self.text_encoder(self._ids(texts))                     # (prompts, 77, D)
        assert embeds is not None
        return embeds.to(self._weight)

    def _ids(self, texts: list[str]) -> Tensor:
        """Texts -> (prompts, 77) ids that the text encoder has."""
        tokenizer, text = self.tokenizer, self.config.text
        has = (tokenizer.vocab_size, tokenizer.length)
        room = (text.vocab_size, text.max_position_embeddings)
        if has[0] > room[0] or has[1] > room[1]:
            raise ValueError(f"the tokenizer has (tokens, length) {has}, the text encoder only "
                             f"{room}: load with its own tokenizer (a single file's is in the "
                             "folder of config=, --config), or in Python give prompt_embeds")
        return tokenizer(texts)                                              # (prompts, 77)

    @memory.explained()
    @torch.no_grad()
    def depth_map(self, image: Image | str | PathLike) -> Tensor:
        """How near each part of an image is (1, H', W'), larger is nearer; for a depth model.

        This is what a call makes of its ``image``, and takes as ``depth_map``. H' and W' are
        multiples of 32, one of them about 384 (``depth_maps.prepared``). Raises ValueError for a
        model without an estimator, and ImageError.
        """
        if self.depth_estimator is None:
            raise ValueError("this model has no depth estimator")
        x = prepared(images.open_image(image))                               # (1, 3, H', W')
        x = x.to(self.device, torch.promote_types(self.dtype, torch.float32))
        return errors.finite(self.depth_estimator(x), "the depth estimator") # (1, H', W')

    @memory.explained()
    @torch.no_grad()
    def vision(
        self, source: images.Source | Sequence[images.Source] | Tensor | np.ndarray
    ) -> Tensor:
        """CLIP's embeddings (B, D) of images, not of length 1; for an unCLIP model.

        They can be mixed: ``sd(image_embeds=0.7 * sd.vision("a.png") + 0.3 * sd.vision("b.png"))``.
        Takes and raises what `images.open_images` does; ValueError for a model without the encoder.
        """
        if self.image_encoder is None or self.config.vision is None:
            raise ValueError("this model has no image encoder, which unCLIP models have")
        side, wide = self.config.vision.image_size, torch.promote_types(self.dtype, torch.float32)
        seen = [images.to_clip(each, side) for each in images.open_images(source)]
        if not seen:
            raise ValueError("there is no image to look at")
        embeds = torch.cat([self.image_encoder(x.to(self.device, wide)) for x in seen])  # (B, D)
        return errors.finite(embeds, "the image encoder")

    @memory.explained()
    @torch.no_grad()
    def _images(self, x: Tensor, keep: Keep | None,
                output_type: str) -> list[Image] | Tensor | np.ndarray:
        """Latents (B, 4, h, w) -> what the caller asked for."""
        if output_type == "latent":
            return x
        fused = self._fused()
        image = pixels.decode(self.vae, x, fused and fused.decoder)          # (B, 3, H, W)
        if keep is not None:
            image = keep.pixels(image)
        image = ((image + 1) / 2).clamp(0, 1)                                # (B, 3, H, W)
        if output_type == "np":
            return image.permute(0, 2, 3, 1).cpu().numpy()                   # (B, H, W, 3)
        return image if output_type == "pt" else images.to_pil(image)
