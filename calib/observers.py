"""Observers: each keeps one table about one tensor. They see every value of it, by timestep.

An observer's state is a tensor that shards extend in order, so that a collection that was cut off goes on with the same
bytes. To add one: write the class, register it, and add its table to :mod:`qdiff.recording.activation_statistics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qdiff.recording.activation_statistics import HISTOGRAM_BINS, HISTOGRAM_LOW, HISTOGRAM_STEP
from qdiff.registry import Registry


class Observer(ABC):
    """One table. ``timesteps`` is the number of calibrated timesteps T, ``channels`` the tensor's last size C, ``device`` that of
    the tensor (``None``: the host).
    """

    def __init__(self, timesteps: int, channels: int, device: torch.device | None = None) -> None:
        self.timesteps, self.channels = timesteps, channels

    @abstractmethod
    def update(self, x: Tensor, timestep: int, generator: torch.Generator) -> None:
        """Take in ``x [rows, C]`` that was seen at the timestep of that index."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return everything that is needed to go on later, by name."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Return the finished tables of :class:`qdiff.recording.activation_statistics.InputStatistics`, by name."""


OBSERVERS: Registry[type[Observer]] = Registry("observer")


class _Table(Observer):
    """An observer whose state is one table ``[T, ...]`` under the observer's name."""

    name: str
    table: Tensor

    def state(self) -> dict[str, Tensor]:
        return {self.name: self.table}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.table = state[self.name]

    def result(self) -> dict[str, Tensor]:
        return {self.name: self.table.float()}


@OBSERVERS.register("range")
class ChannelRange(Observer):
    """Least and largest value by timestep and channel, ``[T, C]`` each; 0 where no value was seen."""

    def __init__(self, timesteps: int, channels: int, device: torch.device | None = None) -> None:
        super().__init__(timesteps, channels, device)
        self.low = torch.full((timesteps, channels), torch.inf, device=device)
        self.high = torch.full((timesteps, channels), -torch.inf, device=device)

    def update(self, x: Tensor, timestep: int, generator: torch.Generator) -> None:
        self.low[timestep] = torch.minimum(self.low[timestep], x.amin(dim=0))
        self.high[timestep] = torch.maximum(self.high[timestep], x.amax(dim=0))

    def state(self) -> dict[str, Tensor]:
        return {"low": self.low, "high": self.high}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.low, self.high = state["low"], state["high"]

    def result(self) -> dict[str, Tensor]:
        seen = self.low <= self.high
        return {name: torch.where(seen, table, torch.zeros_like(table)) for name, table in self.state().items()}


@OBSERVERS.register("square")
class ChannelSquare(Observer):
    """Mean square by timestep and channel, ``[T, C]``; summed in float64."""

    def __init__(self, timesteps: int, channels: int, device: torch.device | None = None) -> None:
        super().__init__(timesteps, channels, device)
        self.total = torch.zeros(timesteps, channels, dtype=torch.float64, device=device)
        self.count = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def update(self, x: Tensor, timestep: int, generator: torch.Generator) -> None:
        self.total[timestep] += x.square().sum(dim=0, dtype=torch.float64)
        self.count[timestep] += x.shape[0]

    def state(self) -> dict[str, Tensor]:
        return {"square.total": self.total, "square.count": self.count}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.total, self.count = state["square.total"], state["square.count"]

    def result(self) -> dict[str, Tensor]:
        return {"square": (self.total / self.count.clamp(min=1)[:, None]).float()}


@OBSERVERS.register("histogram")
class LogHistogram(_Table):
    """Counts of log2 |x| by timestep, ``[T, K]``, on at most ``MOST_ROWS`` evenly spaced rows of a call."""

    name = "histogram"
    MOST_ROWS = 128

    def __init__(self, timesteps: int, channels: int, device: torch.device | None = None) -> None:
        super().__init__(timesteps, channels, device)
        self.table = torch.zeros(timesteps, HISTOGRAM_BINS, dtype=torch.int64, device=device)

    def update(self, x: Tensor, timestep: int, generator: torch.Generator) -> None:
        x = x[:: -(-x.shape[0] // self.MOST_ROWS)]
        position = (x.abs().log2() - HISTOGRAM_LOW) / HISTOGRAM_STEP
        bins = position.clamp(0, HISTOGRAM_BINS - 1).to(torch.int64).reshape(-1)  # log2(0) = -inf lands in bin 0
        self.table[timestep] += torch.bincount(bins, minlength=HISTOGRAM_BINS)


@OBSERVERS.register("rows")
class RowSample(Observer):
    """Whole rows, ``PER_CALL`` random ones of every call, as they were. Of a convolution they are windows, of which few are as
    large as many tokens.
    """

    PER_CALL = 4
    WIDE, PER_CALL_OF_WIDE = 4096, 1

    @classmethod
    def count(cls, columns: int) -> int:
        """Return rows to keep of every call."""
        return cls.PER_CALL_OF_WIDE if columns > cls.WIDE else cls.PER_CALL

    def __init__(self, timesteps: int, channels: int, device: torch.device | None = None) -> None:
        super().__init__(timesteps, channels, device)
        self.rows: list[Tensor] = []
        self.indices: list[Tensor] = []

    def update(self, x: Tensor, timestep: int, generator: torch.Generator) -> None:
        count = min(self.count(x.shape[1]), x.shape[0])
        chosen = torch.randperm(x.shape[0], generator=generator)[:count]
        self.rows.append(x[chosen.to(x.device)].cpu())
        self.indices.append(torch.full((count,), timestep, dtype=torch.int64))

    def state(self) -> dict[str, Tensor]:
        rows = torch.cat(self.rows) if self.rows else torch.zeros(0, self.channels)
        indices = torch.cat(self.indices) if self.indices else torch.zeros(0, dtype=torch.int64)
        return {"rows": rows, "rows_timestep": indices}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.rows, self.indices = [state["rows"].cpu()], [state["rows_timestep"].cpu()]

    def result(self) -> dict[str, Tensor]:
        return self.state()
