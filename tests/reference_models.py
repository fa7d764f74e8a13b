"""The reference models of the parity tests: the official classes, built from minisd's configs.

Modules have the same names on both sides, so that they can be compared one by one.
"""

import gzip
from dataclasses import asdict
from functools import cache
from importlib import resources
from unittest.mock import patch

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion import safety_checker
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from diffusers.utils.torch_utils import randn_tensor
from small_models import (  # noqa: F401 - for the tests
    AUTOENCODER,
    DENOISER,
    DEPTH,
    SMALL,
    SMALL_DEPTH,
    SMALL_UNCLIP,
    SMALL_V,
    SMALL_X4,
    SMALL_ZERO,
    TEXT,
    VISION,
    error,
    randn,
    randomise,
    small_model,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    BitConfig,
    CLIPConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    DPTConfig as OfficialDPTConfig,
    DPTForDepthEstimation,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from bench.models import (
    official_scheduler as published_scheduler,
    official_text_encoder,
    official_unet,
    official_vae,
)
from minisd.conditioning import unclip
from minisd.config import DPTConfig, ScheduleConfig, VisionConfig
from minisd.pipeline import StableDiffusion
from minisd.samplers import schedule
from minisd.samplers.ddim import ddim
from minisd.samplers.schedule import Ladder, Level


def with_weights(official: nn.Module, ours: nn.Module) -> nn.Module:
    """The official model with all our parameters, by name, in our dtype."""
    official = official.to(next(ours.parameters()).dtype)  # first: else the copy rounds
    official.load_state_dict(ours.state_dict(), strict=True)
    return official.eval().requires_grad_(False)


def official_dpt(config: DPTConfig, **settings) -> DPTForDepthEstimation:
    """transformers' DPT-hybrid as in depth_estimator/config.json, with the eps of MiDaS."""
    bit = BitConfig(
        embedding_size=config.embedding_size, hidden_sizes=list(config.hidden_sizes),
        depths=list(config.depths), num_groups=config.norm_num_groups, layer_type="bottleneck",
        global_padding="SAME", embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"])
    width, side = config.hidden_size, config.image_size // 16
    return DPTForDepthEstimation(OfficialDPTConfig(**dict(
        is_hybrid=True, backbone_config=bit, hidden_size=width,
        intermediate_size=config.intermediate_size, image_size=config.image_size,
        num_hidden_layers=config.num_hidden_layers, layer_norm_eps=1e-6,
        num_attention_heads=config.num_attention_heads, reassemble_factors=[1, 1, 1, 0.5],
        backbone_out_indices=[0, 1, *config.out_indices],
        neck_hidden_sizes=[*config.hidden_sizes[:2], width, width],
        fusion_hidden_size=config.fusion_hidden_size,
        backbone_featmap_shape=[1, config.hidden_sizes[-1], side, side],
    ) | settings))


def official_depth(official: DPTForDepthEstimation, image: Tensor) -> Tensor:
    """Its depth (B, H, W), also of an image that is no square of its own size, which it refuses."""
    height, width = image.shape[2:]
    stage = official.neck.reassemble_stage
    with patch.object(official.dpt.embeddings, "image_size", (height, width)), patch.object(
            stage, "forward", lambda maps, *_: type(stage).forward(
                stage, maps, height // 16, width // 16)):
        return official(image).predicted_depth


def official_vision_tower(config: VisionConfig) -> CLIPVisionModelWithProjection:
    """transformers' image tower."""
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**asdict(config)))


def official_safety_checker(config: VisionConfig) -> safety_checker.StableDiffusionSafetyChecker:
    """diffusers' safety checker."""
    return safety_checker.StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=asdict(config), projection_dim=config.projection_dim))


def official_flags(special: Tensor, concepts: Tensor) -> list[bool]:
    """What diffusers' safety checker flags, given the margins of its vectors over thresholds of 0.
    """
    checker = official_safety_checker(VISION)
    for thresholds in (checker.special_care_embeds_weights, checker.concept_embeds_weights):
        thresholds.zero_()
    margins = {3: special, 17: concepts}
    with patch.object(safety_checker, "cosine_distance", lambda e, rows: margins[len(rows)]):
        return checker(torch.zeros(len(special), 3, 12, 12), torch.zeros(len(special), 1))[1]


def official_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    """DDIM as in the published scheduler_config.json files, with the schedule in float64."""
    scheduler = published_scheduler(config)
    # diffusers keeps this table in float32, which hides all differences below 1e-7.
    scheduler.alphas_cumprod = schedule.alphas_cumprod(config)
    if config.timestep_spacing == "leading":
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def ddim_step(x, prediction, abar: float, after: float, kind: str, eta=0.0, noise=0.0):
    """One step of DDIM from one abar (alpha-bar) to another."""
    sampler = ddim(Ladder([Level(0, abar), Level(0, after)], []), eta)
    x, _ = sampler.step(0, x, *schedule.predicted_x0_eps(x, prediction, abar, kind), (), noise)
    return x


