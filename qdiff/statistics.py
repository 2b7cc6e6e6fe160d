"""What calibration hands over: how the inputs of the layers are distributed, by channel and by timestep.

Keyed by the timestep's VALUE. The tables are chosen so that everything later is exact without the float model:

- ``low``, ``high [T, C]``: least and largest value of each channel at each timestep, 0 where none was seen. Smoothing divides
  channels by constants and a shift moves them, so the per-tensor and per-timestep ranges after both follow exactly.
- ``square [T, C]``: mean square, the second moment.
- ``histogram [T, K]``: counts of ``log2 |x|`` in bins of 1/8 octave; percentiles follow, and histograms of shards add up.
- ``outputs``: for each layer the largest magnitude of its output at each timestep, ``[T]``.
- ``rows [N, C]`` with ``rows_timestep [N]``: whole tokens kept as they were, to measure output errors on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qdiff.errors import IntegrityError
from qdiff.files import open_tensors, save_tensors

HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_STEP = -24.0, 16.0, 0.125
HISTOGRAM_BINS = int((HISTOGRAM_HIGH - HISTOGRAM_LOW) / HISTOGRAM_STEP)
TABLES = ("low", "high", "square", "histogram", "rows", "rows_timestep")


@dataclass
class InputStatistics:
    """Statistics of one tensor that one or several layers read. Shapes in the module's docstring; float32."""

    layers: list[str]
    low: Tensor
    high: Tensor
    square: Tensor
    histogram: Tensor
    rows: Tensor
    rows_timestep: Tensor

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of each channel at each timestep, ``[T, C]``."""
        return torch.maximum(self.high, -self.low)

    def percentile(self, share: float, timestep: int | None = None) -> float:
        """The magnitude that ``share`` (0..1) of all values do not exceed; upper edge of the histogram's bin."""
        counts = self.histogram.sum(dim=0) if timestep is None else self.histogram[timestep]
        cumulative = counts.double().cumsum(0)
        position = int(torch.searchsorted(cumulative, share * cumulative[-1]))
        return 2.0 ** (HISTOGRAM_LOW + HISTOGRAM_STEP * (min(position, HISTOGRAM_BINS - 1) + 1))


@dataclass
class Statistics:
    """All inputs and outputs of the layers that can be quantized, and the timestep values in sampling order."""

    timesteps: list[float]
    inputs: dict[str, InputStatistics]
    outputs: dict[str, Tensor]

    def save(self, path: Path) -> None:
        """Writes one safetensors file; names are ``<group>|<table>``."""
        tensors = {f"{name}|{table}": getattr(entry, table) for name, entry in self.inputs.items() for table in TABLES}
        tensors |= {f"{name}|output": amax for name, amax in self.outputs.items()}
        header = {"timesteps": self.timesteps, "groups": {name: entry.layers for name, entry in self.inputs.items()}}
        save_tensors(path, tensors, {"qdiff": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Reads what :meth:`save` wrote.

        Raises:
            InputError: missing.
            IntegrityError: damaged or not ours.
        """
        with open_tensors(path, "calibration statistics") as file:
            try:
                header = json.loads(file.metadata()["qdiff"])
                inputs = {
                    name: InputStatistics(layers, **{table: file.get_tensor(f"{name}|{table}") for table in TABLES})
                    for name, layers in header["groups"].items()
                }
                outputs = {
                    name.removesuffix("|output"): file.get_tensor(name)
                    for name in file.keys()
                    if name.endswith("|output")
                }
                return cls(header["timesteps"], inputs, outputs)
            except (KeyError, TypeError, ValueError) as error:
                raise IntegrityError(
                    f"{path} is not a statistics file of qdiff ({error})", "calibrate again with --force"
                ) from None
