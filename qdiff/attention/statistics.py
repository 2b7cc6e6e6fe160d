"""What calibration hands over about a model's self-attentions (:mod:`qdiff.calib.attention` fills it)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from qdiff.attention.lists import Tiling
from qdiff.attention.orders import Grid
from qdiff.errors import IntegrityError, command
from qdiff.files import open_tensors, save_tensors


@dataclass
class AttentionStatistics:
    """Groups of timesteps lie between ``edges``; the noisiest, from ``edges[0]`` on, stays dense and is not here.

    Args:
        layers: names of the attention modules.
        grid, tiling: of their tokens.
        edges: falling shares of the noise schedule, ``[groups]``: group ``i`` lies below ``edges[i]``, down to ``edges[i + 1]``.
        orders: name of the order of every head, ``[layers][heads]``.
        mass: float16 ``[groups, layers, heads, rows, columns]``: share of a row's attention that a block of keys gets, the
            largest over all samples.
        options: how many blocks a row may keep.
        errors: float32 ``[groups, layers, heads, options]``: change of the prediction, relative, when a head keeps so many.
    """

    layers: list[str]
    grid: Grid
    tiling: Tiling
    edges: list[float]
    orders: list[list[str]]
    mass: Tensor
    options: list[int]
    errors: Tensor

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tiling = self.tiling
        header = {
            "layers": self.layers,
            "grid": self.grid,
            "tiling": [tiling.tokens, tiling.text, tiling.block_q, tiling.block_k],
            "edges": self.edges,
            "orders": self.orders,
            "options": self.options,
        }
        save_tensors(path, {"mass": self.mass, "errors": self.errors}, {"qdiff": json.dumps(header)})

    @classmethod
    def load(cls, path: Path) -> AttentionStatistics:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: missing.
            IntegrityError: damaged.
        """
        with open_tensors(path, "the statistics of attention") as file:
            try:
                header = json.loads(file.metadata()["qdiff"])
                grid, tiling = tuple(header["grid"]), Tiling(*header["tiling"])
                return cls(
                    header["layers"],
                    grid,
                    tiling,
                    header["edges"],
                    header["orders"],
                    file.get_tensor("mass"),
                    header["options"],
                    file.get_tensor("errors"),
                )
            except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                raise IntegrityError(
                    f"{path} holds no statistics of attention ({error})",
                    f"run: {command('calibrate', '…', attention=True, force=True)}",
                ) from None
