"""What the image models of the zoo share: text encoder and backbone trained together, export, the command line.

A model is one file with a subclass of :class:`TextToImage`: how its parts are built, what its loss is, which pipeline they
make. Stop a training at any time: the same command goes on. A smaller ``--steps`` starts the final fall of the learning rate
earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from zoo import autoencoder, text
from zoo.data import Pairs
from zoo.emoji import BUNDLED
from zoo.train import Settings, Trainer, optimizers, parameters

WARM_UP_STEPS = 400


def stratified(size: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers in (0, 1) [size], one in each of ``size`` equal parts, in random order."""
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    return u[torch.randperm(size, generator=generator)].clamp(1e-4, 1 - 1e-4)


def flow_levels(size: int, generator: torch.Generator, middle: float = 0.2) -> Tensor:
    """Return the noise levels of flow matching, stratified, in (0, 1) ``[size]``: 4/5 logit-normal(middle, 1.1), 1/5
    uniform, in random order.

    Esser et al. 2024, eq. 19, with a uniform part. More redundant data (more pixels, frames) wants a higher ``middle``.
    """
    u = stratified(size, generator)
    normal = torch.sigmoid(middle + 1.1 * torch.special.ndtri(u))
    return torch.where(torch.rand(size, generator=generator) < 0.8, normal, u)


