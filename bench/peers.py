"""diffusers' Stable Diffusion, built from minisd's sizes: the peer that minisd is timed beside.

Parameters have the same names on both sides, so that weights pass from one to the other by a strict
load_state_dict.
"""

from collections.abc import Callable

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from bench.models import GUIDANCE, PROMPT, Model, Weights, with_copies
from minisd.config import ScheduleConfig, TextConfig, UNetConfig, VAEConfig


def official_unet(config: UNetConfig, side: int) -> UNet2DConditionModel:
    """``side`` of the latent that it is asked for by default."""
    kinds = ["CrossAttn" if on else "" for on in config.has_attention]
    return UNet2DConditionModel(
        sample_size=side, in_channels=config.in_channels, out_channels=config.out_channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        # In the official configs this key holds the number of heads.
        attention_head_dim=config.num_heads, cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
    )


def official_vae(config: VAEConfig) -> AutoencoderKL:
    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
    )


def official_text_encoder(config: TextConfig) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, hidden_act=config.hidden_act,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as in the published configs; unused
    ))


def official_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """DDIM as in the published scheduler_config.json files."""
    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_start=config.beta_start,
        beta_end=config.beta_end, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=config.prediction_type,
    )


class Theirs:
    """diffusers' pipeline. ``compiled`` as its documentation advises: torch.compile without graph
    breaks, channels_last, projections of q, k and v joined."""

    def __init__(self, model: Model, weights: Weights, compiled: str, device: torch.device):
        quiet()
        self.model, self.device, config = model, device, model.config
        with torch.device("meta"):
            parts = {"text_encoder": official_text_encoder(config.text),
                     "unet": official_unet(config.unet, model.side),
                     "vae": official_vae(config.vae)}
        parts = {part: with_copies(module, weights[part]) for part, module in parts.items()}
        for module in parts["text_encoder"].modules():
            if hasattr(module, "position_ids"):  # in no checkpoint, and so still without values
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
        """(1, 77, D). The ids are minisd's, so that no tokenizer need be built: they are equal."""
        return self.pipe.text_encoder(self.model.tokenizer([text]).to(self.device))[0]

    @torch.no_grad()
    def picture(self, batch: int, steps: int) -> Tensor:
        """(B, 3, H, W) in [0, 1]: text, all the steps, decoding."""
        size = self.model.config.sample_size
        return self.pipe(
            prompt_embeds=self._embeds(PROMPT), negative_prompt_embeds=self._embeds(""),
            num_images_per_prompt=batch, num_inference_steps=steps, guidance_scale=GUIDANCE,
            latents=self.model.noise(batch).to(self.device, self.dtype), height=size, width=size,
            output_type="pt",
        ).images

    @torch.no_grad()
    def step(self) -> Callable[[], Tensor]:
        """One prediction with guidance (1, 4, h, w), asked for as the pipeline asks."""
        context = torch.cat([self._embeds(""), self._embeds(PROMPT)])        # (2, 77, D)
        x, t = self.model.noise(1).to(self.device, self.dtype), torch.tensor(500).to(self.device)

        @torch.no_grad()
        def predict() -> Tensor:
            prediction = self.pipe.unet(
                torch.cat([x, x]), t, encoder_hidden_states=context, timestep_cond=None,
                cross_attention_kwargs=None, added_cond_kwargs=None, return_dict=False)[0]
            without, with_prompt = prediction.chunk(2)                       # (1, 4, h, w)
            return without + GUIDANCE * (with_prompt - without)
        return predict

    @torch.no_grad()
    def decode(self) -> Callable[[], Tensor]:
        """(1, 3, H, W), about [-1, 1]."""
        latent = self.model.noise(1).to(self.device, self.dtype)
        latent = latent / self.model.config.vae.scaling_factor
        return torch.no_grad()(lambda: self.pipe.vae.decode(latent, return_dict=False)[0])

    def release(self) -> None:
        """Nothing is kept for a size."""


def quiet() -> None:
    """What they say of their own progress would break the tables."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
