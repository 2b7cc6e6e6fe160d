"""The bundled PixArt: diffusers' own classes at a small size, trained from nothing on emoji.

64x64 pictures -> 16x16x4 latents -> patches of 2 -> 64 tokens of width 192, 8 blocks (5.1 M parameters), cross attention
to a 3-layer T5 encoder (1.3 M) that is trained with it.

Objective: flow matching (Lipman et al. 2023; rectified flow, Liu et al. 2023). x_s = (1 - s) x_0 + s noise, the model is
given the timestep 1000 s and predicts v = noise - x_0; s is logit-normal (Esser et al. 2024, eq. 19) with a uniform part,
drawn stratified over the batch. diffusers' stock pipeline samples it with `DPMSolverMultistepScheduler` and flow sigmas.

    python -m zoo.autoencoder --work DIR/vae
    python -m zoo.pixart --work DIR --steps 2800 --export qdiff/models/bundled/pixart

Stop it at any time: the same command goes on. A smaller ``--steps`` starts the final fall of the learning rate earlier.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo import autoencoder, text
from zoo.captions import all_words
from zoo.data import Pairs
from zoo.emoji import BUNDLED, PALETTE, load_table
from zoo.train import Settings, Trainer, optimizers, parameters

TOKENS = 24  # captions are shorter; the pipeline pads to 32 and masks
WARM_UP_STEPS = 400
GENERATION = {
    "num_inference_steps": 20,
    "guidance_scale": 2.0,
    "height": 64,
    "width": 64,
    "max_sequence_length": text.MAX_LENGTH,
    "use_resolution_binning": False,
}


def build_transformer() -> nn.Module:
    """A fresh PixArt transformer: 5.1 M parameters."""
    from diffusers import PixArtTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor

    model = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        cross_attention_dim=192,
        sample_size=16,
        patch_size=2,
        caption_channels=text.WIDTH,
        use_additional_conditions=False,
    )
    model.set_attn_processor(AttnProcessor())  # on a CPU the backward pass of plain matmuls is twice as fast
    return model


def hidden_matrix(name: str) -> bool:
    """The matrices that Muon trains: those of the transformer blocks and of the T5 layers."""
    return ("transformer_blocks" in name or "encoder.block" in name) and "relative_attention_bias" not in name


def noise_levels(size: int, generator: torch.Generator) -> Tensor:
    """Stratified s in (0, 1) [size]: 4/5 logit-normal(0.2, 1.1), 1/5 uniform, in random order."""
    u = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    u = u[torch.randperm(size, generator=generator)].clamp(1e-4, 1 - 1e-4)
    normal = torch.sigmoid(0.2 + 1.1 * torch.special.ndtri(u))
    return torch.where(torch.rand(size, generator=generator) < 0.8, normal, u)


def warm_up(encoder: nn.Module, pairs: Pairs, tokenizer: Any, settings: Settings, steps: int = WARM_UP_STEPS) -> None:
    """Train the text encoder alone to predict the pictures (see `zoo.text`)."""
    model = text.WarmUp(encoder, pairs.latents[0, 0, 0].numel()).to(settings.device)
    made = optimizers(model, lambda name: "encoder.encoder.block" in name, settings)
    for step in range(steps):
        latents, captions = pairs.sample(128, random.Random(f"warm-up {settings.seed} {step}"), empty=0.02)
        ids, mask = (t.to(settings.device) for t in text.tokenize(tokenizer, captions, TOKENS))
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


class PixArt:
    """The three trained parts with their tokenizer, and the loss over them."""

    def __init__(self, work: Path, settings: Settings, size: int, compiled: bool, training: bool = True) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.size, self.work = settings, size, work
        self.pairs = Pairs.build(autoencoder.load(work / "vae") if training else None, seed=settings.seed)
        self.tokenizer = self.make_tokenizer(work / "tokenizer")
        self.transformer, self.encoder = build_transformer(), text.build_encoder(len(self.tokenizer))
        self.run = torch.compile(self.transformer) if compiled else self.transformer
        self.trainer = Trainer(
            work / "pixart",
            parameters({"transformer": self.transformer, "text": self.encoder}),
            settings,
            hidden_matrix,
        )
        if not self.trainer.resume() and training:
            warm_up(self.encoder, self.pairs, self.tokenizer, settings)
            self.trainer.save()

    def make_tokenizer(self, folder: Path) -> Any:
        """The tokenizer of this run: built once, then read, so that later changes of the captions cannot shift ids."""
        from transformers import PreTrainedTokenizerFast

        if not folder.is_dir():
            rng = random.Random(self.settings.seed)
            corpus = [t for _ in range(60) for t in self.pairs.sample(128, rng)[1]]
            text.build_tokenizer(corpus + all_words(load_table(), list(PALETTE))).save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)

    def loss(self, step: int, generator: torch.Generator) -> Tensor:
        """Flow-matching error of one batch."""
        device = self.settings.device
        clean, captions = self.pairs.sample(self.size, random.Random(f"{self.settings.seed} {step}"))
        ids, mask = (t.to(device) for t in text.tokenize(self.tokenizer, captions, TOKENS))
        noise = torch.randn(clean.shape, generator=generator).to(device)
        clean, s = clean.to(device), noise_levels(self.size, generator).to(device)
        level = s[:, None, None, None]
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        velocity = self.run(
            (1 - level) * clean + level * noise,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            timestep=1000 * s,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    def pipeline(self) -> Any:
        """diffusers' pipeline around the averaged weights, float32 on the CPU."""
        from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

        models = parameters({"transformer": build_transformer(), "text": text.build_encoder(len(self.tokenizer))})
        models = self.trainer.average_into(models).eval()
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0, num_train_timesteps=1000
        )
        return PixArtSigmaPipeline(
            tokenizer=self.make_tokenizer(self.work / "tokenizer"),  # fresh: a used one keeps its last truncation
            text_encoder=models["text"],
            vae=autoencoder.load(self.work / "vae"),  # the decoder may have been refined since
            transformer=models["transformer"],
            scheduler=scheduler,
        )


def export(pipeline: Any, folder: Path) -> None:
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
    (temporary / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    for name in ("generation.json", "README.md"):
        if (folder / name).is_file():
            shutil.copy2(folder / name, temporary / name)
    for path in temporary.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m zoo.pixart", description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints; has vae/ from zoo.autoencoder")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--cooldown", type=float, default=0.25, help="share of the steps with a falling rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile: a minute to start, a fifth faster")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--sheets", type=int, default=400, help="steps between sample sheets and exports")
    parser.add_argument("--export", type=Path, default=BUNDLED / "pixart", help="pipeline folder to write")
    parser.add_argument("--export-only", action="store_true", help="no training: write the pipeline again")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps, rate=options.rate, cooldown=options.cooldown, seed=options.seed,
        device=options.device, bfloat16=not options.float32,
    )  # fmt: skip
    model = PixArt(options.work, settings, options.batch, options.compile, not options.export_only)
    if options.export_only:
        export(model.pipeline(), options.export)
        return

    def report(trainer: Trainer) -> None:
        if trainer.step % options.sheets and trainer.step != settings.steps:
            return
        from zoo.evaluate import quick

        started = time.monotonic()
        export(model.pipeline(), options.export)
        line = quick(model.pipeline(), options.work / f"sheet-{trainer.step:06d}.png")
        print(f"step {trainer.step} {line} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)

    model.trainer.run(model.loss, report)


if __name__ == "__main__":
    main()
