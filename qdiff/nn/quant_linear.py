"""Modules whose forward is the quantized graph.

:class:`QuantLinear` computes, with every piece but the weight's quantizer optional,

    x' = (x * multiplier - shift) R
    y  = ( Q(x' * r[t]) · Qw(W')ᵀ ) / r[t]  +  (x' · downᵀ) · upᵀ  +  bias

- ``multiplier [in]`` is SmoothQuant's 1/s (arXiv 2211.10438, eq. 3); the weight carries s.
- ``shift [in]`` moves the middle of asymmetric channels to zero; the bias carries what that takes away (``bias + W shift``).
- ``R`` is a rotation (:mod:`qdiff.nn.rotations`), a block Hadamard matrix or one fitted to outliers; the weight carries its
  inverse.
- ``centered``, tokens are quantized without the mean of their sample, which two more rows of the product give back
  (:func:`centered`).
- ``down [rank, in]``, ``up [out, rank]`` is a low-rank branch in 16 bit (SVDQuant, arXiv 2411.05007); Qw holds the rest.
- ``Q`` is static (one constant scale: INT8, FP8), by token, or by block at run time with a constant tensor scale (NVFP4) or
  none (MX); without Q only weights are quantized.
- ``r[t]`` is the per-timestep activation scale. A static engine needs a *constant* scale for Q, so instead of changing the
  scale with t, the tensor is stretched to the range of the widest timestep and the output shrunk back. ``r[t]`` is one
  number for each calibrated timestep, gathered by the timestep's value, never by a call counter.
- with an ``output_scale``, y is quantized as well: q and k of an attention, so that their product runs in INT8.

:class:`QuantConv2d` is the same with a convolution as the product: its weight is stored as the matrix that meets the windows
(:mod:`qdiff.nn.conv`). It has no shift (padding is zero), is not centered, and has no rotation and no low-rank branch.

All of it but the rounding in Q and Qw is exact: without rounding y is the float layer's output.

Between the timesteps that were calibrated the nearest one is used. The table is float32 and tiny (one number a timestep).

:class:`HalfLinear` and :class:`HalfConv2d` stay unquantized: their weight is stored in 16 bits (in float32, where it is beyond
float16) and used in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.formats.table import format_named
from qdiff.nn import ops
from qdiff.nn.conv import Window
from qdiff.nn.rotations import rotate

MEAN_ROWS = 2  # of :func:`centered`


class TimestepClock:
    """Tells quantized layers which calibrated timestep is the nearest to the one that the backbone is called with.

    One clock is shared by all layers of a backbone and set by a hook on the backbone at the start of every forward.
    It is not a module: it owns no weights (the calibrated values are a buffer of the backbone).
    """

    def __init__(self) -> None:
        self._index: Tensor | None = None

    def set(self, timestep: Tensor, calibrated: Tensor) -> None:
        """``timestep [batch]`` (or 0-dim), ``calibrated [T]``: both are the sampler's timestep values."""
        distance = (timestep.reshape(-1, 1).to(calibrated) - calibrated.reshape(1, -1)).abs()
        self._index = distance.argmin(dim=1)

    def gather(self, table: Tensor) -> Tensor:
        """``table [T]`` at the current timesteps: ``[batch]``."""
        if self._index is None:
            raise RuntimeError("the clock was not set: call the backbone, not a layer of it")
        return table[self._index]


@dataclass(frozen=True)
class LinearForm:
    """Which pieces a :class:`QuantLinear` has. Everything about its shape, nothing about its numbers.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        weights: a quantized row of :data:`qdiff.formats.table.FORMATS`.
        activations: a row; one that is not quantized leaves the input as it is.
        by_token: dynamic scales, one for each token, instead of a static one (formats without blocks).
        smooth, shift: whether there is a ``multiplier`` and a ``shift``.
        centered: whether tokens are quantized without their sample's mean (formats with run-time blocks).
        rotation: block size of the rotation; 0: none.
        outliers: whether the rotation has factors fitted to outliers before its Hadamard matrix.
        rank: of the low-rank branch; 0: none.
        timesteps: number of calibrated timesteps if the layer has per-timestep scales, else 0.
        output: format of the output, or ``None``: it stays float.
        kept: storage of the low-rank branch.
        window: of a convolution, whose ``in_features`` are the columns of its matrix.
    """

    in_features: int
    out_features: int
    bias: bool
    weights: str
    activations: str
    by_token: bool = False
    smooth: bool = False
    shift: bool = False
    centered: bool = False
    rotation: int = 0
    outliers: bool = False
    rank: int = 0
    timesteps: int = 0
    output: str | None = None
    kept: str = "float16"
    window: Window | None = None

    @property
    def channels(self) -> int:
        """Channels of the input."""
        return self.in_features // (1 if self.window is None else self.window.taps)

    @property
    def static(self) -> bool:
        """Whether the input's scale is one constant."""
        format = format_named(self.activations)
        return format.quantized and not format.block and not self.by_token


