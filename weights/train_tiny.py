"""The recipe of the shipped model: emoji in, a small Stable Diffusion out.

    python weights/train_tiny.py gpu --out DIR   # 128x128 pictures, for one CUDA device
    python weights/train_tiny.py cpu --out DIR   # 64x64 pictures, for five hours of CPU time

Needs minisd and npm. Kill it at will: the same command goes on. tiny_scenes.py has what is taught.

B scenes in a batch, S side of a picture, C h w a latent, D width of the context
"""

import argparse
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_scenes import HELD_BACK, STATE, Scenes, catalogue, compose, write_json
from torch import Tensor, nn
from torch.utils.data import DataLoader

import minisd
from minisd import ddim
from minisd.clip import TextEncoder
from minisd.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minisd.ops import TORCH, reference_attention
from minisd.tokenizer import Tokenizer
from minisd.unet import UNet
from minisd.vae import VAE


@dataclass(frozen=True)
class Plan:
    size: int                      # of a picture, in pixels
    things: int                    # how many it may learn, those with the shortest names
    vae: tuple[int, ...]           # widths of the autoencoder
    channels: int                  # of a latent
    unet: tuple[int, ...]          # widths; attention only at the last, where it costs least
    minutes: tuple[float, ...]     # of the device, or of CPU time: autoencoder, text, diffusion
    batch: tuple[int, ...]         # of the same
    plain: float                   # share of scenes that are one thing, as large as the picture


PLANS = {
    "gpu": Plan(128, 2000, (32, 48, 64, 88), 12, (112, 176), (5.5, 1.5, 14), (64, 512, 256), 0.4),
    "cpu": Plan(64, 512, (24, 48, 96), 6, (48, 96, 176), (88, 50, 180), (8, 64, 16), 0.55),
}
WIDTH, LEVELS = 192, 2  # of the context; of noise on each latent
GRID = 4  # places along a side of a latent, for each of which the text has an output
RATE, DECAY, WARM_UP, LOG_EVERY, SAVE_EVERY, SHEET_EVERY = 1e-3, 0.5, 200, 50, 250, 1000
WORD_PACE = 10  # a word is met once in hundreds of steps, so its vector must move further each time
BETAS, KL_WEIGHT, EDGE_WEIGHT = (0.9, 0.99), 2e-4, 0.5
TINY = Path(__file__).parent / "tiny"
SAMPLES = ["a red heart on a blue background", "a rocket on a black background", "a sunflower",
           "a small guitar at the top", "a pizza beside a banana on a gray background"]


