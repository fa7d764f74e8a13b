"""The checks of test_traps.py: how far a module of minisd is from the official model.

Each is a function of a module, which may be mutated, and returns the largest error.
"""

import itertools
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from operator import attrgetter
from types import SimpleNamespace
from unittest.mock import patch

import midas
import numpy as np
import official_samplers
import torch
import upscalers
import watermarked
from diffusers import (
    DDPMScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import get_timestep_embedding
from PIL import Image
from reference_models import (
    AUTOENCODER,
    DENOISER,
    DEPTH,
    SMALL,
    SMALL_DEPTH,
    SMALL_UNCLIP,
    SMALL_X4,
    TEXT,
    VISION,
    error,
    official_depth,
    official_depth_pipeline,
    official_dpt,
    official_flags,
    official_pipeline,
    official_scheduler,
    official_text_encoder,
    official_tokenizer,
    official_unclip,
    official_unet,
    official_vae,
    official_vision_tower,
    published_scheduler,
    randn,
    randomise,
    small_model,
    with_weights,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from minisd import conditioning, pipeline, request as request_file
from minisd.conditioning.start import Given, Noise
from minisd.config import PREDICTION_TYPES, ScheduleConfig
from minisd.models import (
    clip as clip_file,
    clip_vision as vision_file,
    dpt as dpt_file,
    unet as unet_file,
    vae as vae_file,
)
from minisd.models.ops import TORCH
from minisd.samplers import ddim as ddim_file, schedule as schedule_file

INPAINT = replace(SMALL, unet=replace(SMALL.unet, in_channels=9))
PUBLISHED = {  # from the JSON files of the official models, by the field's place in Config
    "text.hidden_act": ("quick_gelu", "gelu"),
    "text.num_hidden_layers": (12, 23),
    "text.pad_token_id": (49407, 0),
    "unet.num_heads": ((8, 8, 8, 8), (5, 10, 20, 20)),
    "vae.scaling_factor": (0.18215, 0.18215),
    "schedule.beta_start": (0.00085, 0.00085),
    "schedule.beta_end": (0.012, 0.012),
}

PUBLISHED_X4 = {
    "text.num_hidden_layers": 23, "text.hidden_act": "gelu", "unet.num_heads": (8, 8, 8, 8),
    "unet.only_cross_attention": (True, True, True, False), "vae.scaling_factor": 0.08333,
    "vae.force_float32": True, "schedule.beta_start": 0.0001, "schedule.beta_end": 0.02,
    "schedule.prediction_type": "v_prediction", "low_res_schedule.beta_start": 0.0001,
    "low_res_schedule.beta_end": 0.02, "noise_level": 20, "max_noise_level": 350,
    "num_inference_steps": 75, "guidance_scale": 9.0,
}


def official_error(ours, official, *args) -> float:
    """How far our module is from the official one with the same weights."""
    ours = ours.double()
    ours.load_state_dict(official.state_dict())
    return error(ours(*args), official(*args)[0])


# --- one module ----------------------------------------------------------------------------------


@cache
def unet_case():
    config = replace(DENOISER, layers_per_block=1)
    official = with_weights(official_unet(config), randomise(unet_file.UNet(config, TORCH)))
    t = torch.tensor([999, 1])
    return config, official, (randn(2, 4, 8, 12), t, randn(2, 7, 20, seed=1))


@cache
def clip_case(act):
    config = replace(TEXT, vocab_size=100, hidden_act=act)
    ours = randomise(clip_file.TextEncoder(config, TORCH))
    return config, with_weights(official_text_encoder(config), ours)


@cache
def vae_case():
    return with_weights(official_vae(AUTOENCODER), randomise(vae_file.VAE(AUTOENCODER, TORCH)))


def unet(module, ops=TORCH):
    config, official, args = unet_case()
    return official_error(module.UNet(config, ops), official, *args)


def transformer(module):
    with patch.object(unet_file, "SpatialTransformer", module.SpatialTransformer):
        return unet(unet_file)


def clip(module, ops=TORCH):
    ids = torch.arange(70)[None]
    cases = [clip_case(act) for act in ("quick_gelu", "gelu")]
    return max(official_error(module.TextEncoder(c, ops), official, ids) for c, official in cases)


@cache
def vision_case(act):
    config = replace(VISION, hidden_act=act)
    ours = randomise(vision_file.VisionTower(config, TORCH))
    return config, with_weights(official_vision_tower(config), ours)


def clip_vision(module):
    pixels, cases = randn(2, 3, 12, 12), [vision_case(act) for act in ("quick_gelu", "gelu")]
    return max(official_error(module.VisionTower(c, TORCH), official, pixels)
               for c, official in cases)


def safety(module):
    """The cosine, in float32, and how many flags differ: every margin about the edges, twice."""
    a, b = randn(2, 16), randn(17, 16, seed=1)
    wrong = error(module.cosine(a, b), torch.cosine_similarity(a[:, None], b[None], dim=-1))
    margins = [-0.0201, -0.0101, -0.0096, -0.0094, 0.0004, 0.0006, 0.1]
    rows = torch.tensor([*itertools.product(margins, repeat=3)])
    special, concepts = torch.full((len(rows), 3), -1.0), torch.full((len(rows), 17), -1.0)
    special[:, 0], special[:, 2], concepts[:, 5] = rows.unbind(dim=1)
    ours = (module.scores(special, concepts) > 0).any(dim=1).tolist()
    theirs = official_flags(special, concepts)
    return sum(a != b for a, b in zip(ours, theirs)) + (wrong if wrong > 1e-6 else 0)


def unclip(module):
    official = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    wrong = error(module.alphas_cumprod().sqrt(), official.sqrt())  # theirs is in float32
    x, mean, noise = (randn(2, 8, seed=seed) for seed in range(3))
    std, abar = mean.exp(), module.alphas_cumprod()[100].item()
    noised = (abar**0.5 * (x - mean) / std + (1 - abar) ** 0.5 * noise) * std + mean
    told = get_timestep_embedding(torch.tensor([100, 100]), 8, True, 0)
    ours = module.augmented(x, mean, std, 100, noise)
    return max(error(ours, torch.cat([noised, told], dim=1)), wrong if wrong > 1e-5 else 0)


def unclip_start(module):
    """What the UNet is told with guidance, and x_T, from one generator."""
    sd, official, errors = small_model(SMALL_UNCLIP), official_unclip(small_model(SMALL_UNCLIP)), []
    for level in (0, 300):
        call = dict(image_embeds=randn(1, 16), noise_level=level, width=24, height=16)
        plan, generator = request_file.Request(seed=3, **call).plan(sd.config), seeded(3)
        noise = Noise(plan.generators, randn(1, 4, 4, 6))
        start = module.start(Given(
            plan, noise, sd.vae.encode, sd.depth_map, sd.vision, sd.image_normalizer))
        told = official._encode_image(
            None, "cpu", 1, 1, True, level, generator, call["image_embeds"])
        x_T = torch.randn(1, 4, 4, 6, generator=generator)
        errors += [error(start.class_vector, told), error(start.x, x_T)]
    return max(errors)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ops(module):
    both = module.REFERENCE, module.TORCH
    return max(check(*pair) for check, pair in (
        (check, (part, ops)) for ops in both
        for check, part in ((unet, unet_file), (clip, clip_file))
    ))


def vae(module):
    ours, official = module.VAE(AUTOENCODER, TORCH).double(), vae_case()
    ours.load_state_dict(official.state_dict())
    image, noise = randn(2, 3, 24, 20).tanh(), randn(2, 4, 6, 5, seed=1)
    posterior, scale = official.encode(image).latent_dist, official.config.scaling_factor
    sample = scale * (posterior.mean + posterior.std * noise)
    errors = [error(ours.encode(image, noise), sample),
              error(ours.decode(noise), official.decode(noise / scale).sample)]
    for logvar in (-1000.0, 1000.0):  # far past where it is clamped
        ours.quant_conv.bias[4:] = logvar
        errors.append(error(ours.moments(image)[1], torch.full_like(noise, logvar).clamp(-30, 20)))
    return max(errors)


@cache
def dpt_case():
    """Small tokens, for which eps counts; and depths of which some are below 0 before the ReLU."""
    ours = randomise(dpt_file.DepthEstimator(DEPTH, TORCH))
    parts = ours.dpt.embeddings
    for p in (*parts.projection.parameters(), parts.position_embeddings, parts.cls_token):
        p.mul_(0.01)
    official, image = with_weights(official_dpt(DEPTH), ours), randn(2, 3, 64, 96).tanh()
    ours.head["head"][4].bias -= ours(image).median()
    official.load_state_dict(ours.state_dict())
    return official, image


def dpt(module):
    official, image = dpt_case()
    ours = module.DepthEstimator(DEPTH, TORCH).double()
    ours.load_state_dict(official.state_dict())
    return error(ours(image), official_depth(official, image))


def bit(module):
    with patch.object(dpt_file, "ResNet", module.ResNet):
        return dpt(dpt_file)


def names_depth(module):
    """The depth of a single file, by MiDaS, and of what its names make of it."""
    official, image = dpt_case()
    tensors = dict(official.state_dict())
    stacked = {name: torch.cat([tensors[p] for p in parameters])
               for name, parameters in module.depth(DEPTH).items() if parameters[0] in tensors}
    return error(midas.depth(stacked, image, DEPTH), official_depth(official, image))


@cache
def upscaled():
    """A call of the small upscaler, and what diffusers makes of it."""
    call = dict(prompt="a heart", image=upscalers.image(8, 4), num_inference_steps=2,
                output_type="latent")
    pipeline = upscalers.official_upscaler(small_model(SMALL_X4))
    return call, pipeline(**call, generator=torch.Generator().manual_seed(3)).images


def upscale(module):
    call, official = upscaled()
    with patch.dict(conditioning.STARTS, {"upscaling": module.start}):
        return error(small_model(SMALL_X4)(seed=3, **call).images, official)


def depth_config(module):
    ours = module.DPTConfig()
    return (ours.num_attention_heads, ours.norm_num_groups, ours.out_indices) != (12, 32, (8, 11))


def depth(module):
    maps = torch.stack([randn(9, 14), 1e3 + 5 * randn(9, 14, seed=1)])
    theirs = StableDiffusionDepth2ImgPipeline.prepare_depth_map(
        SimpleNamespace(vae_scale_factor=8), randn(1, 3, 48, 40), maps, 2, False, maps.dtype, "cpu")
    return error(module.normalised(maps, (6, 5)), theirs)


def depth_maps(module):
    """transformers' preprocessing, told to keep the aspect as MiDaS does."""
    official = DPTImageProcessorPil(
        size={"height": 384, "width": 384}, keep_aspect_ratio=True, ensure_multiple_of=32,
        resample=Image.Resampling.BICUBIC, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    errors = []
    for size in ((640, 480), (65, 200), (1000, 300), (256, 768), (400, 384)):
        image = DRAWING.resize(size)
        ours, theirs = module.prepared(image), official(image, return_tensors="pt").pixel_values
        errors.append(error(ours, theirs) if ours.shape == theirs.shape else 1.0)
    return max(errors)


def tokenizer(module):
    prompts = ["A Red Heart", "heart " * 100, "two stars, a boat"]
    wrong = module.Tokenizer.clip(49407)("wow!")[0, 1:3].tolist() != [2781, 256]
    for pad in (49407, 0):
        theirs = official_tokenizer(pad)(
            prompts, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
        wrong += error(module.Tokenizer.clip(pad)(prompts), theirs)
    return wrong


def schedule(module):
    return sampling(module, ddim_file)


def ddim(module):
    return sampling(schedule_file, module)


def sampling(schedule, ddim):
    config = ScheduleConfig()
    roots = np.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000)
    alphas = torch.from_numpy(np.cumprod(1 - roots**2))
    errors = [error(schedule.alphas_cumprod(config), alphas)]
    turbo = replace(config, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                    timestep_spacing="trailing")
    official = published_scheduler(turbo)
    official.set_timesteps(7)
    errors.append(error(timesteps(schedule.trailing(7, [0.5] * 1000)), official.timesteps))
    wrong = error(schedule.alphas_cumprod(turbo), official.alphas_cumprod)
    errors.append(wrong if wrong > 1e-5 else 0)  # theirs is in float32
    x, prediction, noise = (3 * randn(2, 4, 3, 3, seed=seed) for seed in range(3))
    for kind in PREDICTION_TYPES:
        scheduler = official_scheduler(replace(config, prediction_type=kind))
        scheduler.set_timesteps(7)
        errors.append(error(timesteps(schedule.leading(7, [0.5] * 1000)), scheduler.timesteps))
        t, t_next = scheduler.timesteps[3:5].tolist()
        a, a_next = alphas[t].item(), alphas[t_next].item()
        for eta in (0.0, 1.0):
            z = noise if eta else None
            theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=z).prev_sample
            ladder = schedule.Ladder([schedule.Level(t, a), schedule.Level(t_next, a_next)], [])
            x0, eps = schedule.predicted_x0_eps(x, prediction, a, kind)
            ours, _ = ddim.ddim(ladder, eta).step(0, x, x0, eps, (), noise)
            errors.append(error(ours, theirs))
    theirs = scheduler.add_noise(x, noise, torch.tensor([t, t]))
    return max(*errors, error(schedule.add_noise(x, noise, a), theirs))


def solver(module, name, scheduler, eta=None, **settings):
    """The error of a sampler's result against diffusers', over 7 steps."""
    own, x = {} if eta is None else dict(eta=eta), randn(2, 4, 3, 3)
    theirs = official_samplers.official(scheduler, 7, **settings)
    ladder = official_samplers.ladder_of(theirs)
    want = official_samplers.official_run(theirs, x, **own if name == "tcd" else {})
    ours = official_samplers.run(getattr(module, name)(ladder, **own), want[0], "epsilon")
    return official_samplers.worst(ours[-1:], want[-1:])


def dpm_solver(module):
    sde = dict(eta=1.0, algorithm_type="sde-dpmsolver++")
    return max(solver(module, "dpmpp_2m", "DPMSolverMultistepScheduler", **options)
               for options in ({}, sde))


def unipc(module):
    return solver(module, "unipc", "UniPCMultistepScheduler")


def heun(module):
    return solver(module, "heun", "HeunDiscreteScheduler")


def lms(module):
    return max(solver(module, "plms", "PNDMScheduler"),
               solver(module, "lms", "LMSDiscreteScheduler"))


def dpm2(module):
    """diffusers tells the UNet other timesteps between the levels; this is for the ratios."""
    ladder, errors = schedule_file.ladder("karras", 5, official_samplers.ABARS), []
    shown = module.with_midpoints(ladder, 1.0)[:9]
    for now, middle, after in zip(shown[::2], shown[1::2], shown[2::2]):
        down, up = module.ancestral(now, after, 1.0)
        errors += [abs(down**2 + up**2 - after.ratio**2),
                   abs(up**2 - after.ratio**2 * (1 - after.ratio**2 / now.ratio**2)),
                   abs(2 * middle.lam - now.lam + np.log(down))]
    return max(errors)


def lcm(module):
    """By hand at t = 1, where x still counts; at diffusers' timesteps its weight is below 1e-5."""
    ladder = schedule_file.Ladder([schedule_file.Level(1, 0.9), schedule_file.Level(None, 1.0)], [])
    x, x0 = randn(3), randn(3, seed=1)
    found, _ = module.lcm(ladder).step(0, x, x0, None, (), 0.0)
    return error(found, x * 0.25 / (100 + 0.25) + x0 * 10 / (100 + 0.25) ** 0.5)


def tcd(module):
    return solver(module, "tcd", "TCDScheduler", eta=0.3)


def timesteps(levels):
    return torch.tensor([level.t for level in levels])


def tasks(module):
    official = official_pipeline(StableDiffusionImg2ImgPipeline, small_model(SMALL))
    errors = []
    for steps, strength in itertools.product((10, 30, 50), (0.1, 0.25, 0.55, 0.75, 0.85, 1.0)):
        _, ours = module.strength(strength, steps, True, False)
        official.scheduler.set_timesteps(steps)
        theirs, _ = official.get_timesteps(steps, strength, "cpu")
        errors.append(abs(ours - len(theirs)))
    return max(errors)


def images(module):
    colour = VaeImageProcessor()
    grey = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    drawing = Image.fromarray((255 * randn(30, 50, 3).sigmoid()).byte().numpy())
    pixels = randn(1, 3, 8, 8).sigmoid()
    theirs = colour.numpy_to_pil(colour.pt_to_numpy(pixels))[0]
    levels = [torch.tensor(np.array(x)) for x in (module.to_pil(pixels)[0], theirs)]
    longer = drawing.crop((0, 0, 47, 30))  # 350.9 pixels, where the shorter side has 224
    read = CLIPImageProcessorPil()(longer, return_tensors="pt").pixel_values
    wrong = error(module.to_clip(longer), read)
    return max(
        wrong if wrong > 1e-6 else 0,  # theirs is in float32, too
        error(*levels),
        error(module.to_tensor(drawing, 24, 16), colour.preprocess(drawing, 16, 24)),
        error(module.mask_to_tensor(drawing, 24, 16), grey.preprocess(drawing, 16, 24)),
    )


def config(module):
    acts = module.VIT_L.hidden_act, module.VIT_H.hidden_act
    return (acts != ("quick_gelu", "gelu")) + sum(
        attrgetter(field)(model) != value
        for field, values in PUBLISHED.items()
        for model, value in zip((module.SD1, module.SD2), values)
    )


def x4_config(module):
    x4 = module.X4_UPSCALER
    return sum(attrgetter(field)(x4) != value for field, value in PUBLISHED_X4.items())


def watermark(module) -> float:
    """The share of the package's kept outputs that do not come out."""
    wrong = []
    for size, payload, pixels, left in watermarked.KEPT:
        marked = module.embed(watermarked.drawing(*size), payload)
        read = module.read(marked, len(payload))
        wrong.append((watermarked.pixels_hash(marked), read) != (pixels, left))
    return sum(wrong) / len(wrong)


# --- the same for the loop, on three tasks -------------------------------------------------------

DRAWING = Image.fromarray((255 * randn(16, 24, 3).sigmoid()).byte().numpy())
MASK = Image.fromarray(np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) % 11 > 4)  # ragged
PROMPTS = ["a heart", "a boat"]
CALL = dict(
    num_images_per_prompt=2, num_inference_steps=4, output_type="latent", width=24, height=16
)
TASKS = {
    "text_to_image": (StableDiffusionPipeline, [SMALL], dict(eta=0.5)),
    "image_to_image": (
        StableDiffusionImg2ImgPipeline, [SMALL], dict(image=DRAWING, strength=0.5)
    ),
    "inpainting": (
        StableDiffusionInpaintPipeline, [INPAINT, SMALL],
        dict(image=DRAWING, mask_image=MASK, strength=1.0),
    ),
    "depth_to_image": (
        StableDiffusionDepth2ImgPipeline, [SMALL_DEPTH],
        dict(image=DRAWING, depth_map=randn(4, 5, 7), strength=1.0),
    ),
}


@cache
def official_latents(task, model):
    kind, _, call = TASKS[task]
    call = CALL | call
    if task in ("image_to_image", "depth_to_image"):  # which take the size of the image
        call = {k: v for k, v in call.items() if k not in ("width", "height")}
    if task == "inpainting":  # which encodes as many images as it is given
        call = call | dict(image=[DRAWING] * 4, mask_image=[MASK] * 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    sd = small_model(model)
    pipeline = official_depth_pipeline(sd) if model.depth else official_pipeline(kind, sd)
    return pipeline(PROMPTS, generator=generators, **call).images


TAKEN = [(request_file, "SAMPLERS"), (pipeline, "Noise"), (pipeline, "Steps"),
         (conditioning, "image_to_image"),
         (conditioning, "text_to_image")]
INPAINTS = {"by_blending": "text to image", "by_channels": "inpainting"}
KINDS = {"minisd.conditioning.depth": "depth"}


def loop(task):
    def check(module):
        errors = []
        for model in TASKS[task][1]:
            m = small_model(model)
            kind = getattr(module, "StableDiffusion", pipeline.StableDiffusion)
            sd = kind(model, m.tokenizer, m.text_encoder, m.unet, m.vae)
            with ExitStack() as patched:
                for user, name in TAKEN:  # where the loop takes a name from a mutated module
                    if hasattr(module, name):
                        patched.enter_context(patch.object(user, name, getattr(module, name)))
                for name, kind in INPAINTS.items():
                    if hasattr(module, name):
                        patched.enter_context(
                            patch.dict(conditioning.STARTS, {kind: getattr(module, name)}))
                if starts := KINDS.get(module.__name__):
                    patched.enter_context(
                        patch.dict(conditioning.STARTS, {starts: module.start}))
                ours = sd(PROMPTS, seed=0, **CALL, **TASKS[task][2]).images
            errors.append(error(ours, official_latents(task, model)))
        return max(errors)
    return check
