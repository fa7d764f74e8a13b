"""What a call asks for, and what that means for a model; every argument is checked before any work.

checks.py has the checks of single values.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from minisd import checks, tasks, tensors
from minisd.config import Config
from minisd.depth_maps import normalised
from minisd.images import check_for_clip, open_image, open_mask
from minisd.samplers import SAMPLERS, Named, schedule
from minisd.samplers.sampler import Sampler
from minisd.samplers.schedule import Ladder
from minisd.sampling import choose, sampler_on
from minisd.seeds import generators_of, known_seeds
from minisd.text.tokenizer import check_texts

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
Prompts = str | list[str] | None
Picture = Image | str | PathLike | None
Maps = Picture | np.ndarray | Tensor
# (sd, index of the step, timestep, {"latents": x}) -> None, or {"latents": another x}.
Callback = Callable[..., dict[str, Tensor] | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a call asks for: the one list of its arguments and their defaults.

    The call's signature has the same, which a test holds it to; `StableDiffusion.__call__` explains
    them. ``plan`` checks them.
    """

    prompt: Prompts = None
    negative_prompt: Prompts = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    num_images_per_prompt: int = 1
    sampler: str | None = None
    spacing: str | None = None
    eta: float | None = None
    seed: int | list[int] | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    image: Picture = None
    mask_image: Picture = None
    strength: float | None = None
    depth_map: Maps = None
    noise_level: int | None = None
    image_embeds: Tensor | None = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    progress: bool | None = None

    def plan(self, config: Config) -> "Plan":
        """The plan that carries this out with a model, or one TypeError, ValueError or OSError."""
        f, trained = config.vae.downscale, config.schedule.num_train_timesteps
        tasks.check(config, {name for name in tasks.OPTIONS if getattr(self, name) is not None})
        image_embeds = tensors.image_embeds(self.image_embeds, config)
        unsaid = 1 if image_embeds is None else len(image_embeds)
        count, prompts, negative_prompts = _prompts(self, config, unsaid)
        copies = checks.integer("num_images_per_prompt", self.num_images_per_prompt, 1, 10_000)
        steps = checks.integer("num_inference_steps", _or(
            self.num_inference_steps, config.num_inference_steps), 1, trained)
        guidance_scale = checks.real(
            "guidance_scale", _or(self.guidance_scale, config.guidance_scale))
        rescale = checks.real("guidance_rescale", self.guidance_rescale, 0.0, 1.0)
        chosen = choose(self.sampler, self.spacing, self.eta, config.schedule)
        row = SAMPLERS[chosen.sampler]
        ladder = row.ladder(
            chosen.spacing, steps, schedule.alphas_cumprod(config.schedule).tolist())
        noise_level = tasks.noise_level(self.noise_level, config)
        image = None if self.image is None else open_image(self.image)
        if image is not None and config.vision is not None:
            check_for_clip(image)
        depth = tensors.depth_maps(self.depth_map, count, count * copies)
        image_embeds = tensors.one_each("image_embeds", image_embeds, count, count * copies)
        maps = None if depth is None else tasks.Sides(*depth.shape[1:])
        height, width = tasks.takes(config).size(
            self.height, self.width, config, image or maps)
        begins = image is not None and "strength" in tasks.takes(config).arguments
        strength, left = tasks.strength(
            self.strength, steps, begins, self.mask_image is not None)
        _start(self.latents, begins, self.mask_image is not None, strength)
        mask_image = None if self.mask_image is None else open_mask(self.mask_image)
        ladder = replace(ladder, levels=ladder.levels[-left - 1 :])
        generators = generators_of(count * copies, self.seed, self.generator)
        shape = (len(generators), config.vae.latent_channels, height // f, width // f)
        if not isinstance(self.output_type, str) or self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, "
                             f"not {checks.shown(self.output_type)}")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise TypeError("callback_on_step_end must be a function, "
                            f"not {type(self.callback_on_step_end).__name__}")
        return Plan(
            config=config, prompts=prompts, negative_prompts=negative_prompts,
            num_images_per_prompt=copies, height=height, width=width, num_inference_steps=steps,
            guided=guidance_scale != 1.0 and config.unet.time_cond_proj_dim is None,
            guidance_scale=guidance_scale, guidance_rescale=rescale, chosen=chosen, ladder=ladder,
            sampler=sampler_on(ladder, chosen, config), strength=strength, image=image,
            mask_image=mask_image, noise_level=noise_level, image_embeds=image_embeds,
            depth_map=None if depth is None else normalised(depth, shape[2:]),
            generators=generators,
            seeds=known_seeds(generators) if self.latents is None else [None] * len(generators),
            latents=None if self.latents is None else tensors.latents_of(self.latents, shape),
            prompt_embeds=self.prompt_embeds, negative_prompt_embeds=self.negative_prompt_embeds,
            output_type=self.output_type, callback_on_step_end=self.callback_on_step_end,
            progress=self.progress, shape=shape,
            warnings=self._without_effect(config, chosen, steps, guidance_scale))

    def _without_effect(self, config: Config, chosen: Named, steps: int,
                        guidance_scale: float) -> list[str]:
        """What is asked for and will not be seen in the image."""
        found = []
        if steps == 1 and chosen.spacing == "leading":
            found.append("1 step is for models that are made for few: this one leaves noise as "
                         "noise, and an image as it is")
        if self.eta is not None and SAMPLERS[chosen.sampler].eta is None:
            found.append(f"eta has no effect with the sampler {chosen.sampler}, which takes none")
        told = config.unet.time_cond_proj_dim is not None
        if guidance_scale < 1.0:
            found.append(f"with guidance {guidance_scale:g} the image follows the prompt less than "
                         "without guidance, which is 1")
        if self.guidance_rescale and (told or guidance_scale == 1.0):
            found.append("guidance_rescale has no effect where the UNet is asked only once")
        negative = self.negative_prompt_embeds is not None or self.negative_prompt and any(
            self.negative_prompt)
        if negative and told:
            found.append("the negative prompt has no effect: this model is told the guidance "
                         "scale, and asked only once")
        elif negative and guidance_scale == 1.0:
            found.append("the negative prompt has no effect without guidance, which 1 means")
        return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A request, checked and complete. The lists have one entry per prompt."""

    config: Config
    prompts: list[str] | None    # None where embeddings were given instead
    negative_prompts: list[str] | None
    num_images_per_prompt: int
    height: int
    width: int
    num_inference_steps: int
    chosen: Named                # sampler, spacing and eta by name
    ladder: Ladder               # the levels to be visited: fewer than the steps, given an image
    sampler: Sampler
    guidance_scale: float
    guidance_rescale: float
    guided: bool                 # whether the UNet is asked twice, without and with the prompt
    strength: float | None
    image: Image | None
    mask_image: Image | None
    depth_map: Tensor | None     # (1 or B, 1, h, w) in [-1, 1], float64
    noise_level: int | None
    image_embeds: Tensor | None  # (1 or B, D)
    generators: list[torch.Generator]
    seeds: list[int | None]      # None where a seed alone does not make the image again
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    output_type: str
    callback_on_step_end: Callback | None
    progress: bool | None
    shape: tuple[int, ...]       # of the latents: (B, 4, h, w)
    warnings: list[str]          # what was asked for that the image will not show

    def settings(self) -> list[dict]:
        """For each image, what it was made with."""
        n = self.num_images_per_prompt
        same = {
            "width": self.width, "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale, "guidance_rescale": self.guidance_rescale,
            **self.chosen._asdict(), "strength": self.strength, "noise_level": self.noise_level,
            "model": self.config.name, "prediction_type": self.config.schedule.prediction_type,
        }
        return [
            {"prompt": self.prompts and self.prompts[i // n],
             "negative_prompt": self.negative_prompts and self.negative_prompts[i // n],
             "seed": seed, **same}
            for i, seed in enumerate(self.seeds)
        ]


def _or(value: object, default: object) -> object:
    return default if value is None else value


def _prompts(r: Request, config: Config,
             unsaid: int) -> tuple[int, list[str] | None, list[str] | None]:
    """How many prompts there are, and their texts: None where embeddings are given instead.

    ``unsaid``: how many empty ones there are without any, where a model does without.
    """
    shape = (config.text.max_position_embeddings, config.text.hidden_size)
    count = tensors.embeddings("prompt_embeds", r.prompt_embeds, shape)
    there = tensors.embeddings("negative_prompt_embeds", r.negative_prompt_embeds, shape)
    texts = r.prompt
    if texts is None and count is None and not tasks.takes(config).prompt:
        texts = [""] * unsaid
    if (texts is None) == (count is None):
        raise ValueError("give either prompt or prompt_embeds")
    if there is not None and r.negative_prompt:
        raise ValueError("give either negative_prompt or negative_prompt_embeds")
    prompts = negative_prompts = None
    if count is None:
        prompts = check_texts("prompt", texts)
        count = len(prompts)
    if there is None:
        negative_prompts = check_texts("negative_prompt", _or(r.negative_prompt, ""))
        negative_prompts *= 1 if isinstance(r.negative_prompt, (list, tuple)) else count
        there = len(negative_prompts)
    if there != count:
        raise ValueError(f"there are {count} prompts but {there} negative prompts: "
                         "give a string for all or a list of one each")
    return count, prompts, negative_prompts


def _start(latents: object, has_image: bool, has_mask: bool, strength: float | None) -> None:
    if latents is not None and has_image and (not has_mask or strength != 1):
        raise ValueError("give either image or latents to start from, not both")
