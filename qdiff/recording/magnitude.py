"""The largest value that a float model computes: it decides whether a graph may compute in float16.

Ranges of layers' inputs do not tell. A residual stream is often read by normalizations alone, so it can grow beyond float16
(65,504) without any layer seeing it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Magnitude:
    """The largest magnitude among a module's parameters and the outputs of all its submodules, while it is a context.

    ``largest`` is a float; it is NaN or infinite where a value was.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.handles = module, []  # type: ignore[var-annotated]
        self._largest = torch.zeros(())
        for parameter in module.parameters():
            self._see(parameter)

    def __enter__(self) -> Magnitude:
        self.handles = [module.register_forward_hook(self._watch) for module in self.module.modules()]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def largest(self) -> float:
        """Return the largest magnitude so far."""
        return float(self._largest)

    def _watch(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        for value in output if isinstance(output, tuple | list) else (output,):
            if isinstance(value, Tensor):
                self._see(value)

    def _see(self, x: Tensor) -> None:
        if x.is_floating_point() and x.numel():
            low, high = x.detach().aminmax()  # one pass, and NaN stays
            self._largest = torch.maximum(self._largest.to(x.device), torch.maximum(-low, high).float())
