"""What a layer's input and weight go through before their quantizers, so that their product stays the same.

    x' = (x * input_multiplier - shift) R        W' = (W / input_multiplier) (Rᵀ)⁻¹ - up · down

A :class:`Transform` holds the numbers of a group of layers, a :class:`TransformConfig` says which pieces there are. Methods
decide the first, plans spell the second out, layers have its buffers. A new piece is added here, and in what computes with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from qdiff.nn.rotations import Rotation


@dataclass(frozen=True, kw_only=True)
class TransformConfig:
    """Which pieces a transform has. Everything about its shape, nothing about its numbers.

    Args:
        input_multiplier, shift: whether there is an ``input_multiplier`` and a ``shift``.
        centered: whether tokens are quantized without their sample's mean (formats with run-time blocks).
        rotation: block size of the rotation; 0: none.
        outliers: whether the rotation has factors fitted to outliers before its Hadamard matrix.
        rank: of the low-rank branch; 0: none.
    """

    input_multiplier: bool = False
    shift: bool = False
    centered: bool = False
    rotation: int = 0
    outliers: bool = False
    rank: int = 0

    def buffer_sizes(
        self, out_features: int, in_features: int, channels: int, storage: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
        """Return size and dtype of every buffer of a layer's transform; ``None``: the layer is without it.

        Args:
            out_features: rows of the weight as a matrix.
            in_features: its columns.
            channels: of the input; a convolution has fewer than columns.
            storage: dtype of the low-rank branch.
        """
        block = self.rotation
        sizes = {
            "input_multiplier": (self.input_multiplier, (channels,), torch.float32),
            "shift": (self.shift, (in_features,), torch.float32),
            "rotation": (block > 0, (block, block), torch.float32),
            "outlier_rotation": (self.outliers, (in_features // max(block, 1), block, block), torch.float32),
            "outlier_order": (self.outliers, (in_features,), torch.int64),
            "down": (self.rank > 0, (self.rank, in_features), storage),
            "up": (self.rank > 0, (out_features, self.rank), storage),
        }
        return {name: (size, dtype) if present else None for name, (present, size, dtype) in sizes.items()}


@dataclass(frozen=True)
class Transform:
    """The transform of a group of layers. It changes nothing without rounding.

    Args:
        input_multiplier, shift: ``[in]``; ``(x * input_multiplier - shift)`` is what is rotated and quantized.
        rotation: of the moved input; ``None``: none.
        low_rank: for each layer ``(down [rank, in], up [out, rank])`` in transformed coordinates, or ``None``: no branch.
        centered: whether tokens are quantized without the mean of their sample (:func:`qdiff.nn.quant_linear.centered`).
    """

    input_multiplier: Tensor | None = None
    shift: Tensor | None = None
    rotation: Rotation | None = None
    low_rank: tuple[tuple[Tensor, Tensor], ...] | None = None
    centered: bool = False

    @property
    def rank(self) -> int:
        """Return the rank of the low-rank branches; 0: none."""
        return 0 if self.low_rank is None else self.low_rank[0][0].shape[0]

    @property
    def pieces(self) -> TransformConfig:
        """Return which pieces there are."""
        return TransformConfig(
            input_multiplier=self.input_multiplier is not None,
            shift=self.shift is not None,
            centered=self.centered,
            rotation=0 if self.rotation is None else self.rotation.block,
            outliers=self.rotation is not None and self.rotation.first is not None,
            rank=self.rank,
        )

    def inputs(self, x: Tensor) -> Tensor:
        """Return ``x'`` of ``x [..., in]``."""
        x = moved(x, self.input_multiplier, self.shift)
        return x if self.rotation is None else self.rotation.forward(x)

    def weight(self, weight: Tensor) -> Tensor:
        """Return ``(W / input_multiplier) (Rᵀ)⁻¹`` of ``W [out, in]``: what ``x'`` is to be multiplied with."""
        if self.input_multiplier is not None:
            weight = weight / self.input_multiplier
        return weight if self.rotation is None else self.rotation.weight(weight)

    def buffers(self, index: int, taps: int, storage: torch.dtype) -> dict[str, Tensor | None]:
        """Return the buffers of the group's layer ``index``, by the names of :meth:`TransformConfig.buffer_sizes`.

        Args:
            index: of the layer.
            taps: columns of a convolution for each channel of its input, which share one multiplier.
            storage: dtype of the low-rank branch.
        """
        rotation = self.rotation
        down, up = (None, None) if self.low_rank is None else self.low_rank[index]
        return {
            "input_multiplier": None if self.input_multiplier is None else self.input_multiplier[::taps],
            "shift": self.shift,
            "rotation": None if rotation is None else rotation.last,
            "outlier_rotation": None if rotation is None else rotation.first,
            "outlier_order": None if rotation is None else rotation.order,
            "down": None if down is None else down.to(storage),
            "up": None if up is None else up.to(storage),
        }


PIECES = tuple(field.name for field in fields(TransformConfig))
CHANGES_WEIGHTS = ("input_multiplier", "shift", "rotation", "low_rank")  # codes rounded before are of another weight


def moved(x: Tensor, multiplier: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return ``x * multiplier - shift``: the part of a transform before its rotation."""
    if multiplier is not None:
        x = x * multiplier
    return x if shift is None else x - shift
