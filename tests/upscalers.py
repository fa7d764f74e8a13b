"""diffusers' pipeline of the x4 upscaler with the weights of our small model, and its images."""

from functools import cache

from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionUpscalePipeline
from PIL import Image
from reference_models import official_pipeline, randn

from minisd.pipeline import StableDiffusion
from minisd.samplers import schedule

PARTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
@cache
def official_upscaler(sd: StableDiffusion) -> StableDiffusionUpscalePipeline:
    """Its second schedule is that of the published low_res_scheduler, in float64."""
    parts = official_pipeline(StableDiffusionPipeline, sd).components
    low_res = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="scaled_linear")
    low_res.alphas_cumprod = schedule.alphas_cumprod(sd.config.low_res_schedule)
    pipeline = StableDiffusionUpscalePipeline(
        **{name: parts[name] for name in PARTS}, low_res_scheduler=low_res,
        max_noise_level=sd.config.max_noise_level)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image(width: int, height: int, seed: int = 5) -> Image.Image:
    """Noise in colours."""
    pixels = 255 * randn(height, width, 3, seed=seed).sigmoid()
    return Image.fromarray(pixels.byte().numpy())
