"""Train the shipped model: a small Stable Diffusion of emoji.

    python -m weights.recipe.train gpu --out DIR   # 128x128 pixels, on one CUDA device
    python -m weights.recipe.train cpu --out DIR   # 64x64 pixels, in five hours of CPU time

Run it in the root of the repository. It needs npm, which fetches the emoji, and makes the folder
DIR. The same command resumes a run that was killed. scenes.py makes the training data.

B scenes in a batch, S side of an image, C h w a latent, D width of the context
"""

import argparse
import copy
import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import minisd
from minisd.checkpoints.save import save_model
from minisd.checkpoints.tokenizer_folder import read_tokenizer
from minisd.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minisd.files import check_writable
from minisd.models.clip import TextEncoder
from minisd.models.ops import TORCH, reference_attention
from minisd.models.unet import UNet
from minisd.models.vae import VAE
from minisd.samplers import schedule
from weights.recipe.scenes import HELD_BACK, STATE, Scenes, catalogue, compose
from weights.recipe.stage import Run


@dataclass(frozen=True)
class Plan:
    size: int                      # of an image, in pixels
    things: int                    # number of objects: those with the shortest names
    vae: tuple[int, ...]           # widths of the autoencoder
    channels: int                  # of a latent
    unet: tuple[int, ...]          # widths; attention at the last level only, where it costs least
    minutes: tuple[float, ...]     # GPU or CPU time of the stages: autoencoder, text, diffusion
    batch: tuple[int, ...]         # batch sizes of the same stages
    plain: float                   # share of scenes of one object, as large as the image


PLANS = {
    "gpu": Plan(128, 2000, (32, 48, 64, 88), 12, (112, 176), (5.5, 1.5, 14), (64, 512, 256), 0.4),
    "cpu": Plan(64, 512, (24, 48, 96), 6, (48, 96, 176), (88, 50, 180), (8, 64, 16), 0.55),
}
WIDTH = 192  # of the context
LEVELS = 2  # noise levels per latent in a batch of the diffusion stage
GRID = 4  # the text stage divides a latent into GRID x GRID parts and predicts each
KL_WEIGHT, EDGE_WEIGHT = 2e-4, 0.5  # of the losses of the autoencoder
SHEET_EVERY = 1000  # steps between two sheets of samples
SAMPLES = ["a red heart on a blue background", "a rocket on a black background", "a sunflower",
           "a small guitar at the top", "a pizza beside a banana on a gray background"]


