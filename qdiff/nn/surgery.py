"""Changes of a float model's structure that let it be quantized better, each exact without rounding.

- **Split shortcut** (Q-Diffusion, arXiv 2302.04304, section 3.3). A U-Net joins hidden states with a skip connection: two
  populations whose ranges differ up to a hundredfold. Under one scale the smaller one is rounded to nothing. A convolution of
  the joined tensor is a sum, ``W x = W_hidden x_hidden + W_skip x_skip``, so it becomes two convolutions, each with scales and
  weights of its own. Applied to *every* layer that reads the joined channels: the shortcut, and the convolution behind the norm.
- **First token** (MixDQ, arXiv 2405.17873, section 3.1). CLIP's first token is the same for every prompt and fifty times as
  large as the others, so it sets their scale in cross attention's keys and values. Written as ``x_0 = a e + r`` with the
  constant state e, its product is ``a (W e)``, kept in float, plus that of the rest r, which goes through the quantized layer.
  For CLIP's token ``a`` is 1 and r is 0; for the zeros that SDXL gives as an empty prompt both are 0. So nothing has to be
  known about the prompt, and a state that is neither is computed all the same.

The changed layers get new names (``conv1.hidden``, ``conv1.skip``, ``to_k.rest``), with which everything that follows goes on
as with any other layer: statistics, methods, plan, export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from qdiff.errors import InputError, option
from qdiff.plan.plan import Structure
from qdiff.recording.activation_statistics import Statistics

_Layer = TypeVar("_Layer", bound=nn.Module)
HIDDEN, SKIP, REST = "hidden", "skip", "rest"


class SplitConv2d(nn.Module):
    """``hidden(x[:, :at]) + skip(x[:, at:])``: a convolution of joined channels as two. The bias is the first one's.

    Args:
        at: channel at which the skip connection begins.
        hidden, skip: convolutions of the two parts.
    """

    def __init__(self, at: int, hidden: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.at, self.hidden, self.skip = at, hidden, skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[B, out, H', W']`` for ``x [B, in, H, W]``."""
        return self.hidden(x[:, : self.at]) + self.skip(x[:, self.at :])

    @classmethod
    def of(cls, layer: nn.Conv2d, at: int) -> SplitConv2d:
        """Return the two halves of a float convolution; their weights are copies.

        Raises:
            InputError: the channel is none of the layer's.
        """
        if not 0 < at < layer.in_channels:
            raise InputError(f"a layer of {layer.in_channels} channels cannot be split at channel {at}")
        parts = []
        for begin, end in ((0, at), (at, layer.in_channels)):
            part = nn.Conv2d(
                end - begin,
                layer.out_channels,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=layer.bias is not None and begin == 0,
                device="meta",
            )
            part.weight = nn.Parameter(layer.weight.detach()[:, begin:end].contiguous(), requires_grad=False)
            if part.bias is not None and layer.bias is not None:
                part.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
            parts.append(part)
        return cls(at, *parts)


class FirstTokenLinear(nn.Module):
    """A linear layer of text states that computes what is constant in the first token apart, in float.

    Buffers: ``state [in]`` (e), ``direction [in]`` (e / eᵀe: its product with a token is a), ``product [out]`` (W e).

    Args:
        rest: the layer for everything else.
    """

    state: Tensor
    direction: Tensor
    product: Tensor

    def __init__(self, rest: nn.Module, state: Tensor, product: Tensor) -> None:
        super().__init__()
        self.rest = rest
        self.register_buffer("state", state)
        self.register_buffer("direction", state / state.square().sum())
        self.register_buffer("product", product)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output ``[B, tokens, out]`` for ``x [B, tokens, in]``."""
        first, others = x[:, :1], x[:, 1:]
        share = first @ self.direction[:, None]  # [B, 1, 1]
        y = self.rest(torch.cat([first - share * self.state, others], dim=1))
        return torch.cat([y[:, :1] + share * self.product, y[:, 1:]], dim=1)

    @classmethod
    def of(cls, layer: nn.Linear, state: Tensor) -> FirstTokenLinear:
        """Return the layer around a float layer. ``state [in]`` is the constant first token."""
        return cls(layer, state.to(layer.weight, copy=True), layer.weight.detach() @ state.to(layer.weight))


def divide(statistics: Statistics, structure: Structure) -> Statistics:
    """Return the statistics of the changed model from those of the model as it was; exact, because they are kept by
    channel.
    """
    inputs, outputs = {}, dict(statistics.outputs)
    for group, entry in statistics.inputs.items():
        at = structure.split.get(group)
        if at is not None:
            inputs[f"{group}.{HIDDEN}"] = entry.channels(slice(None, at), [f"{group}.{HIDDEN}"])
            inputs[f"{group}.{SKIP}"] = entry.channels(slice(at, None), [f"{group}.{SKIP}"])
            outputs[f"{group}.{HIDDEN}"] = outputs[f"{group}.{SKIP}"] = outputs.pop(group)
        elif entry.first is not None and all(name in structure.first_token for name in entry.layers):
            inputs[f"{group}.{REST}"] = entry.without_first([f"{name}.{REST}" for name in entry.layers])
            outputs |= {f"{name}.{REST}": outputs.pop(name) for name in entry.layers}
        else:
            inputs[group] = entry.with_first()
    return Statistics(statistics.timesteps, inputs, outputs)


def restructure(backbone: nn.Module, structure: Structure, states: Mapping[str, Tensor] | None = None) -> None:
    """Make the changes in place.

    Args:
        backbone: which is changed in place.
        structure: the changes.
        states: for each layer of ``structure.first_token`` its constant state ``[in]``; ``None``: the numbers are loaded later.

    Raises:
        InputError: a layer that is not there or is of another kind.
    """
    for name, at in structure.split.items():
        backbone.set_submodule(name, SplitConv2d.of(_layer(backbone, name, nn.Conv2d), at))
    for name in structure.first_token:
        layer = _layer(backbone, name, nn.Linear)
        if states is None:
            empty = [torch.ones(size, device="meta") for size in (layer.in_features, layer.out_features)]
            backbone.set_submodule(name, FirstTokenLinear(layer, *empty))
        else:
            backbone.set_submodule(name, FirstTokenLinear.of(layer, states[name]))


def _layer(backbone: nn.Module, name: str, kind: type[_Layer]) -> _Layer:
    try:
        layer = backbone.get_submodule(name)
    except AttributeError:
        raise InputError(
            f"the model has no layer {name!r} to restructure", f"quantize again with {option('force', True)}"
        ) from None
    if not isinstance(layer, kind):
        raise InputError(f"layer {name!r} is a {type(layer).__name__}, not a {kind.__name__}")
    return layer
