"""Modules whose forward is the quantized graph.

:class:`QuantLinear` computes, with every piece but the weight's quantizer optional,

    x' = (x * input_multiplier - shift) R
    y  = ( Q(x' * r[t]) · Qw(W')ᵀ ) / r[t]  +  (x' · downᵀ) · upᵀ  +  bias

- ``input_multiplier [in]`` is SmoothQuant's 1/s (arXiv 2211.10438, eq. 3); the weight carries s.
- ``shift [in]`` moves the middle of asymmetric channels to zero; the bias carries what that takes away (``bias + W shift``).
- ``R`` is a rotation (:mod:`qdiff.nn.rotations`), a block Hadamard matrix or one fitted to outliers; the weight carries its
  inverse.
- ``centered``, tokens are quantized without the mean of their sample, which two more rows of the product give back
  (:func:`centered`).
- ``down [rank, in]``, ``up [out, rank]`` is a low-rank branch in 16 bit (SVDQuant, arXiv 2411.05007); Qw holds the rest.
- ``Q`` is static (one constant scale: INT8, FP8), per token, or by block at run time with a constant tensor scale (NVFP4) or
  none (MX); without Q only weights are quantized.
- ``r[t]`` is the per-timestep activation scale. A static engine needs a *constant* scale for Q, so instead of changing the
  scale with t, the tensor is stretched to the range of the widest timestep and the output shrunk back. ``r[t]`` is one
  number for each calibrated timestep, gathered by the timestep's value, never by a call counter.
- with an ``output_scale``, y is quantized as well: q and k of an attention, so that their product runs in INT8.

:class:`QuantConv2d` is the same with a convolution as the product: its weight is stored as the matrix that meets the windows
(:mod:`qdiff.nn.conv`). It has no shift (padding is zero), is not centered, and has no rotation and no low-rank branch.

All of it but the rounding in Q and Qw is exact: without rounding y is the float layer's output.

Between the timesteps that were calibrated the nearest one is used. The table is float32 and tiny (one number a timestep).

:class:`KeptLinear` and :class:`KeptConv2d` stay unquantized: their weight is stored in 16 bits (in float32, where it is beyond
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
from qdiff.nn.transform import TransformConfig, moved

MEAN_ROWS = 2  # of :func:`centered`


class TimestepIndex:
    """Tells quantized layers which calibrated timestep is the nearest to the one that the backbone is called with.

    One is shared by all layers of a backbone and set by a hook on the backbone at the start of every forward.
    It is not a module: it owns no weights (the calibrated values are a buffer of the backbone).
    """

    def __init__(self) -> None:
        self._index: Tensor | None = None

    def set(self, timestep: Tensor, calibrated: Tensor) -> None:
        """Set the index from ``timestep [batch]`` (or 0-dim) and ``calibrated [T]``: both are the sampler's timestep
        values.
        """
        distance = (timestep.reshape(-1, 1).to(calibrated) - calibrated.reshape(1, -1)).abs()
        self._index = distance.argmin(dim=1)

    def gather(self, table: Tensor) -> Tensor:
        """Return the entries of ``table [T]`` at the current timesteps: ``[batch]``."""
        if self._index is None:
            raise RuntimeError("no timestep was set: call the backbone, not a layer of it")
        return table[self._index]


@dataclass(frozen=True)
class QuantLinearConfig(TransformConfig):
    """Which pieces a :class:`QuantLinear` has, besides those of its transform.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        weights: a quantized row of :data:`qdiff.formats.table.FORMATS`.
        activations: a row; one that is not quantized leaves the input as it is.
        per_token: dynamic scales, one for each token, instead of a static one (formats without blocks).
        timesteps: number of calibrated timesteps if the layer has per-timestep scales, else 0.
        output: format of the output, or ``None``: it stays float.
        storage_dtype: of the low-rank branch.
        window: of a convolution, whose ``in_features`` are the columns of its matrix.
    """

    in_features: int
    out_features: int
    bias: bool
    weights: str
    activations: str
    per_token: bool = False
    timesteps: int = 0
    output: str | None = None
    storage_dtype: str = "float16"
    window: Window | None = None

    @property
    def channels(self) -> int:
        """Return channels of the input."""
        return self.in_features // (1 if self.window is None else self.window.taps)

    @property
    def static(self) -> bool:
        """Return whether the input's scale is one constant."""
        format = format_named(self.activations)
        return format.quantized and not format.block and not self.per_token