class QuantLinear(nn.Module):
    """A linear layer with packed weights and a quantized input. See the module's docstring for the formula.

    Buffers, those that are not used being absent: ``codes`` (packed, :mod:`qdiff.formats.packing`), ``scale`` (as the
    format stores it), ``tensor_scale []`` (of the weight), ``bias [out]``, ``input_scale []`` (static scale, or the tensor
    scale of run-time blocks), ``multiplier [in]``, ``shift [in]``, ``rotation [block, block]`` (H),
    ``outlier_rotation [in / block, block, block]`` (G), ``outlier_order [in]`` (P), ``down [rank, in]``, ``up [out, rank]``,
    ``timestep_scale [T]``, ``output_scale []``.

    Args:
        form: which pieces there are.
        clock: the backbone's clock; needed with per-timestep scales.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    multiplier: Tensor | None
    shift: Tensor | None
    rotation: Tensor | None
    outlier_rotation: Tensor | None
    outlier_order: Tensor | None
    down: Tensor | None
    up: Tensor | None
    timestep_scale: Tensor | None
    output_scale: Tensor | None

    def __init__(self, form: LinearForm, clock: TimestepClock | None = None) -> None:
        super().__init__()
        self.form, self.clock = form, clock
        weight, activation = format_named(form.weights), format_named(form.activations)
        shape = (form.out_features, form.in_features)
        scale_dtype = getattr(torch, weight.scale_storage or "float32")
        kept = getattr(torch, form.kept)

        def add(name: str, present: bool, *size: int, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.ones(size).to(dtype) if present else None)

        add("codes", True, *weight.packed_shape(shape), dtype=getattr(torch, weight.packed_storage))
        add("scale", True, *weight.scale_shape(shape), dtype=scale_dtype)
        add("tensor_scale", weight.tensor_scale)
        add("bias", form.bias or form.shift, form.out_features)
        add("input_scale", form.static or activation.tensor_scale)
        add("multiplier", form.smooth, form.channels)
        add("shift", form.shift, form.in_features)
        add("rotation", form.rotation > 0, form.rotation, form.rotation)
        blocks = form.in_features // form.rotation if form.outliers else 0
        add("outlier_rotation", form.outliers, blocks, form.rotation, form.rotation)
        add("outlier_order", form.outliers, form.in_features, dtype=torch.int64)
        add("down", form.rank > 0, form.rank, form.in_features, dtype=kept)
        add("up", form.rank > 0, form.out_features, form.rank, dtype=kept)
        add("timestep_scale", form.timesteps > 0, form.timesteps)
        add("output_scale", form.output is not None)

    def forward(self, x: Tensor) -> Tensor:
        """``x [batch, ..., in]`` to ``[batch, ..., out]``."""
        x = self._transformed(x)
        if self.timestep_scale is None:
            y = self._product(x, self.bias)
        else:
            assert self.clock is not None
            stretch = self.clock.gather(self.timestep_scale)  # [batch]
            stretch = stretch.reshape(-1, *[1] * (x.dim() - 1))  # [batch, 1, ...]
            y = self._product(x * stretch, None) / stretch
            y = y if self.bias is None else y + self._along_output(self.bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        if self.output_scale is None or self.form.output is None:
            return y
        return ops.quantize_dequantize(y, self.output_scale, self.form.output)

    def _transformed(self, x: Tensor) -> Tensor:
        x = transform(x, self.multiplier, self.shift)
        return rotate(x, self.rotation, self.outlier_rotation, self.outlier_order)

    def _along_output(self, x: Tensor) -> Tensor:
        """``x [out]`` in a shape that an output can be added to."""
        return x

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.form.centered:
            return F.linear(self._quantized(x), self._weight(x.dtype), bias)
        y = F.linear(self._quantized(centered(x, self._quantized)), self._weight(x.dtype))
        y = y[..., :-MEAN_ROWS, :] + y[..., -MEAN_ROWS:, :].sum(dim=-2, keepdim=True)
        return y if bias is None else y + bias

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_weight(self.codes, self.scale, self.tensor_scale, self.form.weights, dtype)

    def _quantized(self, x: Tensor) -> Tensor:
        format = format_named(self.form.activations)
        if not format.quantized:
            return x
        if format.block:
            return ops.block_quantize_dequantize(x, self.input_scale, format.name)
        if self.form.by_token:
            return ops.token_quantize_dequantize(x, format.name)
        assert self.input_scale is not None
        return ops.quantize_dequantize(x, self.input_scale, format.name)

    def exact(self) -> set[str]:
        """Buffers that lose something in 16 bit: scales of a whole tensor, which are no float16 numbers, and stored codes."""
        names = {"codes", "tensor_scale"}
        if format_named(self.form.weights).scale != "float16":
            names.add("scale")
        if format_named(self.form.activations).tensor_scale:
            names.add("input_scale")
        return names

    def extra_repr(self) -> str:
        return f"{self.form.in_features}, {self.form.out_features}, {self.form.weights} x {self.form.activations}"


class QuantConv2d(QuantLinear):
    """A convolution with packed weights ``[out, in * height * width]`` and a quantized input.

    Buffers are those of :class:`QuantLinear`, ``multiplier`` being of the input's channels. Scales of the input are static.

    Args:
        form: with a ``window``.
        clock: as there.
    """

    def __init__(self, form: LinearForm, clock: TimestepClock | None = None) -> None:
        if form.window is None or form.shift or form.centered or form.rotation or form.rank or form.by_token:
            raise ValueError(
                "a convolution needs a window, and has no shift, mean, rotation, low-rank branch or scales by token"
            )
        super().__init__(form, clock)
        self.window = form.window

    # What diffusers and export ask of a convolution.
    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return self.form.channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.form.out_features

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.multiplier is None else x * self.multiplier[:, None, None]

    def _along_output(self, x: Tensor) -> Tensor:
        return x[:, None, None]

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x [B, in, H, W]``."""
        weight = self._weight(x.dtype).unflatten(1, (self.form.channels, *self.window.kernel))
        return _convolve(self._quantized(x), weight, bias, self.window)


