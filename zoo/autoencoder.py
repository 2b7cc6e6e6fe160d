"""The autoencoder: 64x64 pictures to 16x16 latents of 4 channels and back, shared by the image models of the zoo.

diffusers' `AutoencoderKL` with two downsamplings and no attention (the pictures are small and flat; a convolution sees
far enough). Loss: L1 + L1 of the horizontal and vertical differences (crisp edges) + a little KL, which keeps a noise on
the latents that the decoder has to bear: so it forgives the small errors of a diffusion model, and of a quantized one.

Trained on 32x32 crops first (four times as many pictures a second, and most of what it learns is local), on whole
pictures at the end. Backgrounds are palette colours with a jitter, and now and then any colour.

    python -m zoo.autoencoder --work DIR --steps 1200
    python -m zoo.autoencoder --work DIR --steps 1200 --decoder      # later, while or after a diffusion model trains
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.emoji import IMAGE_SIZE, PALETTE, compose, sprites
from zoo.train import Settings, Trainer

CROP = 32


def build() -> nn.Module:
    """Return a fresh autoencoder: 1.7 M parameters."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray) -> Tensor:
    """Return ``[N, 3, H, W]`` in -1..1 for pictures ``[N, H, W, 3]`` in 0..255."""
    return torch.from_numpy(images).float().permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def batch(all_sprites: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``size`` random pictures, float32 [size, 64, 64, 3] in 0..255."""
    palette = np.array(list(PALETTE.values()), np.float32)
    background = palette[rng.integers(len(palette), size=size)] + rng.uniform(-8, 8, (size, 3))
    anything = rng.random(size) < 0.1
    background[anything] = rng.uniform(0, 255, (int(anything.sum()), 3))
    chosen = all_sprites[rng.integers(len(all_sprites), size=size)]
    return compose(chosen, np.clip(background, 0, 255).astype(np.float32))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the L1 loss plus 0.5 times the L1 loss of neighbour differences, along every axis after the channels that
    has neighbours.
    """
    loss = functional.l1_loss(output, target)
    for dim in range(2, target.ndim):
        if target.shape[dim] == 1:
            continue
        loss = loss + 0.5 * functional.l1_loss(output.diff(dim=dim), target.diff(dim=dim))
    return loss


def variational_loss(vae: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the loss of the reconstruction from a sampled latent, and a little KL. ``images`` ``[N, 3, (T,) H, W]`` in
    -1..1, on the model's device.
    """
    posterior = vae.encode(images).latent_dist  # type: ignore[operator]
    mean, deviation = posterior.mean.float(), posterior.std.float()
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    output = vae.decode(mean + deviation * noise).sample.float()  # type: ignore[operator]
    divergence = 0.5 * (mean.square() + deviation.square() - 1 - 2 * deviation.log()).mean()
    return reconstruction_loss(output, images) + 1e-4 * divergence


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the mean over pictures of the PSNR in dB, for values in -1..1."""
    error = (a - b).float().square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


@torch.no_grad()
def encode(vae: nn.Module, images: np.ndarray, chunk: int = 256) -> Tensor:
    """Return the unscaled latent means, float32 [N, 4, 16, 16]."""
    parts = [to_tensor(images[i : i + chunk]) for i in range(0, len(images), chunk)]
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(p.to(device)).latent_dist.mean.float() for p in parts])  # type: ignore[operator]


@torch.no_grad()
def check(vae: nn.Module) -> tuple[float, Tensor, Tensor]:
    """Return (PSNR in dB over one picture of every emoji, latent means, reconstructions)."""
    rng = np.random.default_rng(7)
    all_sprites = sprites()
    palette = np.array(list(PALETTE.values()), np.float32)
    images = compose(all_sprites, palette[rng.integers(len(palette), size=len(all_sprites))])
    latents = encode(vae, images)
    output = vae.decode(latents).sample.float().clamp(-1, 1)  # type: ignore[operator]
    return psnr(output.cpu(), to_tensor(images)), latents, output


