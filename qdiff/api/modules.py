"""Quantizing any torch module from example calls, without a pipeline and without a run folder."""

from __future__ import annotations

import contextlib
import copy
import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api.arguments import checked
from qdiff.api.progress import Progress, reporting
from qdiff.errors import InputError, QualityGateError, UsageError, out_of_memory
from qdiff.events import log
from qdiff.models.base import Family
from qdiff.models.layers import quantizable_layers
from qdiff.models.model import Model
from qdiff.plan.plan import Plan
from qdiff.recipes import load_recipe
from qdiff.recording.inputs import Axis, InputSpec
from qdiff.recording.trajectory import Trajectory, save_shard

Call = Tensor | Sequence[Any] | Mapping[str, Any]
TIMESTEP = "timestep"


@checked
def quantize_module(
    module: nn.Module,
    calls: Sequence[Call],
    recipe: Path | str = "int8",
    *,
    settings: Sequence[str] = (),
    progress: Progress = None,
) -> nn.Module:
    """Return a quantized copy of a module; its plan is the attribute ``qdiff_plan``.

    Calls with another value of the argument ``timestep`` have statistics of their own, as with a denoiser; without that argument
    there is one timestep. Patterns of a recipe that name layers by family do not apply. Sequential recipes walk through the
    members of the module's outermost ``ModuleList``.

    Args:
        module: float, in evaluation mode; it stays as it is.
        calls: what the module is called with: one tensor, positional arguments, or named ones. The last axis of what a linear
            layer reads are its channels.
        recipe: a built-in recipe or a YAML file, with a scheme (not ``mixed`` or ``routed``, which make pictures).
        settings: entries of the recipe to change, each ``"a.b=value"``.
        progress: see :data:`qdiff.api.progress.Progress`.

    Raises:
        UsageError: no module, or one tensor in the place of a list of calls.
        InputError: no layer, no call, calls that do not fit the forward, arguments in lists or dicts, a recipe that cannot be
            applied, or a forward that reads the weights of its layers instead of calling them.
    """
    from qdiff.calib.collect import Collector
    from qdiff.quantization.quantize import quantize

    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{type(module).__name__} is no torch module", "qdiff.quantize takes a pipeline, a folder or a name"
        )
    if isinstance(calls, Tensor):
        raise UsageError("calls is one tensor", "give a list of calls: [x1, x2, …]")
    if not quantizable_layers(module):
        raise InputError(f"{type(module).__name__} has no linear layer or convolution", "there is nothing to quantize")
    wanted = load_recipe(str(recipe), list(settings) or None)
    if wanted.scheme is None:
        raise InputError(
            f"recipe {wanted.name!r} chooses by pictures, and a module makes none", "take int8, w4a8 or nvfp4"
        )
    given, constants = _arguments(module, calls)
    quantized = copy.deepcopy(module).eval()
    family = ModuleFamily(given[0], constants)
    model = Model(family, SimpleNamespace(module=quantized), "module", "", "a torch module")
    if wanted.sequential is not None and not family.blocks(quantized):
        log.warning(
            "quantize_module: the module has no ModuleList to walk through: all layers are decided about at once"
        )
        wanted = wanted.model_copy(update={"sequential": None})
    with reporting(progress), tempfile.TemporaryDirectory(prefix="qdiff-") as folder:
        for number, call in enumerate(given):
            timestep = float(call[TIMESTEP].reshape(-1)[0]) if TIMESTEP in call else 0.0
            save_shard(Path(folder), number, [timestep], {name: value[None] for name, value in call.items()}, {})
        trajectory = Trajectory(Path(folder), model.device)
        with _calls_that_fit(family, module, given):
            statistics = Collector(model, trajectory, "").collect(Path(folder) / "statistics.partial.safetensors")
            plan: Plan = quantize(model, wanted, statistics, trajectory)
    made = model.backbone
    _check(family, module, made, given[0])
    made.qdiff_plan = plan  # type: ignore[assignment]
    return made


