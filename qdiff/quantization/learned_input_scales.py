"""Constant scales of activations, learned: LSQ (arXiv 1902.08153) in the block-wise loop of
:mod:`qdiff.quantization.reconstruction`.

A static scale follows from the largest value seen, so that nothing is cut off. A smaller one may be better: what it cuts is rare,
and all the rest gets finer steps. ``clip`` tries a few shares on the error of one layer. Here the scale goes down the gradient of
the *block's* error, the scales of all its layers at once, after the weights' codes are finished and placed: step 4 of
Q-Diffusion (arXiv 2302.04304), which learns them after the weights' rounding because they are to fit the weights as they are.

The gradient is LSQ's (eq. 3 there), straight through the rounding and to the scale both inside and outside of the range; it
belongs to the operator (:mod:`qdiff.nn.ops`), so what is trained is the quantized graph. Two things differ from the paper:

- The variable is log s. A scale stays positive, and a step changes it by a share of what it is.
- Adam and not plain SGD, as in Q-Diffusion. It divides by the gradient's own magnitude, so LSQ's factor 1 / sqrt(N Q_P) (section
  2.2 there), which makes the step of a scale commensurate with the scale, would cancel; the logarithm does that work.

Layers that read one tensor (q, k and v) have one scale and keep one. A layer with scales by timestep computes
``Q(x r[t]; s) / r[t]``, whose step at t is s / r[t]: there the table r is learned and s stays, which is a learned step for each
timestep (TALSQ of EfficientDM, arXiv 2310.03270) in the form that a static engine can run.

In the loop, scales already lie on float16's grid as every scale of a layer does, straight through that rounding too: what is
learned on is what is stored. Scales per token and of blocks are made at run time, and there is nothing to learn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.formats import scales
from qdiff.formats.table import format_named
from qdiff.methods.base import LARGEST_STRETCH
from qdiff.nn.quant_linear import QuantLinear


class LearnedInputScale:
    """The scale of one tensor, or its table by timestep, while it is learned.

    Args:
        layers: that read the tensor; their buffers are equal, and :meth:`install` replaces them.
    """

    def __init__(self, layers: list[QuantLinear]) -> None:
        self.layers = layers
        self.scale, self.table = layers[0].input_scale, layers[0].timestep_scales
        assert self.scale is not None, "only static scales are learned"
        self.variable = nn.Parameter((self.scale if self.table is None else self.table).log())

    def value(self) -> Tensor:
        """Return the scale ``[]``, or the table ``[T]``, as it is now: positive and on float16's grid,
        differentiable.
        """
        element = format_named(self.layers[0].config.activations).element
        largest = scales.largest_scale(element) if self.table is None else LARGEST_STRETCH
        value = self.variable.exp().clamp(scales.SMALLEST_SCALE, largest)
        return value + (scales.to_half_grid(value) - value).detach()

    def install(self) -> None:
        """Let the layers compute with :meth:`value`."""
        name, value = "input_scale" if self.table is None else "timestep_scales", self.value()
        for layer in self.layers:
            setattr(layer, name, value)

    def finished(self) -> tuple[Tensor, Tensor | None]:
        """Return the scale and the table, as :meth:`qdiff.methods.base.LayerGroup.activation_scale` gives them."""
        assert self.scale is not None
        with torch.no_grad():
            value = scales.to_half_grid(self.value())
        return (value, None) if self.table is None else (self.scale, value)