def train(work: Path, settings: Settings, size: int = 32) -> nn.Module:
    """Train (or resume) in ``work``; return the averaged model with its scaling factor set."""
    torch.manual_seed(settings.seed)
    vae = build()
    trainer = Trainer(work, vae, settings)
    trainer.resume()
    all_sprites = sprites()
    vae.to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng([settings.seed, step])
        whole = step > 0.85 * settings.steps
        images = to_tensor(batch(all_sprites, size // 4 if whole else size, rng))
        if not whole:
            corners = rng.integers(0, IMAGE_SIZE - CROP + 1, (size, 2))
            images = torch.stack([x[:, i : i + CROP, j : j + CROP] for x, (i, j) in zip(images, corners, strict=True)])
        images = images.to(settings.device, memory_format=torch.channels_last)
        return variational_loss(vae, images, generator)

    def report(current: Trainer) -> None:
        averaged = current.average_into(build()).eval()
        print(f"step {current.step} PSNR {check(averaged)[0]:.2f} dB", file=sys.stderr, flush=True)

    trainer.run(loss, report)
    averaged = trainer.average_into(build()).eval()
    quality, latents, _ = check(averaged)
    scale = 1 / float(latents.std())
    averaged.register_to_config(scaling_factor=scale)  # type: ignore[operator]
    averaged.save_pretrained(work / "vae")
    print(
        f"PSNR {quality:.2f} dB, latent mean {float(latents.mean()):.3f}, scaling factor {scale:.4f}", file=sys.stderr
    )
    return averaged


class Decoder(nn.Module):
    """The half of the autoencoder that can still learn once a diffusion model lives on its latents."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return pictures ``[N, 3, 4h, 4w]`` for unscaled latents ``[N, 4, h, w]``."""
        return self.decoder(self.post_quant_conv(latents))


def refine(work: Path, settings: Settings, size: int = 12, noise: float = 0.06) -> nn.Module:
    """Train the decoder alone on whole pictures; the latents, and so any diffusion model on them, stay as they are.

    ``noise`` is the standard deviation of what is added to the scaled latents: about the error of a diffusion model.
    """
    from zoo.data import pictures

    vae = load(work)
    scale = vae.config.scaling_factor  # type: ignore[union-attr]
    drawn = list(pictures(2, settings.seed))
    latents = torch.cat([encode(vae, images) for images in drawn])
    images = torch.from_numpy(np.rint(np.concatenate(drawn)).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
    del drawn
    decoder = Decoder(vae)
    trainer = Trainer(work / "refine", decoder, settings)
    trainer.resume()
    decoder.to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (size,), generator=generator)
        disturbed = latents[chosen] + noise / scale * torch.randn(size, *latents.shape[1:], generator=generator)
        disturbed = disturbed.to(settings.device, memory_format=torch.channels_last)
        target = images[chosen].to(settings.device).float() / 127.5 - 1
        return reconstruction_loss(decoder(disturbed).float(), target)

    def report(current: Trainer) -> None:
        whole = load(work)
        current.average_into(Decoder(whole))
        temporary = work / "vae.new"
        whole.save_pretrained(temporary)  # type: ignore[operator]
        for file in temporary.iterdir():
            file.replace(work / "vae" / file.name)
        print(f"step {current.step} PSNR {check(whole)[0]:.2f} dB", file=sys.stderr, flush=True)

    trainer.run(loss, report)
    return load(work)


def load(work: Path) -> nn.Module:
    """Return the trained autoencoder of ``work`` in float32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(work / "vae").eval()


def main() -> None:
    """Parse the command line, then train the autoencoder."""
    parser = argparse.ArgumentParser(prog="python -m zoo.autoencoder", description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoder", action="store_true", help="go on with the decoder alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    options = parser.parse_args()
    settings = Settings(
        steps=options.steps, rate=options.rate, seed=options.seed, device=options.device,
        bfloat16=not options.float32, average=0.995, cooldown=0.4,
    )  # fmt: skip
    (refine if options.decoder else train)(options.work, settings)


if __name__ == "__main__":
    main()
