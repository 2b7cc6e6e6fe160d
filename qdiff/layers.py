"""Modules whose forward is the quantized graph.

:class:`QuantLinear` computes, with every piece but the two quantizers optional,

    y = ( Q(x * multiplier * r[t]) · Qw(W / multiplier)ᵀ ) / r[t] + bias

- ``multiplier [in]`` is SmoothQuant's 1/s (arXiv 2211.10438, eq. 3); the weight carries s.
- with an ``output_scale``, y is quantized as well: q and k of an attention, so that their product runs in INT8.
- ``r[t]`` is the per-timestep activation scale. A static engine needs a *constant* scale for Q, so instead of changing the
  scale with t, the tensor is stretched to the range of the widest timestep and the output shrunk back. ``r[t]`` is one
  number for each calibrated timestep, gathered by the timestep's value, never by a call counter. The linear part is
  exactly unchanged; only the rounding gets finer where the range is small.

Between the timesteps that were calibrated the nearest one is used. The table is float32 and tiny (one number a timestep).

:class:`HalfLinear` is a linear layer that stays unquantized: its weight is stored in 16 bits and used in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff import ops


class TimestepClock:
    """Tells quantized layers which calibrated timestep is the nearest to the one that the backbone is called with.

    One clock is shared by all layers of a backbone and set by a hook on the backbone at the start of every forward.
    It is not a module: it owns no weights (the calibrated values are a buffer of the backbone).
    """

    def __init__(self) -> None:
        self._index: Tensor | None = None

    def set(self, timestep: Tensor, calibrated: Tensor) -> None:
        """``timestep [batch]`` (or 0-dim), ``calibrated [T]``: both are the sampler's timestep values."""
        distance = (timestep.reshape(-1, 1).to(calibrated.dtype) - calibrated.reshape(1, -1)).abs()
        self._index = distance.argmin(dim=1)

    def gather(self, table: Tensor) -> Tensor:
        """``table [T]`` at the current timesteps: ``[batch]``."""
        if self._index is None:
            raise RuntimeError("the clock was not set: call the backbone, not a layer of it")
        return table[self._index]


class QuantLinear(nn.Module):
    """A linear layer with packed weights and statically quantized input. See the module's docstring for the formula.

    Args:
        in_features, out_features: as in ``nn.Linear``.
        bias: whether there is one.
        weight_format, activation_format: rows of :data:`qdiff.formats.FORMATS`.
        smooth: whether there is a ``multiplier``.
        timesteps: number of calibrated timesteps if the layer has per-timestep scales, else 0.
        clock: the backbone's clock; needed when ``timesteps`` is not 0.
        output_format: format of the output, or ``None``: it stays float.

    Buffers: ``codes [out, in]``, ``scale [out]``, ``bias [out]``, ``input_scale []``, ``multiplier [in]``,
    ``timestep_scale [T]``, ``output_scale []``; those that are not used are absent.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    multiplier: Tensor | None
    timestep_scale: Tensor | None
    output_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weight_format: str,
        activation_format: str,
        smooth: bool = False,
        timesteps: int = 0,
        clock: TimestepClock | None = None,
        output_format: str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_format, self.activation_format = weight_format, activation_format
        self.clock = clock
        self.output_format = output_format
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("multiplier", torch.ones(in_features) if smooth else None)
        self.register_buffer("timestep_scale", torch.ones(timesteps) if timesteps else None)
        self.register_buffer("output_scale", torch.ones(()) if output_format else None)

    def forward(self, x: Tensor) -> Tensor:
        """``x [batch, ..., in]`` to ``[batch, ..., out]``."""
        if self.multiplier is not None:
            x = x * self.multiplier
        if self.timestep_scale is None:
            y = self._product(x, self.bias)
        else:
            assert self.clock is not None
            stretch = self.clock.gather(self.timestep_scale)  # [batch]
            stretch = stretch.reshape(-1, *[1] * (x.dim() - 1))  # [batch, 1, ...]
            y = self._product(x * stretch, None) / stretch
            y = y if self.bias is None else y + self.bias
        if self.output_scale is None or self.output_format is None:
            return y
        return ops.quantize_dequantize(y, self.output_scale, self.output_format)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = ops.quantize_dequantize(x, self.input_scale, self.activation_format)
        return F.linear(x, ops.dequantize_weight(self.codes, self.scale, self.weight_format), bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.weight_format} x {self.activation_format}"


class HalfLinear(nn.Module):
    """An unquantized linear layer whose weight is stored in float16 or bfloat16 and used in the dtype of its input."""

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
