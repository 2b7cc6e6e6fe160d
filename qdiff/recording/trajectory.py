"""The recorded trajectory: what the backbone was given, by prompt and by step, and how to replay it.

A sampler may come to a timestep's value more than once (PNDM's first step, Heun's corrector, many steps whose timesteps are
rounded to integers). These are several calls at one value: all are recorded, in their order, and ``repeat`` tells them apart.

A shard is one safetensors file for one batch of prompts. Tensors that change with the step are stacked ``[steps, batch,
...]``; those that do not (text states, masks) are stored once. Both branches of classifier-free guidance are in the batch,
in the pipeline's order. Later work never runs the text encoder, the VAE or the scheduler again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdiff.errors import InputError, IntegrityError, command, option
from qdiff.files import TensorFile, open_tensors, save_tensors

SHARD = "trajectory-{:05d}.safetensors"


@dataclass
class Step:
    """One call of the backbone: its inputs by name, the timestep's value, and how many calls of the shard had that value
    before.
    """

    shard: int
    timestep: float
    inputs: dict[str, Tensor]
    repeat: int = 0


class Trajectory:
    """The shards in one folder, read lazily, one at a time.

    Args:
        device: that tensors are moved to; ``None``: they stay in host memory.

    Raises:
        InputError: when there is no shard.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.folder, self.device = folder, device
        self.paths = sorted(folder.glob("trajectory-*.safetensors"))
        if not self.paths:
            raise InputError(f"no trajectory in {folder}", f"run: {command('calibrate', output='RUN')}")

    def timesteps(self, shard: int) -> list[float]:
        """Return the timesteps of the recorded calls of one shard, in sampling order.

        Raises:
            IntegrityError: when the shard is damaged or not ours.
        """
        with open_tensors(self.paths[shard], "trajectory shard") as file:
            return self._header(shard, file)[0]

    def steps(self, shard: int, *, once: bool = False) -> Iterator[Step]:
        """Yield the recorded calls of one shard, in sampling order.

        Args:
            shard: number.
            once: only the first call of each timestep's value, for those who follow what changes from one value to the next.

        Raises:
            IntegrityError: when the shard is damaged or not ours.
        """
        with open_tensors(self.paths[shard], "trajectory shard") as file:
            timesteps, varying = self._header(shard, file)
            tensors = {name: file.get_tensor(name).to(self.device) for name in file.keys()}
        for index, timestep in enumerate(timesteps):
            repeat = timesteps[:index].count(timestep)
            if once and repeat:
                continue
            inputs = {name: tensor[index] if name in varying else tensor for name, tensor in tensors.items()}
            yield Step(shard, timestep, inputs, repeat)

    def _header(self, shard: int, file: TensorFile) -> tuple[list[float], set[str]]:
        """Return timesteps, and the names of what changes with them."""
        try:
            header = json.loads(file.metadata()["qdiff"])
            timesteps, varying = [float(timestep) for timestep in header["timesteps"]], set(header["varying"])
            if any(file.get_slice(name).get_shape()[:1] != [len(timesteps)] for name in varying):
                raise ValueError("a tensor has another number of steps")
            return timesteps, varying
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{self.paths[shard]} is not a trajectory of qdiff ({error})",
                f"calibrate again with {option('force', True)}",
            ) from None

    def __iter__(self) -> Iterator[Step]:
        for shard in range(len(self.paths)):
            yield from self.steps(shard)


def require_shard(path: Path, owner: str) -> None:
    """Refuse a shard that an earlier try left but that is not whole or not this calibration's.

    Args:
        path: of the shard.
        owner: fingerprint of everything that decides the recording.

    Raises:
        IntegrityError: damaged, or recorded with another model, seed or prompts.
    """
    with open_tensors(path, "trajectory shard") as file:
        try:
            found = json.loads((file.metadata() or {})["qdiff"]).get("owner")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            found = None
    if found != owner:
        raise IntegrityError(
            f"{path} was recorded by another calibration (another model, seed or prompts)",
            f"delete it, or calibrate with {option('force', True)} or into another folder",
        )


def save_shard(
    folder: Path,
    index: int,
    timesteps: list[float],
    varying: dict[str, Tensor],
    constant: dict[str, Tensor],
    owner: str = "",
) -> Path:
    """Write one shard. ``varying`` tensors are ``[steps, batch, ...]``, ``constant`` ones ``[batch, ...]``."""
    path = folder / SHARD.format(index)
    header = {"timesteps": timesteps, "varying": sorted(varying), "owner": owner}
    save_tensors(path, {**varying, **constant}, {"qdiff": json.dumps(header)})
    return path
