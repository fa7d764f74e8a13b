"""A training run that can be killed: its state is saved as safetensors and JSON, whole or not."""

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WARM_UP, LOG_EVERY, SAVE_SECONDS = 200, 50, 120
WORD_PACE = 10  # how much faster the words' vectors move than everything else


class Run:
    """One training stage: AdamW, warm-up, constant rate, linear decay, EMA, a log, and resuming."""

    def __init__(
        self, folder: Path, models: dict[str, nn.Module], steps: int, rate: float, decay: float
    ):
        """``rate`` falls to 0 over the last ``decay`` (a share) of the steps."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.steps, self.rate, self.decay = folder, steps, rate, decay
        self.params = {
            f"{part}.{name}": p for part, m in models.items() for name, p in m.named_parameters()
        }
        # A word is met once in hundreds of steps, so that its vector must move further each time.
        words = [p for name, p in self.params.items() if "token_embedding" in name]
        others = [p for name, p in self.params.items() if "token_embedding" not in name]
        groups = [{"params": others, "pace": 1}, {"params": words, "pace": WORD_PACE}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.step, self.seconds, self.figures, self.clock = 0, 0.0, [], time.time()
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
        left = (1 - self.step / self.steps) / self.decay
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
        self._log({"loss": loss.item(), **figures})
        if self.clock - self.saved > SAVE_SECONDS or self.step == self.steps:
            self._save()

    def _log(self, figures: dict[str, float]) -> None:
        self.figures.append(figures)
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        if self.step % LOG_EVERY == 0:
            columns = {k: [f[k] for f in self.figures] for k in figures}
            means = {k: sum(v) / len(v) for k, v in columns.items()}
            line = {"step": self.step, "seconds": round(self.seconds)} | means
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")
            self.figures = []

    def load_ema(self, models: dict[str, nn.Module]) -> None:
        for part, model in models.items():
            for name, p in model.named_parameters():
                p.data.copy_(self.ema[f"{part}.{name}"])
            model.eval().requires_grad_(False)
