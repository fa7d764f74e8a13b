"""From a prompt to a picture: tokenise, encode, denoise, decode.

    prompt --tokenizer--> ids --text_encoder--> context --.
                                                          v
    seed --> noise x_T --> [ unet + guidance + DDIM step ] x S --> latent --vae--> picture

The only room that knows all the others. Guidance lives here, and so does every choice of device,
dtype and seed.

B pictures, H W height and width in pixels, h w of the latent, D width of the context
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from minisd import arguments, checkpoint, ddim, ops as bodies, image as pictures
from minisd.clip import TextEncoder
from minisd.config import Config
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.vae import VAE


@dataclass(frozen=True)
class Output:
    """What a call made: the pictures, the seed of each, and the settings that make each again.

    ``images`` is a list of PIL images or, by ``output_type``, a (B, 3, H, W) tensor ("pt") or a
    (B, H, W, 3) array ("np") in [0, 1], or a (B, 4, h, w) tensor of scaled latents ("latent").
    """

    images: Any
    seeds: list[int]
    settings: list[dict]


@dataclass(frozen=True)
class Noise:
    """Draws noise for B pictures, each from its own generator.

    So a picture depends neither on the others of its batch nor on the device; and it is drawn in
    float32 and cast, so that it does not depend on the dtype either.
    """

    generators: list[torch.Generator]
    like: Tensor  # (1, 4, h, w): the size, device and dtype wanted

    def draw(self) -> Tensor:
        """Standard normal numbers (B, 4, h, w)."""
        shape = self.like.shape[1:]
        drawn = [torch.randn(shape, generator=g, device=g.device) for g in self.generators]
        return torch.stack([noise.to(self.like) for noise in drawn])         # (B, 4, h, w)


@dataclass(frozen=True)
class Known:
    """What inpainting keeps: the given picture, wherever the mask is 0."""

    image: Tensor  # (1, 3, H, W) in [-1, 1]
    mask: Tensor   # (1, 1, H, W)
    x0: Tensor     # (B, 4, h, w), latents of the picture
    noise: Tensor  # (B, 4, h, w)

    def put_back(self, x: Tensor, a: float) -> Tensor:
        """x (B, 4, h, w) with its known part replaced by the picture at signal share ``a``."""
        mask = F.interpolate(self.mask, size=x.shape[-2:])                   # (1, 1, h, w)
        return (1 - mask) * ddim.add_noise(self.x0, self.noise, a) + mask * x

    def paste(self, image: Tensor) -> Tensor:
        """image (B, 3, H, W) with its known part replaced by the given picture."""
        return (1 - self.mask) * self.image + self.mask * image


class StableDiffusion:
    """A text encoder, a UNet and a VAE that were trained together, ready to be called.

    The parts are attributes (config, tokenizer, text_encoder, unet, vae) and work on their own.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, text_encoder: TextEncoder,
                 unet: UNet, vae: VAE):
        self.config, self.tokenizer = config, tokenizer
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.alphas = ddim.alphas_cumprod(config.schedule).tolist()

    @torch.no_grad()
    def __call__(
        self, prompt: str | list[str] | None = None, *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 50,
        guidance_scale: float = 7.5, num_images_per_prompt: int = 1, eta: float = 0.0,
        seed: int | list[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, image: Image | None = None,
        mask_image: Image | None = None, strength: float | None = None,
        output_type: str = "pil", callback_on_step_end: Callable | None = None,
        progress: bool | None = None,
    ) -> Output:
        """Make pictures, in prompt-major order: all of the first prompt, then of the second.

        ``height`` and ``width`` are pixels, multiples of 8 (of the VAE's downscale); without them
        the size the model was trained on. ``num_inference_steps``, 1 to 1000, is exactly how often
        the UNet is asked. ``guidance_scale`` 1 is none; ``eta`` 0 is DDIM, 1 as noisy as DDPM.

        ``seed`` 0 to 2^32 - 1: picture i uses seed + i; or a list, one each; None draws one.
        ``generator``: torch generators of your own instead. ``latents`` (B, 4, h, w): x_T itself.
        ``prompt_embeds``, ``negative_prompt_embeds`` (prompts, 77, D): contexts instead of text.

        ``image``: start from this picture; ``strength`` in (0, 1] is how much of the way from
        noise is walked again (0.8). ``mask_image``: repaint only where it is white (strength 1).

        ``callback_on_step_end(sd, step, t, {"latents": x})`` may return {"latents": another x}.
        ``progress``: whether to draw a bar; None draws one on a terminal only.

        Raises TypeError or ValueError for a bad argument and ImageError for a bad picture, before
        any work; ArithmeticError if latents or picture come out other than finite.
        """
        config, f = self.config, self.vae.config.downscale
        positives, negatives = arguments.prompts(
            prompt, negative_prompt, prompt_embeds, negative_prompt_embeds,
            context_shape=(self.tokenizer.length, config.text.hidden_size))
        copies = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1, 10_000)
        trained = config.schedule.num_train_timesteps
        steps = arguments.integer("num_inference_steps", num_inference_steps, 1, trained)
        guidance_scale = arguments.real("guidance_scale", guidance_scale)
        eta = arguments.real("eta", eta, 0.0, 1.0)
        height = arguments.side("height", height, f, config.sample_size)
        width = arguments.side("width", width, f, config.sample_size)
        strength, steps_left = arguments.strength(strength, steps, image, mask_image)
        arguments.task(self.unet.config.in_channels, image, mask_image, latents)
        generators = arguments.generators(len(positives) * copies, seed, generator)
        shape = (len(generators), self.vae.config.latent_channels, height // f, width // f)
        arguments.latents(latents, shape)
        arguments.one_of("output_type", output_type, ("pil", "pt", "np", "latent"))
        ids, empty_ids = (
            self.tokenizer(texts) if embeds is None else None
            for texts, embeds in ((positives, prompt_embeds), (negatives, negative_prompt_embeds))
        )

        # Half-precision models still add up their steps in float32.
        state = torch.promote_types(self.unet.conv_in.weight.dtype, torch.float32)
        like = torch.empty(1, *shape[1:], dtype=state, device=self.unet.conv_in.weight.device)
        if image is not None:
            image = pictures.to_tensor(pictures.open_image(image), width, height).to(like)
        if mask_image is not None:
            mask_image = pictures.mask_to_tensor(mask_image, width, height).to(like)
        context = self._context(ids, prompt_embeds).repeat_interleave(copies, dim=0)
        if guidance_scale != 1.0:
            empty = self._context(empty_ids, negative_prompt_embeds)         # (prompts, 77, D)
            context = torch.cat([empty.repeat_interleave(copies, dim=0), context])

        noise = Noise(generators, like)
        timesteps = ddim.timesteps(steps, trained)[-steps_left:]
        x, known, extra = self._start(timesteps[0], latents, image, mask_image, strength, noise)
        x = self._denoise(x, timesteps, context, guidance_scale, eta, noise, known, extra,
                          callback_on_step_end, progress)
        settings = [
            {"prompt": positives[i // copies], "negative_prompt": negatives[i // copies],
             "seed": g.initial_seed(), "width": width, "height": height,
             "num_inference_steps": steps, "guidance_scale": guidance_scale, "eta": eta,
             "strength": strength, "model": config.name,
             "prediction_type": config.schedule.prediction_type}
            for i, g in enumerate(generators)
        ]
        return Output(self._images(x, known, output_type), [s["seed"] for s in settings], settings)

    def _context(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """Ids (prompts, 77), or contexts given instead -> (prompts, 77, D) as the UNet wants it."""
        weight = self.unet.conv_in.weight
        if embeds is None:
            embeds = self.text_encoder(ids.to(weight.device))
        return embeds.to(weight)                                             # (prompts, 77, D)

    def _start(self, t: int, latents: Tensor | None, image: Tensor | None, mask: Tensor | None,
               strength: float | None, noise: Noise) -> tuple[Tensor, Known | None, Tensor | None]:
        """The first x, what inpainting keeps, and the UNet's extra input channels."""
        own_mask = self.unet.config.in_channels != self.vae.config.latent_channels
        pure_noise = image is None or (mask is not None and strength == 1.0)
        x0 = None
        if not pure_noise or (mask is not None and not own_mask):
            x0 = self._encode(image, noise.draw())                           # (B, 4, h, w)
        e = latents.to(noise.like) if latents is not None else noise.draw()  # (B, 4, h, w)
        x = e if pure_noise else ddim.add_noise(x0, e, self.alphas[t])
        if mask is None:
            return x, None, None
        if not own_mask:
            return x, Known(image, mask, x0, e), None
        # An inpainting UNet is shown the mask and the picture with a grey hole, at every step.
        hole = self._encode(image * (1 - mask), noise.draw())                # (B, 4, h, w)
        small = F.interpolate(mask, size=x.shape[-2:]).expand(len(x), -1, -1, -1)
        return x, None, torch.cat([small, hole], dim=1)                      # (B, 5, h, w)

    def _encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """An image (1, 3, H, W) -> B sampled latents (B, 4, h, w)."""
        image, like = image.to(self.unet.conv_in.weight), noise
        return self.vae.encode(image, noise.to(image)).to(like)

    def _denoise(
        self, x: Tensor, timesteps: list[int], context: Tensor, guidance_scale: float, eta: float,
        noise: Noise, known: Known | None, extra: Tensor | None, callback: Callable | None,
        progress: bool | None,
    ) -> Tensor:
        """Walk x (B, 4, h, w) down the timesteps: the whole of Stable Diffusion in one loop."""
        schedule = self.config.schedule
        # The step after the last timestep is that of timestep 0, not a = 1.
        alphas = [self.alphas[t] for t in timesteps] + [self.alphas[0]]
        bar = tqdm(timesteps, disable=None if progress is None else not progress)
        for i, t in enumerate(bar):
            prediction = self._predict(x, t, context, guidance_scale, extra)
            fresh = noise.draw() if eta > 0 else None
            x = ddim.step(x, prediction, alphas[i], alphas[i + 1], schedule.prediction_type,
                          eta, fresh)
            if known is not None:
                x = known.put_back(x, alphas[i + 1] if i + 1 < len(timesteps) else 1.0)
            if callback is not None:
                changed = (callback(self, i, t, {"latents": x}) or {}).get("latents", x)
                arguments.latents(changed, tuple(x.shape))
                x = changed.to(x)
        return _finite(x, "the UNet")

    def _predict(self, x: Tensor, t: int, context: Tensor, guidance_scale: float,
                 extra: Tensor | None) -> Tensor:
        """The UNet's answer for x (B, 4, h, w), with guidance where there are two contexts each."""
        if extra is not None:
            x = torch.cat([x, extra], dim=1)                                 # (B, 9, h, w)
        x = x.repeat(len(context) // len(x), 1, 1, 1)                        # (B or 2B, C, h, w)
        ts = torch.full((len(x),), t, device=x.device)
        prediction = self.unet(x.to(context), ts, context).to(x)
        if guidance_scale == 1.0:
            return prediction                                                # (B, 4, h, w)
        without, with_prompt = prediction.chunk(2)
        return without + guidance_scale * (with_prompt - without)            # (B, 4, h, w)

    def _images(self, x: Tensor, known: Known | None, output_type: str) -> Any:
        """Latents (B, 4, h, w) -> what the caller asked for."""
        if output_type == "latent":
            return x
        image = torch.cat([self._decode(one) for one in x.split(1)])         # (B, 3, H, W)
        if known is not None:
            image = known.paste(image)
        image = ((image + 1) / 2).clamp(0, 1)                                # (B, 3, H, W)
        if output_type == "pt":
            return image
        if output_type == "np":
            return image.permute(0, 2, 3, 1).cpu().numpy()                   # (B, H, W, 3)
        return pictures.to_pil(image)

    def _decode(self, x: Tensor) -> Tensor:
        """One latent (1, 4, h, w) -> an image in about [-1, 1]; one at a time, to save memory."""
        image = self.vae.decode(x.to(self.unet.conv_in.weight)).to(x)        # (1, 3, H, W)
        if not image.isfinite().all() and self.unet.conv_in.weight.dtype != x.dtype:
            # Some published VAEs overflow in float16 on some pictures.
            image = copy.deepcopy(self.vae).to(x.dtype).decode(x)            # (1, 3, H, W)
        return _finite(image, "the VAE")


def _finite(x: Tensor, stage: str) -> Tensor:
    if not x.isfinite().all():
        raise ArithmeticError(f"{stage} gave values that are not finite: "
                              'try dtype="float32", or a smaller guidance_scale')
    return x


def load(
    path: str | PathLike | None = None, *, config: Config | str | PathLike | None = None,
    device: str | torch.device = "auto", dtype: str | torch.dtype = "auto", ops: str = "auto",
    vae: str | PathLike | None = None, prediction_type: str | None = None,
) -> StableDiffusion:
    """Load a model, never touching the network.

    ``path``: nothing for the model shipped with minisd; a ``.safetensors`` file in the original
    layout; a folder in diffusers layout; or "owner/name", if `minisd download` has fetched it.
    ``config``: the sizes, or a folder of diffusers JSON files with them, for a single file of
    unusual sizes. ``vae``: a stand-alone VAE file to use instead. ``prediction_type``: "epsilon"
    or "v_prediction", where the file does not say.

    ``device`` "auto" is cuda, then mps, then cpu; ``dtype`` "auto" is float16 on a GPU and
    float32 on a CPU; ``ops`` "auto", "torch" or "reference".

    Raises FileNotFoundError, WeightError (naming file and tensor), or ValueError for the rest.
    """
    device = arguments.device(device)
    dtype = arguments.dtype(dtype, device)
    body = bodies.choose(ops)
    if path is None:
        path = resources.files("minisd_weights") / "tiny"
    found = checkpoint.open_checkpoint(path, config=config, vae=vae,
                                       prediction_type=prediction_type)
    with torch.device("meta"):
        parts = {
            "text_encoder": TextEncoder(found.config.text, body),
            "unet": UNet(found.config.unet, body),
            "vae": VAE(found.config.vae, body),
        }
    for part, module in parts.items():
        checkpoint.check(found, part, module)
    for part, module in parts.items():
        checkpoint.fill(found, part, module, dtype, device)
        module.eval().requires_grad_(False)
    if found.tokenizer_folder is not None:
        tokenizer = Tokenizer.from_folder(found.tokenizer_folder)
    else:
        tokenizer = Tokenizer.clip(found.config.text.pad_token_id)
    return StableDiffusion(found.config, tokenizer, **parts)
