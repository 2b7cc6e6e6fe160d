"""The training loop that every model of the zoo shares: resumable, seeded, with a moving average of the weights.

A checkpoint is one safetensors file (weights, average, optimizer state; the step in its header), written beside the old
one and renamed over it. There is no random state to save: each step draws from a generator seeded with (seed, step),
so a resumed run sees the data that an uninterrupted one would have seen.

The learning rate is constant after a warm-up and falls linearly to zero over the last part ("trapezoid"): to finish a
run early, resume it with a smaller ``steps``.

Hidden matrices are trained by Muon (orthogonalised momentum; at this size it needs about half of AdamW's steps),
everything else (embeddings, biases, convolutions, first and last layers) by AdamW.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """How long and how fast. ``cooldown`` is the share of ``steps`` over which the rate falls to zero."""

    steps: int
    rate: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.25
    weight_decay: float = 0.01
    average: float = 0.999
    checkpoint_every: int = 200
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the random numbers of one step, on the CPU whatever the device, so that runs agree."""
    return torch.Generator().manual_seed((seed << 32) + step)


def optimizers(model: nn.Module, hidden: Callable[[str], bool], settings: Settings) -> list[torch.optim.Optimizer]:
    """Return the optimizers: Muon for the matrices whose name ``hidden`` accepts (if any), AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and hidden(n)]
    others = [p for n, p in named if not (p.ndim == 2 and hidden(n))]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    ]
    if matrices:
        found.append(
            torch.optim.Muon(
                matrices, lr=settings.rate, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return found


class Trainer:
    """Runs ``loss(step, generator) -> scalar`` and keeps model, average and optimizers in ``folder``."""

    def __init__(
        self, folder: Path, model: nn.Module, settings: Settings, hidden: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.folder, self.model, self.settings = folder, model.to(settings.device), settings
        self.optimizers = optimizers(model, hidden, settings)
        self.average = {name: value.detach().float().clone() for name, value in model.state_dict().items()}
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        """Return the one checkpoint file."""
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write the checkpoint whole: temporary file, fsync, rename."""
        tensors = {f"model/{n}": v.detach().cpu().contiguous().clone() for n, v in self.model.state_dict().items()}
        tensors |= {f"average/{n}": v.cpu().contiguous() for n, v in self.average.items()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"optimizer/{index}/{key}/{name}"] = torch.as_tensor(value).cpu().contiguous().clone()
        metadata = {"step": str(self.step), "settings": json.dumps(asdict(self.settings))}
        temporary = self.checkpoint.with_suffix(".part")
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(self.checkpoint)

    def resume(self) -> bool:
        """Load the checkpoint if there is one; say whether there was."""
        if not self.checkpoint.is_file():
            return False
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        with safe_open(self.checkpoint, "pt") as file:
            self.step = int(file.metadata()["step"])
            for key in file.keys():
                kind, name = key.split("/", 1)
                groups[kind][name] = file.get_tensor(key)
        self.model.load_state_dict(groups["model"])
        self.average = {n: v.to(self.settings.device) for n, v in groups["average"].items()}
        for index, optimizer in enumerate(self.optimizers):
            current = optimizer.state_dict()
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in groups["optimizer"].items():
                where, parameter, name = key.split("/")
                if int(where) == index:
                    states.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict({"state": states, "param_groups": current["param_groups"]})
        return True

    def factor(self) -> float:
        """Return the learning rate of this step over ``settings.rate``."""
        s = self.settings
        left = (s.steps - self.step) / max(1.0, s.cooldown * s.steps)
        return max(0.0, min(1.0, (self.step + 1) / s.warmup, left))

    @torch.no_grad()
    def update_average(self) -> None:
        """Add ``(1 - decay) (weights - average)`` to the average; the decay grows with the step, so that the start is
        forgotten.
        """
        decay = min(self.settings.average, (1 + self.step) / (10 + self.step))
        names, values = zip(*self.model.state_dict().items(), strict=True)
        torch._foreach_lerp_([self.average[n] for n in names], [v.float() for v in values], 1 - decay)

    def average_into(self, model: nn.Module) -> nn.Module:
        """Copy the average into ``model`` (same architecture)."""
        model.load_state_dict(self.average)
        return model

    def run(
        self, loss: Callable[[int, torch.Generator], Tensor], on_checkpoint: Callable[[Trainer], None] | None = None
    ) -> None:
        """Train to ``settings.steps`` from wherever the checkpoint stands; progress goes to stderr."""
        s = self.settings
        started, first, smooth = time.monotonic(), self.step, None
        while self.step < s.steps:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = s.rate * self.factor()
            generator = step_generator(s.seed, self.step)
            with torch.autocast(s.device.split(":")[0], torch.bfloat16, enabled=s.bfloat16):
                value = loss(self.step, generator)
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.update_average()
            self.step += 1
            now = float(value.detach())
            smooth = now if smooth is None else 0.98 * smooth + 0.02 * now
            if self.step % 20 == 0 or self.step == s.steps:
                pace = (time.monotonic() - started) / (self.step - first)
                line = f"step {self.step}/{s.steps} loss {smooth:.4f} {pace:.3f} s/step"
                print(f"{line} ETA {pace * (s.steps - self.step) / 60:.1f} min", file=sys.stderr, flush=True)
            if self.step % s.checkpoint_every == 0 or self.step == s.steps:
                self.save()
                if on_checkpoint is not None:
                    on_checkpoint(self)


def parameters(models: Mapping[str, nn.Module]) -> nn.ModuleDict:
    """Return several models as the one module that `Trainer` wants."""
    return nn.ModuleDict(dict(models))
