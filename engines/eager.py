"""Torch itself as an engine: the float model (the reference) and the quantized model in simulation.

They are two engines and not a switch, because every table that compares engines needs both as rows. What differs is
which module the caller hands over; nothing is built and nothing is compiled, so the numbers are exactly the module's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qdiff.engines.base import ENGINES, Engine, Runner

if TYPE_CHECKING:
    from torch import Tensor, nn


class ModuleRunner(Runner):
    """Calls a torch module with named inputs.

    Args:
        module: a diffusers backbone, its quantized twin, or an export wrapper that returns the tensor itself.
        fixed: keyword arguments that every call gets (e.g. ``added_cond_kwargs`` of a bare diffusers backbone).

    Floating inputs are cast to the module's element type, but not the timestep: diffusers computes its embedding in
    float32 whatever the weights are, and 999.5 is no number in BF16.
    """

    def __init__(self, module: nn.Module, fixed: Mapping[str, object] | None = None) -> None:
        self._module = module
        self._fixed = dict(fixed or {})
        if "return_dict" in inspect.signature(module.forward).parameters:
            self._fixed.setdefault("return_dict", False)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        home = next(iter(inputs.values())).device
        weight = next((p for p in self._module.parameters() if p.is_floating_point()), None)
        given = {}
        for name, tensor in inputs.items():
            cast = weight is not None and tensor.is_floating_point() and name != "timestep"
            device = weight.device if weight is not None else tensor.device
            given[name] = tensor.to(device, weight.dtype if weight is not None and cast else tensor.dtype)
        with torch.inference_mode():
            result = self._module(**given, **self._fixed)
        tensor = result[0] if isinstance(result, (tuple, list)) else result
        return tensor.to(home, torch.float32)


class _Torch(Engine):
    library = "torch"

    def load_module(self, module: nn.Module) -> ModuleRunner:
        return ModuleRunner(module)


@ENGINES.register("float")
class FloatEngine(_Torch):
    """The float model in torch: what every other engine is compared with."""

    name = "float"
    title = "float model in torch (the reference)"
    rank = 0
    runs_float = True


@ENGINES.register("eager")
class EagerEngine(_Torch):
    """The quantized model in torch: exact arithmetic of the plan, at float speed."""

    name = "eager"
    title = "quantized model simulated in torch"
    rank = 1
