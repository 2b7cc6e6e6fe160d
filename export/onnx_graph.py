"""From a quantized torch backbone to an ONNX file for one target.

``torch.export`` traces the module (whose layers are written in ``qdiff::*`` ops) with dynamic batch, prompt length, height
and width; torch's ONNX exporter writes it with our translations. The weights are never copied to float: the graph's
initializers are the packed buffers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from qdiff.attention.numerics import numerics_named, require_exported
from qdiff.attention.schedule import ScheduleState
from qdiff.attention.sparse import schedule_state_of
from qdiff.errors import InputError
from qdiff.export.branches import is_choice, sink_branches
from qdiff.export.codes import bytes_as_codes, store_codes
from qdiff.export.function_text import DOMAIN, OPSET
from qdiff.export.functions import function
from qdiff.export.list_inputs import LISTED, fixed_sizes, list_inputs
from qdiff.export.routes import CELLS, Output, RoutesAsInputs, names_of
from qdiff.export.translations import Target, table_for
from qdiff.files import disk_errors
from qdiff.models.base import Family
from qdiff.models.config import config_of, integer
from qdiff.nn.quant_linear import KeptConv2d, KeptLinear, QuantLinear
from qdiff.plan.attention_plan import BLOCKS, BOUNDS
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import TIMESTEPS
from qdiff.recording.inputs import InputSpec, latent_of
from qdiff.routing.blocks import branch_state_of

if TYPE_CHECKING:
    import onnx_ir

T = TypeVar("T")
Axes = dict[int, torch.export.Dim]
# A first token that is computed apart leaves at least two others: with one the tracer would take the axis for a constant.
SHORTEST_PROMPT, LONGEST_PROMPT, LARGEST_CELLS = 3, 4096, 1024
MOST_CELLS = 2**24  # tokens of a block
LONGEST_LISTS = 2**28  # entries in a row of all lists


def check_target(plan: Plan, target: Target) -> None:
    """Refuse a plan with a layer that the target cannot run, or an attention that no graph can say.

    Raises:
        InputError: naming the layer and its formats.
    """
    if plan.attention is not None:
        require_exported(numerics_named(plan.attention.numerics))
    for layer in plan.quantized:
        if not target.takes(layer.weights, layer.activations, layer.per_token):
            scales = " with scales per token" if layer.per_token else ""
            constant = layer.per_token and target.takes(layer.weights, layer.activations)
            other = "a constant scale or another format" if constant else "another format"
            raise InputError(
                f"layer {layer.name} is {layer.weights} x {layer.activations}{scales}, which {target.title} cannot run",
                f"choose another target, or {other} for this layer; the engine `eager` runs every format in torch",
            )


def export_onnx(
    family: Family, backbone: nn.Module, example: Mapping[str, Tensor], target: Target, folder: Path
) -> Path:
    """Write ``model.onnx`` and ``model.onnx.data`` into ``folder`` (replaced whole) and return the path of the first.

    The backbone's weights are converted in place when the target computes in 16 bit.

    Args:
        family: of the backbone.
        backbone: the module that is traced.
        example: one recorded call of the backbone; its shapes are an example, the graph takes others too.
        target: whose runtime reads the graph.
        folder: where the files go.

    Raises:
        InputError: an op of the module has no translation for this target.
    """
    config = config_of(backbone)
    specs = family.inputs(config)
    latent = example[latent_of(specs).name].shape
    family.fix_size(backbone, latent)
    named = family.for_export(backbone)
    # A batch of one would be taken for a constant; two of everything keeps the axis dynamic.
    values = tuple(_at_least_two(example[spec.name], spec.batch_axis) for spec in specs)
    schedule_state = schedule_state_of(backbone)
    one_size = schedule_state is not None or family.one_size
    if one_size:
        specs = fixed_sizes(specs, example)
    if schedule_state is not None:
        lists = schedule_state.schedule.widest()
        specs = (*specs, *list_inputs(lists))
        named, values = ListsAsInputs(named, schedule_state), (*values, lists.blocks, lists.bounds)
    outputs = [Output("prediction", family.output_axes(config))]
    branch_state = branch_state_of(backbone)
    if branch_state is not None:
        routes = RoutesAsInputs(
            named, branch_state, integer(config, "num_attention_heads") * integer(config, "attention_head_dim")
        )
        cells = math.prod(family.grid(config, latent))
        added, more = routes.interface(example, cells, fixed=one_size)
        named, specs, outputs = routes, (*specs, *(spec for spec, _ in added)), [*outputs, *more]
        values = (*values, *(value for _, value in added))
    module = InComputeDtype(named, getattr(torch, target.compute)).eval()
    bytes_as_codes(module)
    names = [spec.name for spec in specs]
    divisor = family.cells_divisor(config)
    largest = min(LARGEST_CELLS // divisor, family.longest_axis(config) or LARGEST_CELLS)
    axes = (_dynamic_axes(specs, divisor, family.largest_batch, largest),)
    onnx_program = write_graph(module, values, axes, target, names, [output.name for output in outputs])
    _name_axes(onnx_program.model, specs, outputs)
    sink_branches(onnx_program.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with disk_errors(str(folder)):
            onnx_program.save(str(temporary / "model.onnx"), external_data=True)
        if folder.exists():
            shutil.rmtree(folder)
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder / "model.onnx"


def write_graph(
    module: nn.Module,
    values: tuple[Tensor, ...],
    dynamic_shapes: tuple[tuple[Axes, ...]] | tuple[Axes | None, ...] | None,
    target: Target,
    inputs: list[str],
    outputs: Sequence[str] = ("prediction",),
) -> torch.onnx.ONNXProgram:
    """Trace a module, translate it, and return the ``onnx_ir`` program, with packed weights and with the functions that
    it calls.

    Args:
        module: what is traced.
        values: the module's positional arguments, an example of each.
        dynamic_shapes: symbols of the dynamic axes, as ``torch.export.export`` takes them; ``None``: there are none.
        target: whose runtime reads the graph.
        inputs: names in the graph of what the module is given.
        outputs: names in the graph of what the module returns.

    Raises:
        InputError: an op of the module has no translation for this target.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, values, dynamic_shapes=dynamic_shapes, strict=False)
        _drop_idle_squeezes(program.graph_module)
        try:
            written = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=table_for(target),
                opset_version=target.opset,
                input_names=inputs,
                output_names=list(outputs),
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise InputError(
                f"cannot write the graph for {target.name}: {type(cause).__name__}: {str(cause).strip()[:300]}"
            ) from error
    assert written is not None
    _forget_origin(written.model)
    store_codes(written.model.graph, module, target)
    _add_functions(written.model)
    return written