class Run:
    """One stage of so many minutes, however often it is started: AdamW, EMA, a log, resuming."""

    def __init__(self, folder: Path, models: list[nn.Module], minutes: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.models, self.budget = folder, nn.ModuleList(models), 60 * minutes
        self.step, self.seconds, self.losses, self.words = 0, 0.0, [], slice(0, 0)
        cuda = next(models[0].parameters()).is_cuda  # a CPU's time counts, however busy it is
        self.now = time.time if cuda else time.process_time
        self.clock = self.now()
        named = sorted(self.models.named_parameters(),
                       key=lambda pair: "token_embedding" in pair[0])
        # One vector of all parameters, each of which is a view of it: quick to update and to save.
        now = nn.Parameter(torch.cat([p.detach().flatten() for _, p in named]))
        now.grad, start = torch.zeros_like(now), 0
        for name, p in named:
            if "token_embedding" in name:
                self.words = slice(start, start + p.numel())
            here = p.shape, p.stride(), start
            now.data.as_strided(*here).copy_(p.detach())
            p.data, p.grad = now.data.as_strided(*here), now.grad.as_strided(*here)
            start += p.numel()
        moments = {name: torch.zeros_like(now.data) for name in ("exp_avg", "exp_avg_sq")}
        self.kept = moments | {"now": now.data, "ema": now.data.clone()}
        if (folder / "state.safetensors").exists():
            state = load_file(folder / "state.safetensors")
            self.step, self.seconds = int(state["clock"][0]), state["clock"][1].item()
            for name, vector in self.kept.items():
                vector.copy_(state[name])
        torch.manual_seed(self.step)
        self.grad, steps = now.grad, torch.tensor(float(self.step), device=now.device)
        self.optimizer = torch.optim.AdamW([now], betas=BETAS, weight_decay=0.01, fused=True)
        self.optimizer.state[now] = {"step": steps} | moments

    def save(self) -> None:
        """The new state takes the place of the old one at once, or not at all."""
        clock = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        save_file(self.kept | {"clock": clock}, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.safetensors")

    def swap(self) -> None:
        """The models hold the EMA, or again what they held before."""
        now, ema = self.kept["now"], self.kept["ema"]
        now[:], ema[:] = ema, now.clone()

    def batches(self, scenes: Scenes):
        """From where the run was left until its time is over; the models then hold the EMA."""
        self.models.train().requires_grad_(True)
        if self.seconds < self.budget:
            numbers = range(self.step, 10**9)
            workers = min(12, os.cpu_count() // 2) if self.grad.is_cuda else 0
            for batch in DataLoader(scenes, None, sampler=numbers, num_workers=workers):
                yield [tensor.to(self.grad.device) for tensor in batch]
                if self.seconds >= self.budget:
                    break
            self.save()
        self.swap()
        self.models.eval().requires_grad_(False)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        self.grad *= (1 / self.grad.norm()).clamp(max=1)
        pace = min((self.step + 1) / WARM_UP, (1 - self.seconds / self.budget) / DECAY, 1)
        self.optimizer.param_groups[0]["lr"] = RATE * max(pace, 0)
        words = self.kept["now"][self.words]
        before = words.clone()
        self.optimizer.step()
        words += (WORD_PACE - 1) * (words - before)
        self.grad.zero_()
        self.step += 1
        self.kept["ema"].lerp_(self.kept["now"], max(1e-3, 9 / (10 + self.step)))
        self.losses.append(loss.detach())
        if self.step % LOG_EVERY == 0:
            mean, self.losses = torch.stack(self.losses).mean().item(), []
            where = f"{self.folder.name}: at step {self.step}"
            assert math.isfinite(mean), f"{where} the loss is {mean}"
            line = {"step": self.step, "seconds": round(self.seconds), "loss": mean}
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        now = self.now()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if self.step % SAVE_EVERY == 0:
            self.save()


class Recipe:
    """The three stages and what they share: the networks, the pictures, the device."""

    def __init__(self, plan: Plan, state: Path):
        self.plan, self.state = plan, state
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # On a CPU, with autocast to bfloat16, torch 2.13 compiles this to wrong gradients.
        self.compiled = torch.compile if self.device == "cuda" else lambda function: function
        self.objects = json.loads((state / "objects.json").read_text())["objects"]
        self.rgba = load_file(state / "objects.safetensors")["rgba"].to(self.device)
        self.tokenizer = ids = Tokenizer.from_folder(state / "tokenizer")
        c, n = plan.channels, len(plan.unet)
        self.config = Config(
            "tiny",
            TextConfig(ids.vocab_size, WIDTH, 4 * WIDTH, 2, 4, pad_token_id=ids.pad_token_id),
            UNetConfig(c, c, plan.unet, 1, (*[False] * (n - 1), True), (4,) * n, WIDTH, False, 16),
            VAEConfig(plan.vae, 1, c, norm_num_groups=8, scaling_factor=1.0),
            ScheduleConfig(prediction_type="v_prediction"), plan.size,
        )  # fmt: skip
        # The backward pass of torch's fused attention is slow in bfloat16 on a CPU.
        ops = replace(TORCH, attention=reference_attention) if self.device == "cpu" else TORCH
        self.half = partial(torch.autocast, self.device, torch.bfloat16)
        self.vae, self.unet = VAE(self.config.vae, ops), UNet(self.config.unet, ops)
        self.encoder = TextEncoder(self.config.text, ops)
        for model in (self.vae, self.encoder, self.unet):
            model.to(self.device, memory_format=torch.channels_last)
        self.encode = self.compiled(self.vae.encode)

    def pictures(self, run: Run, stage: int, objects: list[dict]):
        """Pictures (B, 3, S, S) and the ids of their captions (B, 77)."""
        scenes = Scenes(objects, self.plan.plain, self.plan.batch[stage], self.tokenizer)
        for *scene, ids in run.batches(scenes):
            yield compose(self.rgba, *scene), ids

    @torch.no_grad()
    def latents(self, image: Tensor) -> Tensor:
        """Scaled, (B, C, h, w), of pictures (B, 3, S, S)."""
        with self.half():
            return self.encode(image).float()

    def train_vae(self) -> None:
        """L1 on pixels and on their differences, a trace of KL; at last, the latents' scale."""
        run = Run(self.state / "vae", [self.vae], self.plan.minutes[0])
        shown = [thing for i, thing in enumerate(self.objects) if i % HELD_BACK]
        moments, decode = self.compiled(self.vae.moments), self.compiled(self.vae.decode)
        for image, _ in self.pictures(run, 0, shown):
            with self.half():
                mean, logvar = (m.float() for m in moments(image))           # (B, C, h, w)
                latent = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
                wrong = decode(latent).float() - image                       # (B, 3, S, S)
            edges = wrong.diff(dim=-1).abs().mean() + wrong.diff(dim=-2).abs().mean()
            kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2
            run.update(wrong.abs().mean() + EDGE_WEIGHT * edges + KL_WEIGHT * kl)
        scenes = Scenes(self.objects, self.plan.plain, 256, self.tokenizer)
        *scene, _ = (tensor.to(self.device) for tensor in scenes[0])
        scale = 1 / self.latents(compose(self.rgba, *scene)).std().item()
        self.vae.config = replace(self.config.vae, scaling_factor=scale)
        self.config = replace(self.config, vae=self.vae.config)

    def train_text(self) -> None:
        """What CLIP learned from pictures before there was a UNet, in small. The last 16 of the 77
        outputs must tell the latent, each in its own of 4x4 places and all through one linear
        layer, so that the UNet need only learn where to look."""
        nn.init.normal_(self.encoder.embeddings.token_embedding.weight, std=0.1)
        nn.init.normal_(self.encoder.embeddings.position_embedding.weight, std=0.1)
        part = self.plan.size // self.config.vae.downscale // GRID
        head = nn.Linear(WIDTH, self.plan.channels * part**2).to(self.device)
        run = Run(self.state / "text", [self.encoder, head], self.plan.minutes[1])
        for image, ids in self.pictures(run, 1, self.objects):
            parts = nn.functional.unfold(self.latents(image), part, stride=part)
            with self.half():
                made = head(self.encoder(ids)[:, -(GRID**2) :]).float()      # (B, 16, C*h*w/16)
            run.update((made - parts.mT).square().mean())

    def train_diffusion(self) -> None:
        """The UNet alone, on the velocity: as in Stable Diffusion, the text encoder is done."""
        run = Run(self.state / "diffusion", [self.unet], self.plan.minutes[2])
        unet = self.compiled(self.unet)
        alphas = ddim.alphas_cumprod(self.config.schedule).float().to(self.device)
        for image, ids in self.pictures(run, 2, self.objects):
            x0 = self.latents(image).repeat(LEVELS, 1, 1, 1)
            with torch.no_grad(), self.half():
                context = self.encoder(ids).repeat(LEVELS, 1, 1)             # (LEVELS*B, 77, D)
            first = torch.rand(len(ids), device=self.device)
            # Rather noisy than not: there only the words can say what to draw.
            u = torch.cat([(first + i / LEVELS) % 1 for i in range(LEVELS)]).sqrt()
            t = (u * len(alphas)).long().clamp(max=len(alphas) - 1)          # (LEVELS*B,)
            a, e = alphas[t, None, None, None], torch.randn_like(x0)
            x, v = a.sqrt() * x0 + (1 - a).sqrt() * e, a.sqrt() * e - (1 - a).sqrt() * x0
            with self.half():
                made = unet(x, t, context).float()
            run.update((made - v).square().mean())
            if run.step % SHEET_EVERY == 0:
                self.sheet(run)

    def sheet(self, run: Run) -> None:
        """What the model draws by now."""
        run.swap()
        self.export(self.state / "model")
        sd = minisd.load(self.state / "model")
        images = sd(SAMPLES, num_inference_steps=30, seed=0, progress=False).images
        Image.fromarray(np.hstack(images)).save(self.state / f"sheet-{run.step}.png")
        run.swap()

    def export(self, out: Path) -> None:
        """A folder in diffusers layout; what no plan changes is taken from the last model's."""
        text, unet, vae = (asdict(getattr(self.config, part)) for part in ("text", "unet", "vae"))
        text |= {n: getattr(self.tokenizer, n) for n in ("bos_token_id", "eos_token_id")}
        vae |= {"sample_size": self.plan.size,
                "down_block_types": ["DownEncoderBlock2D"] * len(self.plan.vae),
                "up_block_types": ["UpDecoderBlock2D"] * len(self.plan.vae)}  # fmt: skip
        flat = len(unet.pop("has_attention")) - 1
        unet |= {"sample_size": self.plan.size // self.config.vae.downscale,
                 "attention_head_dim": unet.pop("num_heads"),
                 "down_block_types": ["DownBlock2D"] * flat + ["CrossAttnDownBlock2D"],
                 "up_block_types": ["CrossAttnUpBlock2D"] + ["UpBlock2D"] * flat}  # fmt: skip
        for path in set(TINY.rglob("*.json")) - {TINY / "tokenizer/vocab.json"}:
            own = {"text_encoder": text, "unet": unet, "vae": vae}.get(path.parent.name, {})
            write_json(out / path.relative_to(TINY), json.loads(path.read_text()) | own)
        for file, prefix, model in (
            ("text_encoder/model", "text_model.", self.encoder),
            ("unet/diffusion_pytorch_model", "", self.unet),
            ("vae/diffusion_pytorch_model", "", self.vae),
        ):
            file, named = out / f"{file}.safetensors", model.named_parameters()
            tensors = {prefix + n: p.detach().half().contiguous() for n, p in named}
            save_file(tensors, file, {"format": "pt"})
            file.chmod(0o644)  # save_file leaves it readable by its owner alone
        shutil.copytree(self.state / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
        shutil.copy(self.state / "words.txt", out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the model")
    parser.add_argument("--state", type=Path, help=f"default: {STATE}/PLAN")
    args = parser.parse_args(argv)
    if (args.plan == "gpu") != torch.cuda.is_available():
        parser.error("the plan is not for this machine (CUDA_VISIBLE_DEVICES= hides a GPU)")
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
