"""What a layer reads: a linear layer reads tokens, a convolution reads windows.

A convolution is a product of windows with its weight as a matrix: ``y[p] = W.flatten(1) · window(x, p)``, with the window at
output position p flattened in the order of the weight, channel by channel. So what is known about linear layers (rounding by
output errors, GPTQ, per-channel scales) holds for convolutions on windows instead of tokens, with ``in * height * width``
columns. What belongs to a *channel* of the input (its range, its smoothing factor) belongs to ``taps`` columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution without groups, padded with zeros. Sizes are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        """Return columns of the weight's matrix that belong to one channel of the input."""
        return self.kernel[0] * self.kernel[1]

    @classmethod
    def of(cls, layer: nn.Conv2d) -> Window:
        """Return the window of a convolution that :func:`is_plain` accepts."""
        height, width = layer.kernel_size
        up, left = map(int, layer.padding)  # no word: is_plain
        return cls(
            (height, width), (layer.stride[0], layer.stride[1]), (up, left), (layer.dilation[0], layer.dilation[1])
        )


def is_plain(layer: nn.Module) -> bool:
    """Return whether a module is a convolution that can be quantized. Not a patch embedding (its kernel is its stride:
    the first layer of a DiT, as sensitive as small), no groups, no padding but by zeros.
    """
    if type(layer) is not nn.Conv2d or layer.groups != 1 or layer.padding_mode != "zeros":
        return False
    return not isinstance(layer.padding, str) and (layer.kernel_size != layer.stride or layer.kernel_size == (1, 1))


def tokens(layer: nn.Module, x: Tensor, read: Tensor | None = None) -> Tensor:
    """Return the input as ``[N, channels]``: of ``[..., in]`` for a linear layer, of ``[B, in, H, W]`` for a
    convolution.

    Args:
        layer: linear or a convolution.
        x: its input.
        read: bool ``[...]`` of a linear layer's tokens, where only some count (:meth:`qdiff.models.base.Family.read_by`).
    """
    if read is not None:
        return x[read]
    return (x.movedim(1, -1) if isinstance(layer, nn.Conv2d) else x).reshape(-1, layer_channels(layer))


def layer_channels(layer: nn.Module) -> int:
    """Return channels of the input."""
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features  # type: ignore[return-value]


def sample_windows(layer: nn.Conv2d, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return ``count`` random windows of ``x [B, in, H, W]``, as they meet the weight: ``[count, in * height *
    width]``.
    """
    window = Window.of(layer)
    (up, left), (height, width) = window.padding, window.kernel
    padded = F.pad(x, (left, left, up, up))
    steps = [
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, dilation in zip(
            padded.shape[2:], window.kernel, window.stride, window.dilation, strict=True
        )
    ]
    positions = len(x) * steps[0] * steps[1]
    chosen = torch.randperm(positions, generator=generator)[:count].to(x.device)
    picture, place = chosen // (steps[0] * steps[1]), chosen % (steps[0] * steps[1])
    rows = (place // steps[1] * window.stride[0])[:, None] + torch.arange(height, device=x.device) * window.dilation[
        0
    ]  # [count, height]
    columns = (place % steps[1] * window.stride[1])[:, None] + torch.arange(width, device=x.device) * window.dilation[1]
    found = padded[picture[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [count, height, width, in]
    return found.permute(0, 3, 1, 2).flatten(1)