def _add_functions(model: onnx_ir.Model) -> None:
    """Put the functions of our domain that the graph calls into the file, and those that they call."""
    import onnx_ir

    wanted = {node.op_type for node in model.graph if node.domain == DOMAIN and not is_choice(node)}
    while wanted:
        for name in sorted(wanted):
            added = onnx_ir.serde.deserialize_function(function(name))
            model.functions[added.identifier()] = added
            model.opset_imports[DOMAIN] = 1
        called = {node.op_type for own in model.functions.values() for node in own if node.domain == DOMAIN}
        wanted = called - {name for _, name, _ in model.functions}
    assert model.opset_imports[""] == OPSET


class ListsAsInputs(nn.Module):
    """A backbone with sparse attention that is given its lists, after its own inputs, instead of looking them up."""

    def __init__(self, module: nn.Module, schedule_state: ScheduleState) -> None:
        super().__init__()
        self.module, self.schedule_state = module, schedule_state
        self.names = (*names_of(module), BLOCKS, BOUNDS)
        self.exact: frozenset[str] = getattr(module, "exact", frozenset())

    def forward(self, *values: Tensor) -> Tensor:
        """Return the backbone's inputs in order, ``blocks`` and ``bounds``."""
        self.schedule_state.pinned = values[-2], values[-1]
        try:
            return self.module(*values[:-2])
        finally:
            self.schedule_state.pinned = None


