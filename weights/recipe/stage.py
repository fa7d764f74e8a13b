"""One stage of training with a fixed time budget: AdamW, EMA of the weights, a log, resuming."""

import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from weights.recipe.scenes import Scenes

RATE, BETAS = 1e-3, (0.9, 0.99)
WARM_UP = 200  # steps over which the learning rate rises linearly
DECAY = 0.5  # last part of the budget, over which the learning rate falls linearly to zero
LOG_EVERY, SAVE_EVERY = 50, 250  # steps
TOKEN_RATE = 10  # factor of the learning rate of token embeddings: few steps use each of them


class Run:
    """One stage of training."""

    def __init__(self, folder: Path, models: list[nn.Module], minutes: float):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.models, self.budget = folder, nn.ModuleList(models), 60 * minutes
        self.step, self.seconds, self.losses, self.words = 0, 0.0, [], slice(0, 0)
        cuda = next(models[0].parameters()).is_cuda  # on a CPU, the budget is CPU time
        self.now = time.time if cuda else time.process_time
        self.clock = self.now()
        named = sorted(self.models.named_parameters(),
                       key=lambda pair: "token_embedding" in pair[0])
        # All parameters are views of one vector: fast to update and to save.
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
        """Replace the saved state atomically."""
        clock = torch.tensor([self.step, self.seconds], dtype=torch.float64)
        save_file(self.kept | {"clock": clock}, self.folder / "state.tmp")
        os.replace(self.folder / "state.tmp", self.folder / "state.safetensors")

    def swap(self) -> None:
        """Exchange the weights of the models and their EMA."""
        now, ema = self.kept["now"], self.kept["ema"]
        now[:], ema[:] = ema, now.clone()

    def batches(self, scenes: Scenes):
        """Batches from the saved step until the budget is spent; then the models get the EMA."""
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
        """One step: gradient norm clipped to 1, AdamW, EMA with decay 0.999, which starts lower."""
        loss.backward()
        self.grad *= (1 / self.grad.norm()).clamp(max=1)
        factor = min((self.step + 1) / WARM_UP, (1 - self.seconds / self.budget) / DECAY, 1)
        self.optimizer.param_groups[0]["lr"] = RATE * max(factor, 0)
        words = self.kept["now"][self.words]
        before = words.clone()
        self.optimizer.step()
        words += (TOKEN_RATE - 1) * (words - before)
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
