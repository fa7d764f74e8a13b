"""Predicted and measured peak memory of a call: `python -m tests.long.peaks 256 384 512`.

SD1.5's sizes in float32 on the CPU, weights included, in a new process for each side in pixels.
With `depth` instead: the depth estimator alone, for images of three aspects.
"""

import subprocess
import sys

import torch
from torch import nn

from bench.timing import CLEAR, resident
from minisd import memory
from minisd.config import SD1, SD2_DEPTH, DPTConfig
from minisd.models.clip import TextEncoder
from minisd.models.dpt import DepthEstimator
from minisd.models.ops import TORCH
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.pipeline import StableDiffusion
from minisd.text.tokenizer import Tokenizer


def official() -> StableDiffusion:
    """With any weights; but they must be written, because untouched memory is not resident."""
    with torch.device("meta"):
        parts = (TextEncoder(SD1.text, TORCH), UNet(SD1.unet, TORCH), VAE(SD1.vae, TORCH))
    for part in parts:
        part.to_empty(device="cpu").requires_grad_(False)
        for p in part.parameters():
            p.fill_(0.001)
    return StableDiffusion(SD1, Tokenizer.clip(SD1.text.pad_token_id), *parts)


def weights(sd: StableDiffusion) -> int:
    parts: list[nn.Module] = [sd.text_encoder, sd.unet, sd.vae]
    return sum(p.nbytes for part in parts for p in part.parameters())


def predicted(sd: StableDiffusion, **call) -> int:
    """Make a call of one step; return what minisd predicted that it needs beside the weights."""
    needs, really = [], memory.activations
    memory.activations = lambda *args: needs.append(really(*args)) or needs[-1]
    try:
        sd("a", num_inference_steps=1, seed=0, progress=False, **call)
    finally:
        memory.activations = really
    return needs[0]


def growth(sd: StableDiffusion, **call) -> tuple[int, int]:
    """(predicted, measured) bytes of one call beside the weights."""
    CLEAR.write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    return predicted(sd, **call), resident("VmHWM") - before


def whole(side: int) -> None:
    before = resident("VmRSS")
    sd = official()
    need = weights(sd) + predicted(sd, height=side, width=side)
    measured = resident("VmHWM") - before
    print(f"SD1.5, {side}x{side}: predicted {need / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, "
          f"ratio {need / measured:.3f}", flush=True)


@torch.no_grad()
def estimator() -> None:
    with torch.device("meta"):
        model = DepthEstimator(DPTConfig(), TORCH)
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.fill_(0.001)
    for height, width in ((64, 64), (384, 384), (384, 768), (384, 1536)):  # the first is a warm-up
        CLEAR.write_text("5")
        before = resident("VmRSS")
        model(torch.zeros(1, 3, height, width))
        measured = resident("VmHWM") - before
        need = memory.activations(
            SD2_DEPTH, (1, 4, 1, 1), 1, True, 4, estimates=(height, width), decodes=False)
        print(f"DPT-hybrid, {width}x{height}: predicted {need / 1e6:.0f} MB, measured "
              f"{measured / 1e6:.0f} MB, ratio {need / measured:.3f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["depth"]:
        estimator()
    elif len(sys.argv) == 2:
        whole(int(sys.argv[1]))
    for each in sys.argv[1:] if len(sys.argv) > 2 else ():
        subprocess.run([sys.executable, "-m", "tests.long.peaks", each], check=True)