class QuantLinear(nn.Module):
    """A linear layer with packed weights and a quantized input. See the module's docstring for the formula.

    Buffers, those that are not used being absent: ``codes`` (packed, :mod:`qdiff.formats.packing`), ``scale`` (as the
    format stores it), ``tensor_scale []`` (of the weight), ``bias [out]``, ``input_scale []`` (static scale, or the tensor
    scale of run-time blocks), ``input_multiplier [in]``, ``shift [in]``, ``rotation [block, block]`` (H),
    ``outlier_rotation [in / block, block, block]`` (G), ``outlier_order [in]`` (P), ``down [rank, in]``, ``up [out, rank]``,
    ``timestep_scales [T]``, ``output_scale []``.

    Args:
        config: which pieces there are.
        timestep_index: of the backbone; needed with per-timestep scales.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_multiplier: Tensor | None
    shift: Tensor | None
    rotation: Tensor | None
    outlier_rotation: Tensor | None
    outlier_order: Tensor | None
    down: Tensor | None
    up: Tensor | None
    timestep_scales: Tensor | None
    output_scale: Tensor | None

    def __init__(self, config: QuantLinearConfig, timestep_index: TimestepIndex | None = None) -> None:
        super().__init__()
        self.config, self.timestep_index = config, timestep_index
        weight, activation = format_named(config.weights), format_named(config.activations)
        shape = (config.out_features, config.in_features)
        scale_dtype = getattr(torch, weight.scale_storage or "float32")
        storage = getattr(torch, config.storage_dtype)

        def add(name: str, present: bool, *size: int, dtype: torch.dtype = torch.float32) -> None:
            self.register_buffer(name, torch.ones(size).to(dtype) if present else None)

        add("codes", True, *weight.packed_shape(shape), dtype=getattr(torch, weight.packed_storage))
        add("scale", True, *weight.scale_shape(shape), dtype=scale_dtype)
        add("tensor_scale", weight.tensor_scale)
        add("bias", config.bias or config.shift, config.out_features)
        add("input_scale", config.static or activation.tensor_scale)
        for name, sized in config.buffer_sizes(*shape, config.channels, storage).items():
            size, dtype = sized or ((), torch.float32)
            add(name, sized is not None, *size, dtype=dtype)
        add("timestep_scales", config.timesteps > 0, config.timesteps)
        add("output_scale", config.output is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[batch, ..., out]`` for ``x [batch, ..., in]``."""
        x = self._transformed(x)
        if self.timestep_scales is None:
            y = self._product(x, self.bias)
        else:
            assert self.timestep_index is not None
            stretch = self.timestep_index.gather(self.timestep_scales)  # [batch]
            stretch = stretch.reshape(-1, *[1] * (x.dim() - 1))  # [batch, 1, ...]
            y = self._product(x * stretch, None) / stretch
            y = y if self.bias is None else y + self._along_output(self.bias)
        if self.down is not None and self.up is not None:
            y = y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        if self.output_scale is None or self.config.output is None:
            return y
        return ops.quantize_dequantize(y, self.output_scale, self.config.output)

    def _transformed(self, x: Tensor) -> Tensor:
        x = moved(x, self.input_multiplier, self.shift)
        return rotate(x, self.rotation, self.outlier_rotation, self.outlier_order)

    def _along_output(self, x: Tensor) -> Tensor:
        """Return ``x [out]`` in a shape that an output can be added to."""
        return x

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.config.centered:
            return F.linear(self._quantized(x), self._weight(x.dtype), bias)
        y = F.linear(self._quantized(centered(x, self._quantized)), self._weight(x.dtype))
        y = y[..., :-MEAN_ROWS, :] + y[..., -MEAN_ROWS:, :].sum(dim=-2, keepdim=True)
        return y if bias is None else y + bias

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return ops.dequantize_weight(self.codes, self.scale, self.tensor_scale, self.config.weights, dtype)

    def _quantized(self, x: Tensor) -> Tensor:
        format = format_named(self.config.activations)
        if not format.quantized:
            return x
        if format.block:
            return ops.block_quantize_dequantize(x, self.input_scale, format.name)
        if self.config.per_token:
            return ops.token_quantize_dequantize(x, format.name)
        assert self.input_scale is not None
        return ops.quantize_dequantize(x, self.input_scale, format.name)

    def exact(self) -> set[str]:
        """Return buffers that lose something in 16 bit: scales of a whole tensor, which are no float16 numbers, and
        stored codes.
        """
        names = {"codes", "tensor_scale"}
        if format_named(self.config.weights).scale != "float16":
            names.add("scale")
        if format_named(self.config.activations).tensor_scale:
            names.add("input_scale")
        return names

    def extra_repr(self) -> str:
        return (
            f"{self.config.in_features}, {self.config.out_features}, {self.config.weights} x {self.config.activations}"
        )


