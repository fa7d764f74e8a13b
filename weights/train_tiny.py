"""The recipe of the shipped model: emoji in, a small Stable Diffusion out, on a CPU.

    python weights/train_tiny.py --state DIR --out weights/tiny

The stages (data, autoencoder, latents, diffusion, export) resume where they were left, so kill it
at will; pass other ``--vae-steps`` or ``--steps`` to train for longer or shorter.

B pictures in a batch, N pictures in all, D width of the context
"""

import argparse
import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_data import BACKGROUNDS, SIZE, catalogue, composite, draw, fetch, vocabulary
from tiny_layout import export
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
WARM_UP, LOG_EVERY, SAVE_SECONDS = 200, 50, 180
WORD_PACE = 10


class Run:
    """One training stage: AdamW, warm-up, constant rate, linear decay, EMA, a log, and resuming."""

    def __init__(self, folder: Path, models: dict[str, nn.Module], steps: int, rate: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps, self.rate = folder, steps, rate
        self.params = {
            f"{part}.{name}": p for part, m in models.items() for name, p in m.named_parameters()
        }
        # A word is met once in hundreds of steps, so that its vector must move further each time.
        words = [p for name, p in self.params.items() if "token_embedding" in name]
        others = [p for name, p in self.params.items() if "token_embedding" not in name]
        groups = [{"params": others, "pace": 1}, {"params": words, "pace": WORD_PACE}]
        self.optimizer = torch.optim.AdamW(
            groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.step, self.seconds, self.losses, self.clock = 0, 0.0, [], time.time()
        self.saved = self.clock
        if (folder / "state.json").exists():
            self._resume()

    def _resume(self) -> None:
        known = json.loads((self.folder / "state.json").read_text())
        self.step, self.seconds = known["step"], known["seconds"]
        for label, tensor in load_file(self.folder / known["file"]).items():
            kind, name = label.split("/")
            state = self.optimizer.state[self.params[name]]
            if kind == "param":
                self.params[name].data.copy_(tensor)
            elif kind == "ema":
                self.ema[name].copy_(tensor)
            else:
                state[kind], state["step"] = tensor, torch.tensor(float(self.step))

    def _save(self) -> None:
        """The new file first, then the pointer to it, then the old file goes."""
        tensors = {f"param/{n}": p.detach() for n, p in self.params.items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()}
        for name, p in self.params.items():
            moments = self.optimizer.state[p]
            tensors |= {f"{kind}/{name}": moments[kind] for kind in ("exp_avg", "exp_avg_sq")}
        file = self.folder / f"{self.step}.safetensors"
        save_file(tensors, file)
        known = {"file": file.name, "step": self.step, "seconds": self.seconds}
        (self.folder / "state.tmp").write_text(json.dumps(known))
        os.replace(self.folder / "state.tmp", self.folder / "state.json")
        for old in self.folder.glob("*.safetensors"):
            if old != file:
                old.unlink()
        self.saved = time.time()

    def update(self, loss: Tensor, **figures: float) -> None:
        """One optimiser step; a line of the log and a saved state every so often."""
        loss.backward()
        left = 5 * (1 - self.step / self.steps)  # the last fifth decays
        for group in self.optimizer.param_groups:
            warm = min((self.step + 1) / WARM_UP, 1)
            group["lr"] = self.rate * group["pace"] * min(warm, left)
        nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(0.999, (1 + self.step) / (10 + self.step))
        params = [p.detach() for p in self.params.values()]
        torch._foreach_lerp_(list(self.ema.values()), params, 1 - keep)
        self.losses.append({"loss": loss.item(), **figures})
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if self.step % LOG_EVERY == 0:
            mean = {k: sum(f[k] for f in self.losses) / len(self.losses) for k in self.losses[0]}
            line = {"step": self.step, "seconds": round(self.seconds)} | mean
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            self.losses = []
        if now - self.saved > SAVE_SECONDS or self.step == self.steps:
            self._save()

    def load_ema(self, models: dict[str, nn.Module]) -> None:
        for part, model in models.items():
            for name, p in model.named_parameters():
                p.data.copy_(self.ema[f"{part}.{name}"])
            model.eval().requires_grad_(False)


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
    run = Run(state, models, steps, rate=1e-3)
    rgba = load_file(state.parent / "objects.safetensors")["rgba"]
    while run.step < steps:
        image, g = random_composites(rgba, run.step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = (m.float() for m in vae.moments(image))
            noise = torch.randn(mean.shape, generator=g)
            made = vae.decode(mean + torch.exp(logvar / 2) * noise).float()
        error = (made - image).abs().mean()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(made), edges(image)))
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
    """What the diffusion is trained on: scaled latents, token ids, noise, timesteps, velocities."""

    def __init__(self, state: Path, tokenizer: Tokenizer):
        self.objects = json.loads((state / "objects.json").read_text())["objects"]
        self.latents = load_file(state / "latents.safetensors")["latents"]
        self.scale = 1 / self.latents.float().std().item()
        self.tokenizer = tokenizer
        self.alphas = ddim.alphas_cumprod(CONFIG.schedule).float()

    def batch(self, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t (2B, 4, 16, 16), t (2B,), ids (B, 77), v: each picture at two opposite timesteps."""
        g, rng = torch.Generator().manual_seed(seed), random.Random(seed)
        chosen = [draw(self.objects, rng) for _ in range(count)]
        ids = self.tokenizer([caption for _, _, caption in chosen])          # (B, 77)
        x0 = torch.stack([self.latents[i, b] for i, b, _ in chosen]).float() * self.scale
        x0 = x0.repeat(2, 1, 1, 1)                                           # (2B, 4, 16, 16)
        # Rather noisy than not: there only the words can say what to draw.
        u = torch.rand(count, generator=g)
        u = torch.cat([u, (u + 0.5) % 1]) ** 0.7
        t = (u * len(self.alphas)).long()                                    # (2B,)
        a = self.alphas[t, None, None, None]
        noise = torch.randn(x0.shape, generator=g)
        return a.sqrt() * x0 + (1 - a).sqrt() * noise, t, ids, a.sqrt() * noise - (1 - a).sqrt() * x0


def train_diffusion(state: Path, steps: int, batch: int = 16) -> tuple[Config, dict]:
    """The text encoder and the UNet, together, on the velocity. Returns what export needs."""
    tokenizer = Tokenizer.from_folder(state / "tokenizer")
    examples = Examples(state, tokenizer)
    text = replace(
        CONFIG.text, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_token_id
    )
    config = replace(CONFIG, text=text, vae=replace(CONFIG.vae, scaling_factor=examples.scale))
    torch.manual_seed(0)
    models = {"text_encoder": TextEncoder(text, OPS), "unet": UNet(config.unet, OPS)}
    nn.init.normal_(models["text_encoder"].embeddings.token_embedding.weight, std=0.1)
    nn.init.normal_(models["text_encoder"].embeddings.position_embedding.weight, std=0.02)
    run = Run(state / "diffusion", models, steps, rate=8e-4)
    while run.step < steps:
        x, t, ids, v = examples.batch(run.step, batch)
        with torch.autocast("cpu", torch.bfloat16):
            context = models["text_encoder"](ids).repeat(2, 1, 1)            # (2B, 77, D)
            made = models["unet"](x, t, context).float()
        run.update((made - v).square().mean())
    run.load_ema(models)
    return config, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/minisd/train_tiny")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny")
    parser.add_argument("--vae-steps", type=int, default=2700)
    parser.add_argument("--decoder-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10_000)
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
    config, models = train_diffusion(args.state, args.steps)
    export(args.state / "tokenizer", args.out, config, models | {"vae": vae})


if __name__ == "__main__":
    main()
