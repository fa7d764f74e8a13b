"""From a prompt to a picture: tokenise, encode, denoise, decode.

    prompt --tokenizer--> ids --text_encoder--> context --.
                                                          v
    seed --> noise x_T --> [ unet + guidance + DDIM step ] x S --> latent --vae--> picture

Guidance lives here, and so does every choice of device, dtype and seed.

B pictures, H W height and width in pixels, h w of the latent, D width of the context
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from minisd import arguments, checkpoint, ddim, image as pictures, memory, ops as bodies
from minisd.arguments import Request
from minisd.clip import TextEncoder
from minisd.config import Config
from minisd.coverage import coverage
from minisd.latents import Known, Noise
from minisd.ops import Call
from minisd.tokenizer import Tokenizer
from minisd.tokenizer_folder import read_tokenizer
from minisd.unet import UNet
from minisd.vae import VAE


@dataclass(frozen=True)
class Output:
    """What a call made: the pictures, and for each its seed and the settings that made it.

    ``images`` is a list of PIL images or, by ``output_type``, a (B, 3, H, W) tensor ("pt") or a
    (B, H, W, 3) array ("np") in [0, 1], or a (B, 4, h, w) tensor of scaled latents ("latent").
    """

    images: Any
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
        self.alphas = ddim.alphas_cumprod(config.schedule).tolist()

    @memory.explained()
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
        noise is walked again (0.8). ``mask_image``: repaint only where it is white (strength 1);
        an inpainting model decodes the rest anew too. Both are resized to height and width.

        ``callback_on_step_end(sd, step, t, {"latents": x})`` may return {"latents": another x}.
        ``progress``: whether to draw a bar; None draws one on a terminal only.
        Raises TypeError or ValueError for a bad argument and ImageError for a bad picture, before
        any work; ArithmeticError if a part gives values that are not finite; MemoryError.
        """
        r = arguments.check(
            self.config, prompt, negative_prompt, height, width, num_inference_steps,
            guidance_scale, num_images_per_prompt, eta, seed, generator, latents, prompt_embeds,
            negative_prompt_embeds, image, mask_image, strength, output_type,
            callback_on_step_end)
        memory.check(self.unet, self.vae, r, image is not None, output_type != "latent")
        # Half-precision models still add up their steps in float32.
        state = torch.promote_types(self._weight.dtype, torch.float32)
        like = torch.empty(1, *r.shape[1:], dtype=state, device=self._weight.device)
        if image is not None:
            image = pictures.to_tensor(image, r.width, r.height).to(like)    # (1, 3, H, W)
        if mask_image is not None:
            mask_image = pictures.mask_to_tensor(mask_image, r.width, r.height).to(like)
        ids = prompt_embeds if r.prompts is None else self._ids(r.prompts)
        empty = negative_prompt_embeds if r.negatives is None else self._ids(r.negatives)

        context = self._context(ids).repeat_interleave(r.copies, dim=0)      # (B, 77, D)
        if r.guidance_scale != 1.0:
            empty = self._context(empty).repeat_interleave(r.copies, dim=0)  # (B, 77, D)
            context = torch.cat([empty, context])                            # (2B, 77, D)
        _finite(context, "the text encoder")
        noise = Noise(r.generators, like)
        x, known, extra = self._start(r, image, mask_image, noise)
        x = self._denoise(r, x, context, noise, known, extra, callback_on_step_end, progress)
        seeds = [g.initial_seed() for g in r.generators]
        return Output(self._images(x, known, output_type), seeds, r.settings())

    def coverage(self, height: int | None = None, width: int | None = None) -> list[Call]:
        """What each attention and GroupNorm of one UNet forward took, and why not a kernel.

        ``height`` and ``width`` are pixels, as in a call; two latents, as with guidance.
        """
        f, usual = self.config.vae.downscale, self.config.sample_size
        height = arguments.side("height", height, f, usual) // f
        width = arguments.side("width", width, f, usual) // f
        return coverage(self.config.unet, self.unet.ops, height, width, self._weight.dtype)

    @property
    def _weight(self) -> Tensor:
        """Any weight: it has the device and the dtype of the model."""
        return self.unet.conv_in.weight

    def _ids(self, texts: list[str]) -> Tensor:
        """Texts -> (prompts, 77) ids that the text encoder has."""
        tokenizer, text = self.tokenizer, self.config.text
        has = (tokenizer.vocab_size, tokenizer.length)
        room = (text.vocab_size, text.max_position_embeddings)
        if has[0] > room[0] or has[1] > room[1]:
            raise ValueError(f"the tokenizer has (tokens, length) {has}, the text encoder only "
                             f"{room}: load with its own tokenizer, or give prompt_embeds")
        return tokenizer(texts)                                              # (prompts, 77)

    def _context(self, given: Tensor) -> Tensor:
        """Ids (prompts, 77), or contexts as they are -> (prompts, 77, D) as the UNet wants it."""
        if not given.is_floating_point():
            given = self.text_encoder(given.to(self._weight.device))         # (prompts, 77, D)
        return given.to(self._weight)

    def _start(self, r: Request, image: Tensor | None, mask: Tensor | None,
               noise: Noise) -> tuple[Tensor, Known | None, Tensor | None]:
        """The first x, what inpainting keeps, and an inpainting UNet's extra input channels."""
        # The order of the draws is that of diffusers, so that a seed means the same picture.
        knows_masks = self.config.unet.in_channels != self.config.vae.latent_channels
        pure_noise = image is None or (mask is not None and r.strength == 1.0)
        x0 = None
        if not pure_noise or (mask is not None and not knows_masks):
            x0 = self._with_vae("encode", image, noise.draw())               # (B, 4, h, w)
        e = noise.draw() if r.latents is None else r.latents.to(noise.like)  # (B, 4, h, w)
        x = e if pure_noise else ddim.add_noise(x0, e, self.alphas[r.timesteps[0]])
        if mask is None:
            return x, None, None
        if not knows_masks:
            noise.draw()  # diffusers draws here for a latent that it then leaves unused
            return x, Known(image, mask, x0, e), None
        # The mask, and the picture with a grey hole, which the UNet is shown at every step.
        holed = self._with_vae("encode", image * (1 - mask), noise.draw())   # (B, 4, h, w)
        small = F.interpolate(mask, size=x.shape[-2:]).expand(len(x), -1, -1, -1)
        return x, None, torch.cat([small, holed], dim=1)                     # (B, 5, h, w)

    def _denoise(self, r: Request, x: Tensor, context: Tensor, noise: Noise, known: Known | None,
                 extra: Tensor | None, callback: Callable | None, progress: bool | None) -> Tensor:
        """Walk x (B, 4, h, w) down the timesteps: Stable Diffusion is this loop."""
        # After the last timestep comes the noise level of timestep 0, which is not quite none.
        alphas = [self.alphas[t] for t in r.timesteps] + [self.alphas[0]]
        kind = self.config.schedule.prediction_type
        fused = not isinstance(self.unet, UNet)
        if fused:
            from minisd_kernels.fused_step import Steps, weights

            table = weights(alphas, kind, r.eta, r.guidance_scale)
            steps = Steps(self.unet, context, r.timesteps, table, extra)
        bar = tqdm(r.timesteps, disable=None if progress is None else not progress)
        for i, t in enumerate(bar):
            fresh = noise.draw() if r.eta > 0 else None
            if fused:
                x = steps(x, i, fresh)
            else:
                prediction = self._predict(x, t, context, r.guidance_scale, extra)
                x = ddim.step(x, prediction, alphas[i], alphas[i + 1], kind, r.eta, fresh)
            if known is not None:
                x = known.put_back(x, alphas[i + 1] if i + 1 < len(r.timesteps) else 1.0)
            if callback is not None:
                changes = callback(self, i, t, {"latents": x})
                x = arguments.changed_latents(changes, x)
        return _finite(x, "the UNet")

    def _predict(self, x: Tensor, t: int, context: Tensor, guidance_scale: float,
                 extra: Tensor | None = None) -> Tensor:
        """The UNet's answer for x (B, 4, h, w), with guidance unless its scale is 1."""
        inputs = x if extra is None else torch.cat([x, extra], dim=1)        # (B, 4 or 9, h, w)
        inputs = inputs.repeat(len(context) // len(x), 1, 1, 1)              # (B or 2B, ...)
        times = torch.full((len(inputs),), t, device=x.device)
        prediction = self.unet(inputs.to(self._weight), times, context).to(x)
        if guidance_scale == 1.0:
            return prediction
        without, with_prompt = prediction.chunk(2)                           # (B, 4, h, w)
        return without + guidance_scale * (with_prompt - without)

    def _images(self, x: Tensor, known: Known | None, output_type: str) -> Any:
        """Latents (B, 4, h, w) -> what the caller asked for."""
        if output_type == "latent":
            return x
        # One at a time: it takes less memory, and a picture is the same alone or in a batch.
        image = torch.cat([self._with_vae("decode", one) for one in x.split(1)])  # (B, 3, H, W)
        if known is not None:
            image = known.paste(image)
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
            if self._weight.dtype == inputs[0].dtype:
                raise
        # Some published VAEs exceed float16 on some pictures.
        again = copy.deepcopy(self.vae).to(inputs[0].dtype)
        return _finite(getattr(again, method)(*inputs), "the VAE")


def _finite(x: Tensor, stage: str) -> Tensor:
    if not x.isfinite().all():
        remedy = 'try dtype="float32" or a smaller guidance_scale'
        raise ArithmeticError(f"{stage} gave values that are not finite: {remedy}")
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
    float32 on a CPU; ``ops`` "torch", "reference" (the formulas written out), "triton" (the GPU
    kernels, which refuse rather than fall back), "fused" (these and a UNet packed anew; on a CPU
    with torch's ops) or "auto": "fused" on a GPU where the kernels are proven, else "torch".

    Raises FileNotFoundError, WeightError (naming file and tensor), or ValueError for the rest.
    """
    device = arguments.device(device)
    dtype = arguments.dtype(dtype, device)
    body = bodies.choose(ops, device, dtype)
    found = checkpoint.open_checkpoint(path, config=config, vae=vae,
                                       prediction_type=prediction_type)
    if found.tokenizer_folder is None:
        tokenizer = Tokenizer.clip(found.config.text.pad_token_id)
    else:
        tokenizer = read_tokenizer(found.tokenizer_folder)
    with torch.device("meta"):
        parts = {
            "text_encoder": TextEncoder(found.config.text, body),
            "unet": UNet(found.config.unet, body),
            "vae": VAE(found.config.vae, body),
        }
    for part, module in parts.items():  # all of them, before any weight is read
        checkpoint.check(found, part, module)
    for part, module in parts.items():
        checkpoint.fill(found, part, module, dtype, device)
        module.eval().requires_grad_(False)
    if body.name in ("fused", "auto"):
        from minisd_kernels.fused_vae import fuse

        fuse(parts, body)
    return StableDiffusion(found.config, tokenizer, **parts)