class InComputeDtype(nn.Module):
    """A backbone that computes in ``dtype`` between float32 inputs and a float32 output. Scales survive the change: they lie
    on the float16 grid, or are left as they are (:meth:`qdiff.nn.quant_linear.QuantLinear.exact`). Timesteps stay float32,
    inside (the calibrated values) and outside (:attr:`qdiff.recording.inputs.InputSpec.exact`), until they meet the first layer
    or normalization: what a layer returns, and what a module with 16-bit parameters is given, is in ``dtype``. So an exact
    input that joins the modulation makes no attention of two dtypes.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype
        if dtype is not torch.float32:
            for submodule in module.modules():
                exact = submodule.exact() if isinstance(submodule, QuantLinear) else {TIMESTEPS}
                for name, parameter in submodule._parameters.items():
                    if parameter is not None and parameter.is_floating_point() and name not in exact:
                        submodule._parameters[name] = nn.Parameter(parameter.detach().to(dtype), False)
                for name, buffer in submodule._buffers.items():
                    if buffer is not None and buffer.is_floating_point() and name not in exact:
                        submodule._buffers[name] = buffer.detach().to(dtype)
                if isinstance(
                    submodule, KeptLinear | KeptConv2d
                ):  # in the dtype of its input, whatever its weight's is
                    submodule.register_forward_hook(lambda module, args, output: _cast(output, dtype))
                elif isinstance(submodule, QuantLinear) or any(
                    parameter.dtype == dtype for parameter in submodule.parameters(recurse=False)
                ):
                    submodule.register_forward_pre_hook(lambda module, args: tuple(_cast(arg, dtype) for arg in args))
        self.names = names_of(module)
        self.exact: frozenset[str] = getattr(module, "exact", frozenset())

    def forward(self, *values: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the backbone's inputs in order."""
        cast = [
            value.to(self.dtype) if value.is_floating_point() and name not in self.exact else value
            for name, value in zip(self.names, values, strict=True)
        ]
        found = self.module(*cast)
        return tuple(each.float() for each in found) if isinstance(found, tuple) else found.float()


def _cast(value: T, dtype: torch.dtype) -> T | Tensor:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _at_least_two(tensor: Tensor, axis: int | None) -> Tensor:
    return tensor if axis is None or tensor.shape[axis] > 1 else torch.cat([tensor, tensor], dim=axis)


def _dynamic_axes(specs: Sequence[InputSpec], divisor: int, batch: int, largest: int) -> tuple[Axes, ...]:
    """Return symbols of the named axes; ``largest`` is the greatest number of patches along one."""
    height = torch.export.Dim("height_of_patches", min=2, max=largest)
    width = torch.export.Dim("width_of_patches", min=2, max=largest)
    dims = {
        "batch": torch.export.Dim("batch", min=1, max=batch),
        "tokens": torch.export.Dim("tokens", min=SHORTEST_PROMPT, max=LONGEST_PROMPT),
        "frames": torch.export.Dim("frames", min=2, max=largest),
        CELLS: torch.export.Dim(CELLS, min=2, max=MOST_CELLS),
        LISTED: torch.export.Dim(LISTED, min=2, max=LONGEST_LISTS),
        "height": divisor * height,
        "width": divisor * width,
    }
    return tuple({i: dims[axis] for i, axis in enumerate(spec.axes) if isinstance(axis, str)} for spec in specs)


def _drop_idle_squeezes(graph_module: torch.fx.GraphModule) -> None:
    """Remove ``squeeze(dim)`` of an axis that is not 1. torch ignores such a squeeze, ONNX calls it invalid."""
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target == torch.ops.aten.squeeze.dim:
            source = node.args[0]
            if len(node.meta["val"].shape) == len(source.meta["val"].shape):
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
    graph_module.recompile()


def _forget_origin(model: onnx_ir.Model) -> None:
    """Drop the exporter's notes (stack traces with paths of this machine): as many bytes as a small model's weights."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()


def _name_axes(model: onnx_ir.Model, specs: Sequence[InputSpec], outputs: Sequence[Output]) -> None:
    """Give dynamic axes the names of :class:`qdiff.recording.inputs.InputSpec` instead of the tracer's symbols, inside
    the graph too.
    """
    import onnx_ir

    names = {
        size.value: axis
        for value, spec in zip(model.graph.inputs, specs, strict=True)
        for size, axis in zip(value.shape or (), spec.axes, strict=True)
        if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None and isinstance(axis, str)
    }
    for node in model.graph:
        for output in node.outputs:
            if output.shape is not None:
                output.shape = onnx_ir.Shape([_named(size, names) for size in output.shape])
    for value, axes in [
        *zip(model.graph.inputs, (spec.axes for spec in specs), strict=True),
        *zip(model.graph.outputs, (output.axes for output in outputs), strict=True),
    ]:
        value.shape = onnx_ir.Shape(list(axes))


def _named(size: int | onnx_ir.SymbolicDim, names: Mapping[str, str]) -> int | str | onnx_ir.SymbolicDim:
    """Return a size with the tracer's symbols replaced; formulas such as ``6*s48`` have several."""
    text = getattr(size, "value", None)
    return re.sub(r"\b[a-z]\w*\b", lambda found: names.get(found[0], found[0]), text) if text else size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter for the length of a block: it prints to stdout, which belongs to results, and warns about
    packages that are not needed.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
