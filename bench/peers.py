"""diffusers' Stable Diffusion: the peer that minisd is timed beside."""

from collections.abc import Callable

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from bench.models import GUIDANCE, PROMPT, Model, Weights, with_copies
from bench.official import (
    official_scheduler,
    official_text_encoder,
    official_unet,
    official_vae,
    quiet,
)


class Theirs:
    """diffusers' pipeline; ``compiled`` is a mode of torch.compile, or empty. Compiled as its
    documentation advises: no graph breaks, channels_last, q, k and v in one projection."""

    def __init__(self, model: Model, weights: Weights, compiled: str, device: torch.device):
        quiet()
        self.model, self.device, config = model, device, model.config
        with torch.device("meta"):
            parts = {"text_encoder": official_text_encoder(config.text),
                     "unet": official_unet(config.unet, model.side),
                     "vae": official_vae(config.vae)}
        parts = {part: with_copies(module, weights[part]) for part, module in parts.items()}
        for module in parts["text_encoder"].modules():
            if hasattr(module, "position_ids"):  # in no checkpoint: still on meta
                ids = torch.arange(config.text.max_position_embeddings, device=device)
                module.position_ids = ids[None]                              # (1, 77)
        self.pipe = StableDiffusionPipeline(
            **parts, tokenizer=None, scheduler=official_scheduler(config.schedule),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.dtype = next(parts["unet"].parameters()).dtype
        if compiled:
            self.pipe.unet.to(memory_format=torch.channels_last)
            self.pipe.fuse_qkv_projections(unet=True, vae=False)
            self.pipe.unet.compile(mode=compiled, fullgraph=True)

    def _embeds(self, text: str) -> Tensor:
        """(1, 77, D), from minisd's ids, which are equal to those of transformers' tokenizer."""
        return self.pipe.text_encoder(self.model.tokenizer([text]).to(self.device))[0]

    @torch.no_grad()
    def image(self, batch: int, steps: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]: text encoder, all the steps, decoder."""
        size = self.model.config.sample_size
        return self.pipe(
            prompt_embeds=self._embeds(PROMPT), negative_prompt_embeds=self._embeds(""),
            num_images_per_prompt=batch, num_inference_steps=steps, guidance_scale=GUIDANCE,
            latents=self.model.noise(batch).to(self.device, self.dtype), height=size, width=size,
            output_type="pt",
        ).images

    @torch.no_grad()
    def step(self) -> Callable[[], Tensor]:
        """One prediction with guidance (1, 4, h, w), by the call that the pipeline makes."""
        context = torch.cat([self._embeds(""), self._embeds(PROMPT)])        # (2, 77, D)
        x, t = self.model.noise(1).to(self.device, self.dtype), torch.tensor(500).to(self.device)

        @torch.no_grad()
        def predict() -> Tensor:
            prediction = self.pipe.unet(
                torch.cat([x, x]), t, encoder_hidden_states=context, timestep_cond=None,
                cross_attention_kwargs=None, added_cond_kwargs=None, return_dict=False)[0]
            uncond, cond = prediction.chunk(2)                               # (1, 4, h, w)
            return uncond + GUIDANCE * (cond - uncond)
        return predict

    @torch.no_grad()
    def decode(self) -> Callable[[], Tensor]:
        """(1, 3, H, W), about [-1, 1]."""
        latent = self.model.noise(1).to(self.device, self.dtype)
        latent = latent / self.model.config.vae.scaling_factor
        return torch.no_grad()(lambda: self.pipe.vae.decode(latent, return_dict=False)[0])

    def release(self) -> None:
        """Nothing to free."""