class Recipe:
    """The three stages of training, and what they share: networks, data, device."""

    def __init__(self, plan: Plan, state: Path):
        self.plan, self.state = plan, state
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # torch.compile of torch 2.13 computes wrong gradients on a CPU under autocast to bfloat16.
        self.compiled = torch.compile if self.device == "cuda" else lambda function: function
        self.objects = json.loads((state / "objects.json").read_text())["objects"]
        self.rgba = load_file(state / "objects.safetensors")["rgba"].to(self.device)
        self.tokenizer = ids = read_tokenizer(state / "tokenizer")
        c, n = plan.channels, len(plan.unet)
        self.config = Config(
            "tiny",
            TextConfig(ids.vocab_size, WIDTH, 4 * WIDTH, 2, 4, pad_token_id=ids.pad_token_id),
            UNetConfig(c, c, plan.unet, 1, (*[False] * (n - 1), True), (4,) * n, WIDTH, False, 16),
            VAEConfig(plan.vae, 1, c, norm_num_groups=8, scaling_factor=1.0),
            ScheduleConfig(prediction_type="v_prediction"), plan.size,
        )
        # The backward pass of torch's fused attention is slow in bfloat16 on a CPU.
        ops = replace(TORCH, attention=reference_attention) if self.device == "cpu" else TORCH
        self.half = partial(torch.autocast, self.device, torch.bfloat16)
        self.vae, self.unet = VAE(self.config.vae, ops), UNet(self.config.unet, ops)
        self.encoder = TextEncoder(self.config.text, ops)
        for model in (self.vae, self.encoder, self.unet):
            model.to(self.device, memory_format=torch.channels_last)
        self.encode = self.compiled(self.vae.encode)

    def batches(self, run: Run, stage: int, objects: list[dict]):
        """Images (B, 3, S, S) and the ids of their captions (B, 77)."""
        scenes = Scenes(objects, self.plan.plain, self.plan.batch[stage], self.tokenizer)
        for *scene, ids in run.batches(scenes):
            yield compose(self.rgba, *scene), ids

    @torch.no_grad()
    def latents(self, image: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) of images (B, 3, S, S)."""
        with self.half():
            return self.encode(image).float()

    def train_vae(self) -> None:
        """Minimise L1 on pixels + EDGE_WEIGHT * L1 on differences of neighbouring pixels (edges) +
        KL_WEIGHT * KL(N(mean, var) || N(0, 1)). Then measure the scaling factor of the latents."""
        run = Run(self.state / "vae", [self.vae], self.plan.minutes[0])
        shown = [thing for i, thing in enumerate(self.objects) if i % HELD_BACK]
        moments, decode = self.compiled(self.vae.moments), self.compiled(self.vae.decode)
        for image, _ in self.batches(run, 0, shown):
            with self.half():
                mean, logvar = (m.float() for m in moments(image))           # (B, C, h, w)
                latent = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
                diff = decode(latent).float() - image                        # (B, 3, S, S)
            edges = diff.diff(dim=-1).abs().mean() + diff.diff(dim=-2).abs().mean()
            kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
            run.update(diff.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl)
        scenes = Scenes(self.objects, self.plan.plain, 256, self.tokenizer)
        *scene, _ = (tensor.to(self.device) for tensor in scenes[0])
        scale = 1 / self.latents(compose(self.rgba, *scene)).std().item()
        self.vae.config = replace(self.config.vae, scaling_factor=scale)
        self.config = replace(self.config, vae=self.vae.config)

    def train_text(self) -> None:
        """Train the text encoder to predict the latent; the loss is the squared error. Each of the
        last 16 of the 77 outputs predicts one of 4x4 parts, all through the same linear layer. The
        UNet then only has to learn which output to attend to. Stable Diffusion's text encoder was
        pretrained with images too, by CLIP's contrastive loss."""
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight, std=0.1)
        nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.1)
        part = self.plan.size // self.config.vae.downscale // GRID
        head = nn.Linear(WIDTH, self.plan.channels * part**2).to(self.device)
        run = Run(self.state / "text", [self.encoder, head], self.plan.minutes[1])
        for image, ids in self.batches(run, 1, self.objects):
            parts = nn.functional.unfold(self.latents(image), part, stride=part)
            with self.half():
                pred = head(self.encoder(ids)[:, -(GRID**2) :]).float()      # (B, 16, C*h*w/16)
            run.update((pred - parts.mT).square().mean())

    def train_diffusion(self) -> None:
        """Train the UNet to predict v: minimise E ||v - v_theta(x_t, t, context)||^2. The text
        encoder is frozen, as in Stable Diffusion."""
        run = Run(self.state / "diffusion", [self.unet], self.plan.minutes[2])
        unet = self.compiled(self.unet)
        alphas_cumprod = schedule.alphas_cumprod(self.config.schedule).float().to(self.device)
        for image, ids in self.batches(run, 2, self.objects):
            x0 = self.latents(image).repeat(LEVELS, 1, 1, 1)
            with torch.no_grad(), self.half():
                context = self.encoder(ids).repeat(LEVELS, 1, 1)             # (LEVELS*B, 77, D)
            first = torch.rand(len(ids), device=self.device)
            # The density of t grows with t: at high noise the prompt matters most.
            u = torch.cat([(first + i / LEVELS) % 1 for i in range(LEVELS)]).sqrt()
            steps = len(alphas_cumprod)
            t = (u * steps).long().clamp(max=steps - 1)                      # (LEVELS*B,)
            abar, eps = alphas_cumprod[t, None, None, None], torch.randn_like(x0)
            # Forward process (Ho et al. 2020, https://arxiv.org/abs/2006.11239), and its velocity
            # (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512).
            x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps                 # (LEVELS*B, C, h, w)
            v = abar.sqrt() * eps - (1 - abar).sqrt() * x0
            with self.half():
                v_theta = unet(x_t, t, context).float()
            run.update((v - v_theta).square().mean())
            if run.step % SHEET_EVERY == 0:
                self.sheet(run)

    def sheet(self, run: Run) -> None:
        """Samples of the present EMA weights, side by side."""
        run.swap()
        shutil.rmtree(self.state / "model", ignore_errors=True)
        self.export(self.state / "model")
        sd = minisd.load(self.state / "model")
        images = sd(SAMPLES, num_inference_steps=30, seed=0, progress=False).images
        Image.fromarray(np.hstack(images)).save(self.state / f"sheet-{run.step}.png")
        run.swap()

    def export(self, out: Path) -> None:
        """Write a new folder in diffusers layout, in float16."""
        parts = {"text_encoder": self.encoder, "unet": self.unet, "vae": self.vae}
        halves = {part: copy.deepcopy(model).half() for part, model in parts.items()}
        save_model(out, self.config, self.tokenizer, halves)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the model; made new")
    parser.add_argument("--state", type=Path, help=f"default: {STATE}/PLAN")
    args = parser.parse_args(argv)
    if (args.plan == "gpu") != torch.cuda.is_available():
        parser.error("the plan is not for this machine (CUDA_VISIBLE_DEVICES= hides a GPU)")
    check_writable(args.out)  # now, not after hours of training
    plan, state = PLANS[args.plan], args.state or STATE / args.plan
    torch.manual_seed(0)
    torch.set_num_threads(2)
    catalogue(state, plan.size, plan.things)
    recipe = Recipe(plan, state)
    recipe.train_vae()
    recipe.train_text()
    recipe.train_diffusion()
    recipe.export(args.out)


if __name__ == "__main__":
    main()
