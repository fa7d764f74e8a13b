"""Train the shipped model: a small Stable Diffusion of emoji.

    python -m weights.recipe.train gpu --out DIR   # 128x128 pictures, for one CUDA device
    python -m weights.recipe.train cpu --out DIR   # 64x64 pictures, for five hours of CPU time

It is run in the root of the repository and needs npm, which fetches the emoji. A run that was
killed continues when the same command is given again. scenes.py makes the training data.

B scenes in a batch, S side of a picture, C h w a latent, D width of the context
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minisd
from minisd import ddim
from minisd.clip import TextEncoder
from minisd.config import Config, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from minisd.ops import TORCH, reference_attention
from minisd.tokenizer_folder import read_tokenizer
from minisd.unet import UNet
from minisd.vae import VAE
from weights.recipe.scenes import HELD_BACK, STATE, Scenes, catalogue, compose, write_json
from weights.recipe.stage import Run


@dataclass(frozen=True)
class Plan:
    size: int                      # of a picture, in pixels
    things: int                    # number of objects; those with the shortest names are taken
    vae: tuple[int, ...]           # widths of the autoencoder
    channels: int                  # of a latent
    unet: tuple[int, ...]          # widths; only the last level has attention: it costs least there
    minutes: tuple[float, ...]     # GPU or CPU time of the stages: autoencoder, text, diffusion
    batch: tuple[int, ...]         # batch sizes of the same stages
    plain: float                   # share of scenes of one object, as large as the picture


PLANS = {
    "gpu": Plan(128, 2000, (32, 48, 64, 88), 12, (112, 176), (5.5, 1.5, 14), (64, 512, 256), 0.4),
    "cpu": Plan(64, 512, (24, 48, 96), 6, (48, 96, 176), (88, 50, 180), (8, 64, 16), 0.55),
}
WIDTH = 192  # of the context
LEVELS = 2  # noise levels per latent in a batch of the diffusion stage
GRID = 4  # the text stage divides a latent into GRID x GRID parts and predicts each
KL_WEIGHT, EDGE_WEIGHT = 2e-4, 0.5
SHEET_EVERY = 1000  # steps between two sheets of samples
TINY = Path(__file__).parents[1] / "tiny"
SAMPLES = ["a red heart on a blue background", "a rocket on a black background", "a sunflower",
           "a small guitar at the top", "a pizza beside a banana on a gray background"]


class Recipe:
    """The three stages of training and what they share: networks, data, device."""

    def __init__(self, plan: Plan, state: Path):
        self.plan, self.state = plan, state
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        # On a CPU, torch 2.13 compiles wrong gradients under autocast to bfloat16.
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
        """Scaled latents (B, C, h, w) of pictures (B, 3, S, S)."""
        with self.half():
            return self.encode(image).float()

    def train_vae(self) -> None:
        """The loss is L1 on pixels and on their differences, with a small KL term. At the end, the
        scaling factor of the latents is measured."""
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
        """The text encoder learns to predict the latent. Each of the last 16 of its 77 outputs
        predicts one of 4x4 parts, all through the same linear layer. The UNet then only has to
        learn which output to attend to. In Stable Diffusion, CLIP's own training has this role."""
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
        """The UNet alone is trained, to predict v; the text encoder is frozen, as in Stable
        Diffusion."""
        run = Run(self.state / "diffusion", [self.unet], self.plan.minutes[2])
        unet = self.compiled(self.unet)
        alphas = ddim.alphas_cumprod(self.config.schedule).float().to(self.device)
        for image, ids in self.pictures(run, 2, self.objects):
            x0 = self.latents(image).repeat(LEVELS, 1, 1, 1)
            with torch.no_grad(), self.half():
                context = self.encoder(ids).repeat(LEVELS, 1, 1)             # (LEVELS*B, 77, D)
            first = torch.rand(len(ids), device=self.device)
            # High noise is sampled more often: the prompt matters most there.
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
        """Samples from the present EMA weights, side by side."""
        run.swap()
        self.export(self.state / "model")
        sd = minisd.load(self.state / "model")
        images = sd(SAMPLES, num_inference_steps=30, seed=0, progress=False).images
        Image.fromarray(np.hstack(images)).save(self.state / f"sheet-{run.step}.png")
        run.swap()

    def export(self, out: Path) -> None:
        """Write a folder in diffusers layout. Settings that no plan changes are copied from the
        shipped model."""
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
            file.chmod(0o644)  # save_file makes it readable by its owner only
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