@contextlib.contextmanager
def _calls_that_fit(family: ModuleFamily, module: nn.Module, calls: Sequence[Mapping[str, Tensor]]) -> Iterator[None]:
    """Turn an error of torch inside the block into one about the call that is its cause, where one is."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if not out_of_memory(error):
            for number, call in enumerate(calls):
                _require_call(family, module, number, call)
        raise


def _require_call(family: ModuleFamily, module: nn.Module, number: int, call: Mapping[str, Tensor]) -> None:
    """Refuse a call that the float module fails on, or answers with NaN or infinity.

    Raises:
        InputError: names the call; of a failure the layer, and the shape that it was given.
    """
    entered: list[tuple[str, list[int] | None]] = []

    def enter(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(_: nn.Module, args: tuple[object, ...]) -> None:
            entered.append((name, list(args[0].shape) if args and isinstance(args[0], Tensor) else None))

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, part in module.named_modules():
            stack.callback(part.register_forward_pre_hook(enter(name)).remove)
            stack.callback(part.register_forward_hook(lambda *_: entered.pop() and None).remove)
        try:
            finite = bool(family.call(module, call).isfinite().all())
        except Exception as error:  # whatever the module raises
            name, shape = entered[-1] if entered else ("", None)
            where = f"layer {name!r}" if name else f"{type(module).__name__}.forward"
            given = ", ".join(f"{key} {list(value.shape)}" for key, value in call.items())
            raise InputError(
                f"call {number} ({given}) fails in {where}{f', which is given {shape}' if shape else ''}: {str(error)[:200]}",
                "give the shapes that the module takes; calls may differ in batch and length, not in channels",
            ) from error
    if not finite:
        raise InputError(
            f"call {number}: the float module itself makes NaN or infinity", "check its weights and its inputs"
        )


def _check(family: ModuleFamily, module: nn.Module, quantized: nn.Module, call: Mapping[str, Tensor]) -> None:
    """Call both once: refuse a module that reads the weights of its layers itself, and quantizers that change nothing."""
    with torch.no_grad():
        expected = family.call(module, call)
        try:
            got = family.call(quantized, call)
        except AttributeError as error:
            raise InputError(
                f"{type(module).__name__} reads what a quantized layer does not have ({error})",
                "its forward has to call its linear layers: modules with fused kernels of their own cannot be quantized",
            ) from error
    if torch.equal(expected, got):
        raise QualityGateError(
            "the quantized module gives the float module's output bit for bit", "this is a bug: its quantizers are off"
        )


class ModuleFamily(Family):
    """What :mod:`qdiff.quantization` asks of a model, for a module of which only example calls are known.

    Args:
        example: the tensors of one call, by the argument of the forward.
        constants: its other arguments, the same in every call.
    """

    name = "module"
    title = "a torch module"
    backbone_attribute = "module"
    pipelines = ()
    chain = False

    def __init__(self, example: Mapping[str, Tensor], constants: Mapping[str, Any]) -> None:
        self.example, self.constants = dict(example), dict(constants)

    def blocks(self, backbone: nn.Module) -> list[str]:
        """Return the members of the outermost module lists, in the order of the module."""
        lists = [name for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
        outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
        layers = quantizable_layers(backbone)
        found = [f"{name}.{child}" for name in outermost for child, _ in backbone.get_submodule(name).named_children()]
        return [block for block in found if any(layer.startswith(f"{block}.") for layer in layers)]

    def inputs(self, config: Mapping[str, Any]) -> tuple[InputSpec, ...]:
        """Return the tensors of the example, with fixed axes."""
        return tuple(
            InputSpec(name, tuple(value.shape), value.dtype, varies=True) for name, value in self.example.items()
        )

    def output_axes(self, config: Mapping[str, Any]) -> tuple[Axis, ...]:
        """Return nothing: a module is not exported."""
        return ()

    def capture(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors of a call by name."""
        named = {**dict(zip(self.example, args, strict=False)), **kwargs}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the module's output; the first one of a tuple, or ``sample`` of an output object of diffusers."""
        output = backbone(**inputs, **self.constants)
        output = getattr(output, "sample", output)
        return output[0] if isinstance(output, tuple) else output

    def generate(self, model: Any, request: Any, on_step: Any = None) -> Any:
        """Raise an error: a module makes no pictures."""
        raise NotImplementedError(self.title)

    def random_pipeline(self, configuration: str, seed: int) -> Any:
        """Raise an error: there is no published configuration."""
        raise NotImplementedError(self.title)


def _arguments(module: nn.Module, calls: Sequence[Call]) -> tuple[list[dict[str, Tensor]], dict[str, Any]]:
    """Return the tensors of every call by the forward's argument, and the arguments that are no tensors."""
    if not calls:
        raise InputError("there is no call to calibrate on", "give what the module is called with, 16 calls or more")
    signature = inspect.signature(module.forward)
    given: list[dict[str, Tensor]] = []
    constants: dict[str, Any] = {}
    for number, call in enumerate(calls):
        args = (call,) if isinstance(call, Tensor) else tuple(call) if not isinstance(call, Mapping) else ()
        kwargs = dict(call) if isinstance(call, Mapping) else {}
        try:
            named = dict(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise InputError(f"call {number} does not fit {type(module).__name__}.forward: {error}") from None
        named |= named.pop(_keywords(signature), {})
        for name, value in named.items():
            if isinstance(value, list | tuple | dict):
                raise InputError(
                    f"call {number} gives {name!r} as a {type(value).__name__}", "give tensors and plain values"
                )
        tensors = {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in named.items() if not isinstance(value, Tensor)}
        if given and (tensors.keys() != given[0].keys() or plain != constants):
            raise InputError(f"call {number} has other arguments than the first", "give every call the same arguments")
        for name, value in tensors.items():
            if not value.numel() or value.isnan().any():  # infinity is usual in masks
                what = "NaN" if value.numel() else "no value"
                raise InputError(f"call {number}: {name!r} holds {what}", "leave the call out")
        constants = plain
        given.append(tensors)
    return given, constants


def _keywords(signature: inspect.Signature) -> str:
    """Return the name of the parameter that takes all other keywords; empty where there is none."""
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    return next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_KEYWORD), "")