class QuantConv2d(QuantLinear):
    """A convolution with packed weights ``[out, in * height * width]`` and a quantized input.

    Buffers are those of :class:`QuantLinear`, ``input_multiplier`` being of the input's channels. Scales of the input are static.

    Args:
        config: with a ``window``.
        timestep_index: as there.
    """

    def __init__(self, config: QuantLinearConfig, timestep_index: TimestepIndex | None = None) -> None:
        if (
            config.window is None
            or config.shift
            or config.centered
            or config.rotation
            or config.rank
            or config.per_token
        ):
            raise ValueError(
                "a convolution needs a window, and has no shift, mean, rotation, low-rank branch or scales per token"
            )
        super().__init__(config, timestep_index)
        self.window = config.window

    # What diffusers and export ask of a convolution.
    @property
    def in_channels(self) -> int:
        """Return channels of the input."""
        return self.config.channels

    @property
    def out_channels(self) -> int:
        """Return channels of the output."""
        return self.config.out_features

    def _transformed(self, x: Tensor) -> Tensor:
        return x if self.input_multiplier is None else x * self.input_multiplier[:, None, None]

    def _along_output(self, x: Tensor) -> Tensor:
        return x[:, None, None]

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of ``x [B, in, H, W]`` with the weight."""
        weight = self._weight(x.dtype).unflatten(1, (self.config.channels, *self.window.kernel))
        return _convolve(self._quantized(x), weight, bias, self.window)


def centered(x: Tensor, quantized: Callable[[Tensor], Tensor]) -> Tensor:
    """Return tokens without their mean, and the mean as :data:`MEAN_ROWS` rows more: ``x [..., N, in]`` to ``[..., N +
    2, in]``.

    The last rows are the mean and what ``quantized`` loses of it, so that nearly nothing is lost when all rows are quantized. A
    token's output is its own row's and both of these. Sums are taken in float32: thousands of tokens leave float16's range.
    """
    mean = x.mean(dim=-2, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
    return torch.cat([x - mean, mean, mean - quantized(mean)], dim=-2)


class KeptLinear(nn.Module):
    """An unquantized linear layer whose weight is stored in float16 or bfloat16 (or float32, where the values are beyond float16)
    and used in the dtype of its input.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool, storage: torch.dtype = torch.float16) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=storage))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[..., out]`` for ``x [..., in]``."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class KeptConv2d(nn.Module):
    """A convolution that stays unquantized, as :class:`KeptLinear` does. Weight ``[out, in, height, width]``."""

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
        """Return the layer's output ``[B, out, H', W']`` for ``x [B, in, H, W]``."""
        return _convolve(x, self.weight.to(x.dtype), self.bias, self.window)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    return F.conv2d(x, weight, bias, window.stride, window.padding, window.dilation)
