"""What a backbone is given: the inputs of one call, by name, with their axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Axis = int | str


@dataclass(frozen=True)
class InputSpec:
    """One input of a backbone.

    Args:
        name: the input's name in recordings and in the ONNX graph; also that of the argument in the backbone's forward (or of an
            entry in one of its dict arguments), where ``argument`` names no other.
        axes: sizes, or names of dynamic axes (``"batch"``, ``"height"``, ``"width"`` in latent cells, ``"frames"`` of latents,
            ``"tokens"``).
        dtype: as the graph takes it.
        varies: whether it changes from step to step (else it depends on the prompt alone).
        exact: whether it stays float32 where the backbone computes in 16 bit: timesteps and sizes, of which sines are taken, and
            what is joined with those.
        argument: see ``name``.
    """

    name: str
    axes: tuple[Axis, ...]
    dtype: torch.dtype = torch.float32
    varies: bool = False
    exact: bool = False
    argument: str = ""

    @property
    def batch_axis(self) -> int | None:
        """Return the axis of samples; ``None`` where all samples of a call share the input."""
        return self.axes.index("batch") if "batch" in self.axes else None

    def samples(self, tensor: Tensor, part: slice) -> Tensor:
        """Return the part of an input that belongs to some samples of a call; all of it where they share it."""
        if self.batch_axis is None:
            return tensor
        return tensor[(slice(None),) * self.batch_axis + (part,)]


def latent_of(specs: Sequence[InputSpec]) -> InputSpec:
    """Return the input that is denoised: the first that changes with the step and has rows, columns or frames, else the first."""
    axes = ("height", "width", "frames")
    return next((spec for spec in specs if spec.varies and any(axis in spec.axes for axis in axes)), specs[0])


def samples_of(specs: Sequence[InputSpec], inputs: Mapping[str, Tensor], part: slice) -> dict[str, Tensor]:
    """Return the inputs of some samples of a call, by name (:meth:`InputSpec.samples`)."""
    known = {spec.name: spec for spec in specs}
    return {name: known[name].samples(tensor, part) for name, tensor in inputs.items()}
