"""The recipe of the shipped model: emoji in, a small Stable Diffusion out, on a CPU.

    python weights/train_tiny.py --state DIR --out weights/tiny

The stages (data, autoencoder, latents, diffusion, export) resume where they were left, so kill it
at will; pass other ``--vae-steps`` or ``--steps`` to train for longer or shorter.

B pictures in a batch, N pictures in all, D width of the context
"""

import argparse
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_data import BACKGROUNDS, SIZE, catalogue, composite, draw, fetch, often, vocabulary
from tiny_layout import export
from tiny_run import Run
from torch import Tensor, nn

from minisd import ddim
from minisd.clip import TextEncoder
from minisd.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minisd.ops import TORCH, reference_attention
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.vae import VAE

WIDTH = 192
CONFIG = Config(
    "minisd tiny",
    text=TextConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=2, num_attention_heads=4
    ),
    # Attention only at 4x4: there a parameter costs 64 times fewer operations than at 16x16.
    unet=UNetConfig(
        block_out_channels=(48, 96, 176),
        layers_per_block=1,
        has_attention=(False, False, True),
        num_heads=(4, 4, 4),
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    ),
    vae=VAEConfig(
        block_out_channels=(24, 48, 96), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
    ),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sample_size=SIZE,
)
# The backward pass of torch's fused attention is several times slower in bfloat16 on a CPU.
OPS = replace(TORCH, attention=reference_attention)
KL_WEIGHT, EDGE_WEIGHT = 2e-4, 0.5


def edges(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def random_composites(rgba: Tensor, seed: int, count: int) -> tuple[Tensor, torch.Generator]:
    """Pictures on any colour, a quarter of them on none of the named ones; (B, 3, 64, 64)."""
    g = torch.Generator().manual_seed(seed)
    chosen = rgba[torch.randint(len(rgba), (count,), generator=g)]
    chosen = chosen.flip(-1) if seed % 2 else chosen
    named = torch.tensor(list(BACKGROUNDS.values())).float()
    named = named[torch.randint(len(named), (count,), generator=g)]
    free = torch.rand(count, 3, generator=g) * 255
    return composite(chosen, torch.where(torch.rand(count, 1, generator=g) < 0.25, free, named)), g


def train_vae(state: Path, vae: VAE, models: dict[str, nn.Module], steps: int, batch: int) -> None:
    """L1 on pixels and on their differences, and a trace of KL that keeps the latents smooth."""
    run = Run(state, models, steps, rate=1e-3, decay=0.25)
    rgba = load_file(state.parent / "objects.safetensors")["rgba"]
    while run.step < steps:
        image, g = random_composites(rgba, run.step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = (m.float() for m in vae.moments(image))
            noise = torch.randn(mean.shape, generator=g)
            made = vae.decode(mean + torch.exp(logvar / 2) * noise).float()
        error = (made - image).abs().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(image), strict=True))
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
        mse = ((made - image) / 2).square().mean().item()
        run.update(error + EDGE_WEIGHT * edge + KL_WEIGHT * kl, mse=mse, kl=kl.item())
    run.load_ema(models)


def autoencoder(state: Path, steps: int, decoder_steps: int) -> VAE:
    """Both halves together, then, the latents being settled, the decoder on its own."""
    torch.manual_seed(0)
    vae = VAE(CONFIG.vae, TORCH)
    train_vae(state / "vae", vae, {"vae": vae}, steps, batch=8)
    models = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    for model in models.values():
        model.requires_grad_(True)
    train_vae(state / "decoder", vae, models, decoder_steps, batch=8)
    return vae


@torch.no_grad()
def make_latents(state: Path, vae: VAE) -> None:
    """Every picture on every background, once: latents.safetensors, (N, 12, 4, 16, 16) float16."""
    rgba = load_file(state / "objects.safetensors")["rgba"]
    colours = torch.tensor(list(BACKGROUNDS.values())).float()
    rows = []
    for one in rgba:
        images = composite(one.expand(len(colours), -1, -1, -1), colours)
        with torch.autocast("cpu", torch.bfloat16):
            rows.append(vae.moments(images)[0].half())
    save_file({"latents": torch.stack(rows)}, state / "latents.safetensors")


