"""What calibration hands over: how the inputs of the layers are distributed, by channel and by timestep.

Keyed by the timestep's VALUE. The tables are chosen so that everything later is exact without the float model:

- ``low``, ``high [T, C]``: least and largest value of each channel at each timestep, 0 where none was seen. Smoothing divides
  channels by constants and a shift moves them, so the per-tensor and per-timestep ranges after both follow exactly.
- ``square [T, C]``: mean square, the second moment.
- ``histogram [T, K]``: counts of ``log2 |x|`` in bins of 1/8 octave; percentiles follow, and histograms of shards add up.
- ``outputs``: for each layer the largest magnitude of its output at each timestep, ``[T]``.
- ``rows [N, C]`` with ``rows_timestep [N]``: whole tokens kept as they were, to measure output errors on. Of a convolution they
  are windows, with ``taps`` columns for every channel (:mod:`qdiff.nn.conv`).
- ``first``: where the first token is the same in every call, it is kept apart and is not in the other tables.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.errors import IntegrityError, option
from qdiff.files import open_tensors, save_tensors

HISTOGRAM_LOW, HISTOGRAM_HIGH, HISTOGRAM_STEP = -24.0, 16.0, 0.125
HISTOGRAM_BINS = int((HISTOGRAM_HIGH - HISTOGRAM_LOW) / HISTOGRAM_STEP)
TABLES = ("low", "high", "square", "histogram", "rows", "rows_timestep")


@dataclass
class InputStatistics:
    """Statistics of one tensor that one or several layers read. Shapes in the module's docstring; float32.

    Args:
        first: ``[in]``, the constant first token, or ``None``.
        tokens: how many tokens a call has; of use with ``first`` alone.
        means: ``[S, in]``, the mean of all tokens of a sample, of every sample that a row is from; ``None`` where it is not known
            (:mod:`qdiff.quantization.block_walk` alone knows it) or samples have too few tokens for one. Not saved.
        rows_sample: ``[N]``, which of ``means`` is each row's.
    """

    layers: list[str]
    low: Tensor
    high: Tensor
    square: Tensor
    histogram: Tensor
    rows: Tensor
    rows_timestep: Tensor
    first: Tensor | None = None
    tokens: int = 0
    means: Tensor | None = None
    rows_sample: Tensor | None = None

    @property
    def taps(self) -> int:
        """Return columns of ``rows`` for each channel."""
        return self.rows.shape[1] // self.low.shape[1]

    def to(self, device: torch.device) -> InputStatistics:
        """Return the statistics with the tables on that device."""
        tables = {name: getattr(self, name) for name in (*TABLES, "first", "means", "rows_sample")}
        return replace(self, **{name: table.to(device) for name, table in tables.items() if table is not None})

    def columns(self) -> InputStatistics:
        """Return the statistics with one column for every column of ``rows`` in the tables too."""
        wide = {name: getattr(self, name).repeat_interleave(self.taps, dim=1) for name in ("low", "high", "square")}
        return replace(self, **wide) if self.taps > 1 else self

    def channels(self, part: slice, layers: list[str]) -> InputStatistics:
        """Return the statistics of some of the channels, for layers that read those alone."""
        rows = self.rows.unflatten(1, (-1, self.taps))[:, part].flatten(1)
        tables = {name: getattr(self, name)[:, part] for name in ("low", "high", "square")}
        means = None if self.means is None else self.means[:, part]
        return replace(self, layers=layers, rows=rows, means=means, **tables)

    def without_first(self, layers: list[str]) -> InputStatistics:
        """Return the statistics for layers that do not read the first token."""
        return replace(self, layers=layers, first=None, tokens=0)

    def with_first(self) -> InputStatistics:
        """Return the statistics for layers that read the first token like any other: with its range, and its share of
        the rows.
        """
        if self.first is None:
            return self
        rows = self.rows.clone()
        rows[:: self.tokens] = self.first
        low, high = torch.minimum(self.low, self.first), torch.maximum(self.high, self.first)
        return replace(self, low=low, high=high, rows=rows, first=None, tokens=0)

    @property
    def amax(self) -> Tensor:
        """Return the largest magnitude of each channel at each timestep, ``[T, C]``."""
        return torch.maximum(self.high, -self.low)

    def percentile(self, share: float, timestep: int | None = None) -> float:
        """Return the magnitude that ``share`` (0..1) of all values do not exceed; upper edge of the histogram's bin."""
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

    @property
    def first_tokens(self) -> dict[str, Tensor]:
        """Return the constant first token ``[in]`` that each layer reads, of those that read one."""
        return {name: entry.first for entry in self.inputs.values() if entry.first is not None for name in entry.layers}

    def save(self, path: Path) -> None:
        """Write one safetensors file; names are ``<group>|<table>``."""
        tensors = {f"{name}|{table}": getattr(entry, table) for name, entry in self.inputs.items() for table in TABLES}
        tensors |= {f"{name}|output": amax for name, amax in self.outputs.items()}
        firsts = {name: entry for name, entry in self.inputs.items() if entry.first is not None}
        tensors |= {f"{name}|first": entry.first for name, entry in firsts.items() if entry.first is not None}
        header = {
            "timesteps": self.timesteps,
            "groups": {name: entry.layers for name, entry in self.inputs.items()},
            "tokens": {name: entry.tokens for name, entry in firsts.items()},
        }
        save_tensors(path, tensors, {"qdiff": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: missing.
            IntegrityError: damaged or not ours.
        """
        with open_tensors(path, "calibration statistics") as file:
            try:
                header = json.loads(file.metadata()["qdiff"])
                inputs = {}
                for name, layers in header["groups"].items():
                    tables: dict[str, Any] = {table: file.get_tensor(f"{name}|{table}") for table in TABLES}
                    inputs[name] = InputStatistics(layers, **tables)
                for name, tokens in header.get("tokens", {}).items():
                    inputs[name] = replace(inputs[name], first=file.get_tensor(f"{name}|first"), tokens=tokens)
                outputs = {
                    name.removesuffix("|output"): file.get_tensor(name)
                    for name in file.keys()
                    if name.endswith("|output")
                }
                return cls([float(timestep) for timestep in header["timesteps"]], inputs, outputs)
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise IntegrityError(
                    f"{path} is not a statistics file of qdiff ({error})",
                    f"calibrate again with {option('force', True)}",
                ) from None
