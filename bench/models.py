"""The models that are timed, minisd and diffusers as their providers, and random weights.

Full sizes have random weights, so that nothing is downloaded: time and memory do not depend on the
values. All providers get copies of the same weights. A provider has ``image(batch, steps)``,
``step()``, ``decode()`` and ``release()``. diffusers and transformers are imported where one of
their models is built; parameters have the same names there, so that a strict load_state_dict copies
the weights.

B images, H W height and width in pixels, h w of the latent, D width of the context
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from minisd_kernels.fused import steps as fused_steps
from torch import Tensor, nn

import minisd
from minisd.backends import resolve
from minisd.config import SD1, SD2_V, Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minisd.loading import build
from minisd.models.ops import TORCH
from minisd.pipeline import StableDiffusion
from minisd.samplers.ddim import ddim
from minisd.samplers.schedule import Ladder, Level
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
        if self.shipped:
            return {part: {name: p.to(device, dtype) for name, p in module.state_dict().items()}
                    for part, module in self.shipped.parts.items()}
        return random_weights(self.config, device, dtype)

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


def random_weights(config: Config, device: torch.device, dtype: torch.dtype) -> Weights:
    """Normal values that keep the scale of activations, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def random(name: str, shape: torch.Size) -> Tensor:
        x = torch.randn(shape, generator=generator, device=device)
        if len(shape) > 1:
            x /= shape[1:].numel() ** 0.5
        else:
            x = 0.1 * x + ("norm" in name and name.endswith("weight"))
        return x.to(dtype)

    return {part: {name: random(name, p.shape) for name, p in module.state_dict().items()}
            for part, module in build(config, TORCH).items()}


def with_copies(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """The module, on the meta device so far, with its own copies of the weights."""
    copies = {name: p.clone() for name, p in weights.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    return module.eval().requires_grad_(False)


class Ours:
    """minisd with the ops of that name, some of them replaced by the caller's ``own``. Raises
    ValueError if they do not run on the device."""

    def __init__(self, model: Model, weights: Weights, name: str, device: torch.device,
                 own: dict[str, Callable] | None = None):
        self.model, self.device = model, device
        backend = resolve(name, None, device, next(iter(weights["unet"].values())).dtype)
        backend = replace(backend, ops=replace(backend.ops, **own or {}))
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
        context = self.sd._context(["", PROMPT], None)                       # (2, 77, D)
        x = self.model.noise(1).to(self.device, torch.promote_types(context.dtype, torch.float32))
        sampler = ddim(Ladder([Level(500, 0.5), Level(None, 1.0)], []))
        readable = Steps(self.sd.unet, context, None, sampler, "epsilon", GUIDANCE)
        if fused := self.sd._fused():
            # uncond + GUIDANCE (cond - uncond), and no x: the prediction itself.
            table = torch.tensor([[[0.0, 1.0 - GUIDANCE, GUIDANCE]]])
            steps = fused_steps.Steps(fused.unet, context, [500], table)
            return lambda: steps(torch.stack([x, x]), 0)[0]
        return lambda: readable.predict(x, 500)

    def decode(self) -> Callable[[], Tensor]:
        """(1, 3, H, W), about [-1, 1]."""
        latent, fused = self.model.noise(1).to(self.sd._weight), self.sd._fused()
        return lambda: self.sd.vae.decode(latent, fused.decoder if fused else None)

    def release(self) -> None:
        """Free the CUDA graphs."""
        if fused := self.sd._fused():
            fused.unet.graphs.clear()


class Theirs:
    """diffusers' pipeline; ``compiled`` is a mode of torch.compile, or empty. Compiled as its
    documentation advises: no graph breaks, channels_last, q, k and v in one projection."""

    def __init__(self, model: Model, weights: Weights, compiled: str, device: torch.device):
        from diffusers import StableDiffusionPipeline

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


# --- the official models, built from minisd's configs ---------------------------------------------


def official_unet(config: UNetConfig, side: int = 8) -> nn.Module:
    """``side``: of the latent, by default."""
    from diffusers import UNet2DConditionModel

    kinds = ["CrossAttn" if on else "" for on in config.has_attention]
    n = config.projection_class_embeddings_input_dim
    return UNet2DConditionModel(
        sample_size=side, in_channels=config.in_channels, out_channels=config.out_channels,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        # In the official configs this key holds the number of heads.
        attention_head_dim=config.num_heads, cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=config.use_linear_projection,
        time_cond_proj_dim=config.time_cond_proj_dim, num_class_embeds=config.num_class_embeds,
        only_cross_attention=config.only_cross_attention or False,
        class_embed_type=None if n is None else "projection",
        projection_class_embeddings_input_dim=n,
        norm_num_groups=config.norm_num_groups,
    )


def official_vae(config: VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
    )


def official_text_encoder(config: TextConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, hidden_act=config.hidden_act,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as in the published configs; unused
    ))


def official_scheduler(config: ScheduleConfig):
    """DDIM as in the published scheduler_config.json files."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=config.num_train_timesteps, beta_start=config.beta_start,
        beta_end=config.beta_end, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=config.timestep_spacing != "leading", steps_offset=1,
        prediction_type=config.prediction_type, timestep_spacing=config.timestep_spacing,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
    )


def quiet() -> None:
    """No log messages and progress bars between the tables."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