def centered(x: Tensor, quantized: Callable[[Tensor], Tensor]) -> Tensor:
    """Tokens without their mean, and the mean as :data:`MEAN_ROWS` rows more: ``x [..., N, in]`` to ``[..., N + 2, in]``.

    The last rows are the mean and what ``quantized`` loses of it, so that nearly nothing is lost when all rows are quantized. A
    token's output is its own row's and both of these. Sums are taken in float32: thousands of tokens leave float16's range.
    """
    mean = x.mean(dim=-2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return torch.cat([x - mean, mean, mean - quantized(mean)], dim=-2)


def transform(x: Tensor, multiplier: Tensor | None, shift: Tensor | None) -> Tensor:
    """``x * multiplier - shift``: what a layer's input goes through before its rotation and its quantizer."""
    if multiplier is not None:
        x = x * multiplier
    return x if shift is None else x - shift


class HalfLinear(nn.Module):
    """An unquantized linear layer whose weight is stored in float16 or bfloat16 (or float32, where the values are beyond float16)
    and used in the dtype of its input."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=storage))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class HalfConv2d(nn.Module):
    """A convolution that stays unquantized, as :class:`HalfLinear` does. Weight ``[out, in, height, width]``."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, int, int, int], window: Window, bias: bool, storage: torch.dtype = torch.float16
    ) -> None:
        super().__init__()
        self.out_channels, self.in_channels = shape[:2]
        self.window = window
        self.register_buffer("weight", torch.zeros(shape, dtype=storage))
        self.register_buffer("bias", torch.zeros(shape[0]) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, in, H, W]`` to ``[B, out, H', W']``."""
        return _convolve(x, self.weight.to(x.dtype), self.bias, self.window)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation)
