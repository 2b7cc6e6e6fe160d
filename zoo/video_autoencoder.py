"""The video model's autoencoder: 33 frames of 64x64 to 17 latent frames of 16x16 with 8 channels, and back.

diffusers' `AutoencoderKLWan` with two halvings in space and one in time: causal, so a first frame is encoded on its own and
pictures are clips of one frame. Loss as for the pictures' autoencoder (`zoo.autoencoder`), with the differences between frames
beside those between pixels. It begins as an autoencoder of single frames and is trained as one for most of the steps, on
crops and then on whole frames; the last steps see clips of 9 frames.

    python -m zoo.video_autoencoder --work DIR --steps 1200
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from qdiff.evaluation.motion import EMOJI, MOTIONS, draw
from zoo.autoencoder import variational_loss
from zoo.emoji import IMAGE_SIZE, PALETTE
from zoo.train import Settings, Trainer

FRAMES = 33
CHANNELS = 8
CROP, NEIGHBOURS = 32, 9


def build() -> nn.Module:
    """Return a fresh autoencoder: 1.8 M parameters."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=16,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )
    look_at_one_frame(model)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = functools.partial(_convolve, module, module.forward)  # type: ignore[method-assign]
    return model


@torch.no_grad()
def look_at_one_frame(model: nn.Module) -> None:
    """Start as an autoencoder of single frames, inflated: what it learns from pictures then holds for every frame of a clip, and
    for lengths that training never sees.

    Convolutions see the present frame alone, for good; those that halve the frames take the later of two at first, those that
    double them repeat. Latents start with little noise, which would hide them from the decoder.
    """
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        present = module.weight[:, :, -1] * module.kernel_size[0] ** 0.5
        if name.endswith("time_conv"):
            eye = torch.eye(module.in_channels)
            present = eye.repeat(module.out_channels // module.in_channels, 1)[:, :, None, None]
            module.bias.zero_()  # type: ignore[union-attr]
        module.weight.zero_()
        module.weight[:, :, -1] = present
        if not name.endswith("time_conv"):
            module.weight.requires_grad_(True).register_hook(_present_alone)
    model.quant_conv.bias[CHANNELS:] = -4  # type: ignore[index, operator]
    model.quant_conv.weight[CHANNELS:] *= 0.1  # type: ignore[index, operator]


def _present_alone(gradient: Tensor) -> Tensor:
    """Keep the past taps of a convolution at zero.

    Only the layers that halve and double the frames look back, over three latent frames. With all of them a late frame would see
    more frames than a training clip has, and be decoded from features that training never saw.
    """
    kept = torch.zeros_like(gradient)
    kept[:, :, -1] = gradient[:, :, -1]
    return kept


def _convolve(module: nn.Conv3d, original: Callable[..., Tensor], x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Return a causal convolution of a clip's first frame, as the 2-D one that it is: the frames before it are
    zeros.
    """
    if x.shape[2] > 1 or cache_x is not None or module.stride[0] > 1:
        return original(x, cache_x)
    x = functional.pad(x[:, :, 0], module._padding[:4])  # type: ignore[operator, index]
    return functional.conv2d(x, module.weight[:, :, -1], module.bias, module.stride[1:])[:, :, None]


def to_tensor(frames: np.ndarray) -> Tensor:
    """Return ``[N, 3, T, H, W]`` in -1..1 for clips ``[N, T, H, W, 3]`` in 0..255."""
    return torch.from_numpy(frames).float().permute(0, 4, 1, 2, 3).contiguous() / 127.5 - 1


def clips(size: int, frames: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield ``size`` random clips of neighbouring frames, float32 [frames, 64, 64, 3] in 0..255."""
    for _ in range(size):
        start = int(rng.integers(FRAMES - frames + 1))
        chosen = [str(rng.choice(list(names))) for names in (EMOJI, PALETTE, MOTIONS)]
        yield draw(*chosen, FRAMES, range(start, start + frames))  # type: ignore[misc]


@torch.no_grad()
def encode(vae: nn.Module, frames: np.ndarray, chunk: int = 8) -> Tensor:
    """Return the normalised latent means, float32 [N, C, T', 16, 16], of frames [N, T, 64, 64, 3] in 0..255."""
    config = vae.config
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )  # type: ignore[union-attr]
    parts = []
    for start in range(0, len(frames), chunk):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(to_tensor(frames[start : start + chunk])).latent_dist.mean.float())  # type: ignore[operator]
    return (torch.cat(parts) - mean) / deviation


