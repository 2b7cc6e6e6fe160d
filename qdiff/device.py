"""Where models compute: one device for the process, chosen by ``--device`` or found.

Float models, what is observed of them, methods that search and train, and the simulated quantized model compute on it; files hold
tensors of the host's. Seeds are drawn in host memory everywhere, so that a picture begins from the same noise on every device;
what follows rounds differently from device to device, by some units in the last place of float32.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from qdiff.errors import MissingDependencyError, UsageError, command, option

if TYPE_CHECKING:
    import torch
    from torch import nn

HOST = "cpu"
_chosen: str | None = None


def set_device(name: str | None) -> None:
    """Take a device by torch's name of it: ``cpu``, ``cuda``, ``cuda:1``; ``None``: the first GPU, or the host where
    there is none.

    Raises:
        UsageError: no device that qdiff computes on.
        MissingDependencyError: it is not there.
    """
    global _chosen
    if name is not None:
        require(name)
    _chosen = name


def require(name: str) -> None:
    """Refuse a device that is not there. Raises as :func:`set_device`."""
    if name == HOST:
        return
    import torch

    number = re.fullmatch(r"cuda(?::(\d+))?", name)
    if number is None:
        raise UsageError(f"{option('device', name)}: qdiff computes on cpu and cuda", "use cpu, cuda or cuda:NUMBER")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number[1] or 0) >= there:
        raise MissingDependencyError(
            f"{option('device', name)}: torch sees {f'{there} GPUs' if there > 1 else 'one GPU' if there else 'no GPU'}",
            f"use another, or install torch for CUDA and its driver ({command('doctor')} shows what is there)",
        )


def found() -> str:
    """Return the first GPU, or the host where there is none."""
    import torch

    return "cuda" if torch.cuda.is_available() else HOST


def chosen() -> torch.device:
    """Return the device that was chosen or found."""
    import torch

    return torch.device(found() if _chosen is None else _chosen)


def finish(device: torch.device) -> None:
    """Wait until everything that was asked of the device is done: clocks are read then. The host is never behind."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def of(backbone: nn.Module) -> torch.device:
    """Return where a backbone computes."""
    tensors = itertools.chain(backbone.parameters(), backbone.buffers())
    return next(tensors).device


class Movable(Protocol):
    """A pipeline or a module."""

    def to(self, device: torch.device, /) -> object: ...


def place(pipeline: Movable) -> None:
    """Move a pipeline there. Its products and convolutions are of float32 and not of TF32, which has 10 bits of
    mantissa.
    """
    import torch

    device = chosen()
    if device.type != HOST:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        pipeline.to(device)


@contextlib.contextmanager
def on_host(wanted: bool = True) -> Iterator[None]:
    """Use the host for the length of a block where a GPU is there but was not asked for: what is timed beside engines
    of the host belongs there.
    """
    global _chosen
    before = _chosen
    if wanted and _chosen is None:
        _chosen = HOST
    try:
        yield
    finally:
        _chosen = before