def warm_up(
    encoder: nn.Module, data: Data, tokenizer: Any, settings: Settings, tokens: int, steps: int = WARM_UP_STEPS
) -> None:
    """Train the text encoder alone to predict the pictures (see `zoo.text`)."""
    model = text.WarmUp(encoder, data.sample(1, random.Random(0))[0].numel()).to(settings.device)
    made = optimizers(model, lambda name: "encoder.block" in name or "encoder.layers" in name, settings)
    for step in range(steps):
        latents, captions = data.sample(128, random.Random(f"warm-up {settings.seed} {step}"), empty=0.02)
        ids, mask = (t.to(settings.device) for t in text.tokenize(tokenizer, captions, tokens))
        with torch.autocast(settings.device.split(":")[0], torch.bfloat16, enabled=settings.bfloat16):
            loss = model.loss(ids, mask, latents.flatten(1).to(settings.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 50, 1.2 - step / steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"warm-up {step}/{steps} loss {loss.item():.4f}", file=sys.stderr, flush=True)


class Data(Protocol):
    """What a model is trained on."""

    def sample(self, size: int, rng: random.Random, empty: float = 0.1) -> tuple[Tensor, list[str]]:
        """Return ``size`` latents, first axis, and their captions, of which a share ``empty`` is ""."""
        ...

    def words(self) -> list[str]:
        """Return every text that a caption is made of."""
        ...


class TextToImage(ABC):
    """The trained parts with their tokenizer, and the loss over them.

    Args:
        work: folder of checkpoints, with the autoencoder's ``vae`` folder in it.
        size: pictures in a batch.
        training: else nothing is drawn and no text encoder is warmed up.
    """

    name: ClassVar[str]
    tokens: ClassVar[int]  # length of the captions in training
    special: ClassVar[text.Special]
    generation: ClassVar[dict[str, Any]]

    def __init__(self, work: Path, settings: Settings, size: int, compiled: bool, training: bool = True) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.size, self.work = settings, size, work
        self.data = self.build_data(training)
        self.tokenizer = self.make_tokenizer()
        self.backbone, self.encoder = self.build_backbone(), self.build_encoder(len(self.tokenizer))
        self.run = torch.compile(self.backbone) if compiled else self.backbone
        models = self.models(self.backbone, self.encoder)
        self.trainer = Trainer(work / self.name, models, settings, self.hidden_matrix)
        if not self.trainer.resume() and training:
            warm_up(self.encoder, self.data, self.tokenizer, settings, self.tokens)
            self.trainer.save()

    def build_data(self, training: bool) -> Data:
        """Return the pictures as latents with captions; captions alone if no ``training`` follows."""
        return Pairs.build(autoencoder.load(self.work / "vae") if training else None, seed=self.settings.seed)

    @abstractmethod
    def build_backbone(self) -> nn.Module:
        """Return a fresh backbone."""

    @abstractmethod
    def build_encoder(self, vocabulary: int) -> nn.Module:
        """Return a fresh text encoder."""

    @abstractmethod
    def hidden_matrix(self, name: str) -> bool:
        """Return whether Muon trains the matrix of that name."""

    @abstractmethod
    def loss_of(self, clean: Tensor, states: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """Return the error of one batch: latents ``[B, 4, 16, 16]``, text states ``[B, L, width]``, mask ``[B, L]``."""

    @abstractmethod
    def assemble(self, backbone: nn.Module, encoder: nn.Module) -> Any:
        """Return diffusers' pipeline around finished parts."""

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the text states as the pipeline makes them."""
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state

    @staticmethod
    def models(backbone: nn.Module, encoder: nn.Module) -> nn.ModuleDict:
        """Return what is trained together, as one module."""
        return parameters({"transformer": backbone, "text": encoder})

    def make_tokenizer(self) -> Any:
        """Return the tokenizer of this run: built once, then read, so that later changes of the captions cannot shift
        ids.
        """
        from transformers import PreTrainedTokenizerFast

        folder = self.work / f"tokenizer-{self.name}"
        if not folder.is_dir():
            rng = random.Random(self.settings.seed)
            corpus = [t for _ in range(60) for t in self.data.sample(128, rng)[1]]
            text.build_tokenizer(corpus + self.data.words(), self.special).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Return the error of the batch of that step."""
        device = self.settings.device
        clean, captions = self.data.sample(self.size, random.Random(f"{self.settings.seed} {step}"))
        ids, mask = (t.to(device) for t in text.tokenize(self.tokenizer, captions, self.tokens))
        return self.loss_of(clean, self.encode(ids, mask), mask, generator)

    def judge(self, pipeline: Any, sheet: Path) -> str:
        """Return how good it is by now, in a line, with a picture of samples at ``sheet``."""
        from zoo.evaluate import quick

        return quick(pipeline, sheet)

    def pipeline(self) -> Any:
        """Return diffusers' pipeline around the averaged weights, float32 on the CPU."""
        models = self.models(self.build_backbone(), self.build_encoder(len(self.tokenizer)))
        models = self.trainer.average_into(models).eval()
        return self.assemble(models["transformer"], models["text"])


def export(pipeline: Any, folder: Path, generation: dict[str, Any]) -> None:
    """Write the pipeline as float16 safetensors; the folder is swapped whole, files that we did not make stay.

    The text encoder's config says float32, because transformers would otherwise compute in the stored dtype while
    diffusers' models compute in float32.
    """
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for left in (temporary, old):
        shutil.rmtree(left, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    config = temporary / "text_encoder" / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("torch_dtype", None)
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")
    for path in temporary.rglob("*.json"):  # where a part was loaded from is nobody's business
        content = json.loads(path.read_text())
        if path.parent != temporary and content.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (temporary / "generation.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in ("generation.json", "README.md"):
        if (folder / name).is_file():
            shutil.copy2(folder / name, temporary / name)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def main(kind: type[TextToImage], description: str, batch: int = 64) -> None:
    """Parse the command line of one model, then train it."""
    parser = argparse.ArgumentParser(prog=f"python -m zoo.{kind.name}", description=description)
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints; has vae/ from zoo.autoencoder")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--cooldown", type=float, default=0.25, help="share of the steps with a falling rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, a fifth faster")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--sheets", type=int, default=400, help="steps between sample sheets and exports")
    parser.add_argument(
        "--export", type=Path, default=BUNDLED / kind.name.replace("_", "-"), help="pipeline folder to write"
    )
    parser.add_argument("--export-only", action="store_true", help="no training: write the pipeline again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps, rate=options.rate, cooldown=options.cooldown, seed=options.seed,
        device=options.device, bfloat16=not options.float32,
    )  # fmt: skip
    model = kind(options.work, settings, options.batch, options.compile, not options.export_only)
    if options.export_only:
        export(model.pipeline(), options.export, kind.generation)
        return

    def report(trainer: Trainer) -> None:
        if trainer.step % options.sheets and trainer.step != settings.steps:
            return
        started = time.monotonic()
        export(model.pipeline(), options.export, kind.generation)
        line = model.judge(model.pipeline(), options.work / f"sheet-{trainer.step:06d}.png")
        print(f"step {trainer.step} {line} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    model.trainer.run(model.loss, report)
