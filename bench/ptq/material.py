"""What a row is given, and what it says it made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.ptq.bits import Storage
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory


class NotTheSameLayersError(Exception):
    """A row quantized other layers than the others do."""


@dataclass
class Material:
    """The shared calibration.

    Args:
        model: float; the maker changes or replaces ``model.backbone``.
        trajectory: the recorded calls.
        statistics: of the layers' inputs on those calls; only qdiff's methods read them.
        layers: names of the layers that every row quantizes, with their shapes ``(out, in)``.
        scratch: a folder that the maker may use.
    """

    model: Model
    trajectory: Trajectory
    statistics: Statistics
    layers: dict[str, tuple[int, int]]
    scratch: Path

    def calls(self) -> Iterator[dict[str, Tensor]]:
        """Yield the inputs of every recorded call, in order, from disk."""
        for step in self.trajectory:
            yield step.inputs

    def replay(self, backbone: Any) -> None:
        """Run ``backbone`` on every recorded call: the forward loop of peers that observe while they run."""
        for inputs in self.calls():
            self.model.family.call(backbone, inputs)

    def check(self, quantized: set[str]) -> None:
        """Refuse a row that quantized other layers.

        Raises:
            NotTheSameLayersError: with what is too much and what is missing.
        """
        if quantized != set(self.layers):
            extra, missing = sorted(quantized - set(self.layers)), sorted(set(self.layers) - quantized)
            raise NotTheSameLayersError(f"quantized as well: {extra or 'nothing'}; left out: {missing or 'nothing'}")


@dataclass
class Made:
    """What a maker did.

    Args:
        storage: how each layer's weight would be stored.
        note: one line about what is particular, for the table's notes.
        scaled_inputs: layers whose input is multiplied by channel before it is quantized. Those vectors are not in the bits.
    """

    storage: dict[str, Storage]
    note: str = ""
    scaled_inputs: int = 0
    facts: dict[str, float] = field(default_factory=dict)


def shared_layers(model: Model, recipe: str = "int8") -> dict[str, tuple[int, int]]:
    """Return the layers that all rows quantize, with the rows and columns of their weights as matrices: all but those
    that the built-in recipes ignore for the family.
    """
    layers = quantizable_layers(model.backbone)
    ignored = load_recipe(recipe).ignored(model.family.name, list(layers))
    return {
        name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items() if name not in ignored
    }