class Examples:
    """Captions and the scaled latents that they describe, in an order that a seed fixes."""

    def __init__(self, state: Path):
        self.objects = often(json.loads((state / "objects.json").read_text())["objects"])
        self.latents = load_file(state / "latents.safetensors")["latents"]
        self.tokenizer = Tokenizer.from_folder(state / "tokenizer")
        ids = {"vocab_size": self.tokenizer.vocab_size, "pad_token_id": self.tokenizer.pad_token_id}
        self.scale = 1 / self.latents.float().std().item()
        self.config = replace(
            CONFIG,
            text=replace(CONFIG.text, **ids),
            vae=replace(CONFIG.vae, scaling_factor=self.scale),
        )

    def batch(self, seed: int, count: int) -> tuple[Tensor, Tensor]:
        """Token ids (B, 77) and clean latents x0 (B, 4, 16, 16)."""
        rng = random.Random(seed)
        chosen = [draw(self.objects, rng) for _ in range(count)]
        ids = self.tokenizer([caption for _, _, caption in chosen])          # (B, 77)
        x0 = torch.stack([self.latents[i, b] for i, b, _ in chosen])         # (B, 4, 16, 16)
        return ids, x0.float() * self.scale


def train_text(state: Path, examples: Examples, steps: int, batch: int = 64) -> TextEncoder:
    """What CLIP learned from pictures before there was a UNet, in small: from the mean of the 77
    outputs a linear layer must tell the latent. Without it the UNet learns backgrounds at once and
    objects hardly ever: the words' gradient drowns in the noise of the diffusion.
    """
    torch.manual_seed(0)
    encoder, head = TextEncoder(examples.config.text, OPS), nn.Linear(WIDTH, 4 * 16 * 16)
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.02)
    models = {"text_encoder": encoder, "head": head}
    run = Run(state / "text", models, steps, rate=1e-3, decay=0.2)
    while run.step < steps:
        ids, x0 = examples.batch(run.step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            made = head(encoder(ids).mean(dim=1)).float()                    # (B, 4*16*16)
        run.update((made - x0.flatten(1)).square().mean())
    run.load_ema(models)
    return encoder


def diffuse(x0: Tensor, alphas: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each latent at two opposite noise levels: x_t (2B, 4, 16, 16), t (2B,) and its velocity."""
    g = torch.Generator().manual_seed(seed)
    # Rather noisy than not: there only the words can say what to draw.
    u = torch.rand(len(x0), generator=g)
    u = torch.cat([u, (u + 0.5) % 1]).sqrt()
    t = (u * len(alphas)).long()                                             # (2B,)
    a = alphas[t, None, None, None]
    x0 = x0.repeat(2, 1, 1, 1)                                               # (2B, 4, 16, 16)
    noise = torch.randn(x0.shape, generator=g)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, t, a.sqrt() * noise - (1 - a).sqrt() * x0


def train_diffusion(
    state: Path, examples: Examples, encoder: TextEncoder, steps: int, batch: int = 16
) -> UNet:
    """The UNet and the text encoder, together, on the velocity."""
    torch.manual_seed(0)
    encoder.train().requires_grad_(True)
    unet = UNet(CONFIG.unet, OPS)
    models = {"text_encoder": encoder, "unet": unet}
    run = Run(state / "diffusion", models, steps, rate=8e-4, decay=0.5)
    alphas = ddim.alphas_cumprod(CONFIG.schedule).float()
    while run.step < steps:
        ids, x0 = examples.batch(run.step, batch)
        x, t, v = diffuse(x0, alphas, run.step)
        with torch.autocast("cpu", torch.bfloat16):
            made = unet(x, t, encoder(ids).repeat(2, 1, 1)).float()          # (2B, 4, 16, 16)
        run.update((made - v).square().mean())
    run.load_ema(models)
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/minisd/train_tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--vae-steps", type=int, default=2700)
    parser.add_argument("--decoder-steps", type=int, default=3200)
    parser.add_argument("--text-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=11_400)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not (args.state / "tokenizer").exists():
        fetch(args.state)
        catalogue(args.state)
        vocabulary(args.state)
    vae = autoencoder(args.state, args.vae_steps, args.decoder_steps)
    if not (args.state / "latents.safetensors").exists():
        make_latents(args.state, vae)
    examples = Examples(args.state)
    encoder = train_text(args.state, examples, args.text_steps)
    unet = train_diffusion(args.state, examples, encoder, args.steps)
    models = {"text_encoder": encoder, "unet": unet, "vae": vae}
    export(args.state / "tokenizer", args.out, examples.config, models)
    shutil.copy(args.state / "words.txt", args.out)


if __name__ == "__main__":
    main()