@cache
def official_tokenizer(pad_token_id: int) -> CLIPTokenizer:
    """CLIP's vocabulary from its merges; SD2 pads with "!", id 0."""
    packed = resources.files("minisd.text").joinpath("merges.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().splitlines()[1:]]
    alphabet = sorted(ByteLevel.alphabet())
    symbols = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    vocab = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(
        vocab, merges, pad_token=list(vocab)[pad_token_id], model_max_length=77
    )


def official_ids(theirs: CLIPTokenizer, prompts, pad_token_id: int | None = None) -> Tensor:
    out = theirs(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    if pad_token_id is None:
        return out.input_ids
    return torch.where(out.attention_mask.bool(), out.input_ids, pad_token_id)


@cache
def official_pipeline(kind: type[DiffusionPipeline], sd: StableDiffusion) -> DiffusionPipeline:
    """diffusers' pipeline of that kind with the weights of our model."""
    config = sd.config
    pipeline = kind(
        vae=with_weights(official_vae(config.vae), sd.vae),
        text_encoder=with_weights(official_text_encoder(config.text), sd.text_encoder),
        tokenizer=official_tokenizer(config.text.pad_token_id),
        unet=with_weights(
            official_unet(config.unet, config.sample_size // config.vae.downscale), sd.unet
        ),
        scheduler=official_scheduler(config.schedule),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def official_depth_pipeline(sd: StableDiffusion) -> StableDiffusionDepth2ImgPipeline:
    """diffusers' pipeline for depth, with the weights of our model; it makes squares of images."""
    config, side = sd.config, sd.config.depth.image_size
    pipeline = StableDiffusionDepth2ImgPipeline(
        vae=with_weights(official_vae(config.vae), sd.vae),
        text_encoder=with_weights(official_text_encoder(config.text), sd.text_encoder),
        tokenizer=official_tokenizer(config.text.pad_token_id),
        unet=with_weights(
            official_unet(config.unet, config.sample_size // config.vae.downscale), sd.unet
        ),
        scheduler=official_scheduler(config.schedule),
        depth_estimator=with_weights(official_dpt(config.depth), sd.depth_estimator),
        feature_extractor=DPTImageProcessorPil(
            size={"height": side, "width": side}, resample=3, image_mean=[0.5] * 3,
            image_std=[0.5] * 3),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def official_unclip(sd: StableDiffusion) -> StableUnCLIPImg2ImgPipeline:
    """diffusers' pipeline of Stable unCLIP with the weights of our model."""
    vision, plain = sd.config.vision, official_pipeline(StableDiffusionPipeline, sd)
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    noising.alphas_cumprod = unclip.alphas_cumprod()  # theirs is in float32
    pipeline = StableUnCLIPImg2ImgPipeline(
        vae=plain.vae, text_encoder=plain.text_encoder, tokenizer=plain.tokenizer, unet=plain.unet,
        scheduler=plain.scheduler, image_noising_scheduler=noising,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": vision.image_size},
            crop_size={"height": vision.image_size, "width": vision.image_size}),
        image_encoder=with_weights(official_vision_tower(vision), sd.image_encoder),
        image_normalizer=official_normalizer(sd.image_normalizer),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def official_normalizer(ours: nn.Module) -> StableUnCLIPImageNormalizer:
    """diffusers' mean and standard deviation of embeddings, whose own ``to`` takes no dtype."""
    official = StableUnCLIPImageNormalizer(ours.mean.shape[1])
    official.load_state_dict(ours.state_dict(), assign=True)
    return official


def record(model: nn.Module, *args) -> dict[str, Tensor]:
    """The output of every module inside ``model`` in one forward pass, by name."""
    seen = {}

    def keep(name: str):
        def hook(module, inputs, output):
            if isinstance(output, Tensor):
                seen[name] = output.clone()
        return hook

    hooks = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    try:
        model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def errors_by_module(ours: nn.Module, official: nn.Module, *args) -> dict[str, float]:
    """The error of each module that has the same name on both sides, for the same arguments."""
    a, b = record(ours, *args), record(official, *args)
    return {name: error(a[name], b[name]) for name in a if name in b}


def draw_noise_in_float32(monkeypatch, *more: dict) -> None:
    """Make diffusers draw noise in float32, as minisd does, not in the model's dtype; also where
    ``more`` namespaces name its function."""
    def drawn(shape, generator=None, device=None, dtype=None, layout=None):
        return randn_tensor(shape, generator, device, torch.float32, layout).to(dtype)

    folder = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"
    for module in (folder, f"{folder}_img2img", f"{folder}_inpaint", f"{folder}_depth2img",
                   f"{folder}_upscale",
                   "diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img",
                   "diffusers.models.autoencoders.vae", "diffusers.schedulers.scheduling_ddim"):
        monkeypatch.setattr(f"{module}.randn_tensor", drawn)
    for names in more:
        monkeypatch.setitem(names, "randn_tensor", drawn)