@torch.no_grad()
def check(vae: nn.Module) -> tuple[float, Tensor]:
    """Return (PSNR in dB over 16 whole clips, their unnormalised latents)."""
    rng = np.random.default_rng(7)
    frames = np.stack([draw(EMOJI[int(rng.integers(len(EMOJI)))], colour, motion, FRAMES)
                       for motion, colour in zip([*MOTIONS, *MOTIONS], [*PALETTE, *PALETTE], strict=False)])  # fmt: skip
    target, errors, found = to_tensor(frames), [], []
    for clip in target.split(4):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(clip).latent_dist.mean  # type: ignore[operator]
            output = vae.decode(latents).sample.float().clamp(-1, 1)  # type: ignore[operator]
        errors.append((output - clip).square().flatten(1).mean(1))
        found.append(latents.float())
    return float((10 * torch.log10(4 / torch.cat(errors))).mean()), torch.cat(found)


def batch(step: int, settings: Settings) -> Tensor:
    """Return what a step sees, ``[N, 3, T, H, W]``: crops of single frames for most of the time, then whole ones, then
    clips.
    """
    rng, done = np.random.default_rng([settings.seed, step]), step / settings.steps
    count, frames, side = (
        (64, 1, CROP) if done < 0.6 else (16, 1, IMAGE_SIZE) if done < 0.87 else (2, NEIGHBOURS, IMAGE_SIZE)
    )
    found = []
    for clip in clips(count, frames, rng):
        i, j = rng.integers(0, IMAGE_SIZE - side + 1, 2)
        found.append(clip[:, i : i + side, j : j + side])
    return to_tensor(np.stack(found))


def train(work: Path, settings: Settings) -> nn.Module:
    """Train (or resume) in ``work``; return the averaged model with the statistics of its latents in the config."""
    torch.manual_seed(settings.seed)
    vae = build()
    trainer = Trainer(work, vae, settings)
    trainer.resume()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return variational_loss(vae, batch(step, settings).to(settings.device), generator)

    def report(current: Trainer) -> None:
        averaged = current.average_into(build()).eval()
        print(f"step {current.step} PSNR {check(averaged)[0]:.2f} dB", file=sys.stderr, flush=True)

    trainer.run(loss, report)
    averaged = trainer.average_into(build()).eval()
    quality, latents = check(averaged)
    by_channel = latents.transpose(0, 1).flatten(1)
    averaged.register_to_config(  # type: ignore[operator]
        latents_mean=[round(float(v), 4) for v in by_channel.mean(1)],
        latents_std=[round(float(v), 4) for v in by_channel.std(1)],
    )
    averaged.save_pretrained(work / "vae")  # type: ignore[operator]
    print(f"PSNR {quality:.2f} dB", file=sys.stderr)
    return averaged


def load(work: Path) -> nn.Module:
    """Return the trained autoencoder of ``work`` in float32."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan.from_pretrained(work / "vae").eval()


def main() -> None:
    """Parse the command line, then train the autoencoder of clips."""
    parser = argparse.ArgumentParser(prog="python -m zoo.video_autoencoder", description=str(__doc__).splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(
        steps=options.steps, rate=options.rate, seed=options.seed, device=options.device, average=0.995, cooldown=0.4
    )
    train(options.work, settings)


if __name__ == "__main__":
    main()
