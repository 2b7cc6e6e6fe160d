"""Sparse attention in a data-centre TensorRT engine: the Triton kernels as ahead-of-time quick plugins.

An exported graph calls functions that a kernel may take over (:mod:`qdiff.attention.nodes`). Here each of them becomes a plugin
of TensorRT's Python interface (``tensorrt.plugin``): its outputs' shapes and types, the choices that TensorRT times, and the
kernel in PTX, with how it is launched. The kernel goes into the engine, which then needs neither Python nor this module.

- **One plugin is one launch**, so packing of queries, keys and values and the attention are four. Means and the values' scale,
  which are sums and maxima over tokens, are TensorRT's own reductions before them.
- **No attributes.** All constants are in the plugin's name. Attributes would come by position, would not be kept, and do not
  split TensorRT's timing cache.
- **Pointers of inputs, integers, pointers of outputs**: no launch checks that order. Here it is compared with the names of the
  kernel's parameters, and their number with the entry's in the PTX.
- **FP8 codes are called INT8.** PTX knows addresses only, so a kernel that reads FP8 through them needs nothing else, and no
  plugin was seen to take FP8 tensors. Nothing outside the plugins reads the codes.
- **Choices** are the shipped constants of the numerics that the name asks for. Where all of them need more than 48 KiB of shared
  memory, which a launcher has to ask the driver for, there is one more that does not: nobody says whether TensorRT asks.
- **Shapes are fixed** (:func:`require_static`): TensorRT 11 leaks a CUDA module whenever the shape of a plugin changes
  (NVIDIA/TensorRT#4849).

Why it is built so: docs/decisions/0015-attention-plugin.md; what is proven: docs/how-to/sparse-attention.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import GenericAlias, ModuleType
from typing import TYPE_CHECKING, Any

from qdiff.attention.nodes import DOMAIN, KEYS, PARTS, PRODUCT, QUERIES, VALUES, AttentionNode
from qdiff.attention.numerics import NUMERICS
from qdiff.engines.base import Profile
from qdiff.errors import InputError, IntegrityError, MissingDependencyError, UsageError, option
from qdiff.events import Progress

if TYPE_CHECKING:
    import tensorrt

    from qdiff.attention.kernels.aot import Compiled
    from qdiff.attention.kernels.sparse_attention import Launch

# The oldest PTX that the kernels assemble in, so that an older driver still takes them.
PTX_VERSIONS = {89: 85, 90: 85, 120: 87}
PLAIN_LAUNCH = 48 * 1024  # bytes of shared memory that every launch has
_TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Interface:
    """What TensorRT is told of one plugin.

    Args:
        inputs: the kernel's names of pointers that come first, and TensorRT's types.
        scalars: the kernel's names of integers that come next.
        outputs: the kernel's names of pointers that come last, types, and shapes after the batch.
        grid: programs along the first two axes; the third is the batch.
    """

    inputs: tuple[tuple[str, str], ...]
    scalars: tuple[str, ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    grid: tuple[int, int]

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return all of the kernel's parameters in order."""
        return (*(name for name, _ in self.inputs), *self.scalars, *(name for name, *_ in self.outputs))

    @property
    def types(self) -> str:
        """Return types of inputs and outputs as an autotune combination lists them."""
        return ", ".join([kind for _, kind in self.inputs] + [kind for _, kind, _ in self.outputs])


def interface(node: AttentionNode) -> Interface:
    """Return inputs, outputs and grid of a node."""
    from qdiff.attention.kernels.pack import PART, Widths
    from qdiff.attention.kernels.sparse_attention import PROGRAM

    tiling, heads, widths = node.tiling, node.heads, Widths.of(node.size, NUMERICS[node.numerics])
    rows, columns = tiling.text_rows + tiling.rows, tiling.text_columns + tiling.columns
    x, order, sizes = ("x", _TYPES[node.dtype]), ("order", "INT32"), ("tokens", "text")
    if node.kind in (QUERIES, KEYS):
        keys = node.kind == KEYS
        blocks, block = (columns, tiling.block_k) if keys else (rows, tiling.block_q)
        packed = ("codes", "INT8", (heads, blocks * block, widths.qk)), ("scales", "FP32", (heads, blocks))
        return Interface((x, ("mean", "FP32"), order) if keys else (x, order), sizes, packed, (blocks, heads))
    if node.kind == VALUES:
        codes = ("codes", "INT8", (heads, columns, widths.pv, tiling.block_k))
        programs = columns * tiling.block_k // min(PART, tiling.block_k)
        return Interface((x, ("mean", "FP32"), ("scales", "FP32"), order), sizes, (codes,), (programs, heads))
    given = [(name, "INT8") for name in ("q", "k", "v")]
    given += [(name, "FP32") for name in ("q_scale", "k_scale", "v_scale", "v_mean")]
    given += [(name, "INT32") for name in ("order", "ends", "entries")]
    out = ("out", _TYPES[node.dtype], (heads, tiling.tokens, node.size))
    return Interface(tuple(given), (*sizes, "pitch"), (out,), (rows * tiling.block_q // PROGRAM, heads))


def launches(node: AttentionNode, capability: int) -> tuple[Launch, ...]:
    """Return constants of the attention kernel that TensorRT may choose from: tactics 1 and up.

    Raises:
        InputError: the kernel has no such head size or blocks.
    """
    from qdiff.attention.kernels import aot
    from qdiff.attention.kernels.sparse_attention import TILE, Launch, is_partial

    tiling = node.tiling
    own = Launch(
        node.size,
        NUMERICS[node.numerics],
        tiling.block_q,
        tiling.block_k,
        is_partial(tiling),
        scale=1.0,  # the graph has it in the queries
        matrix=True,
    )
    shipped = [
        replace(own, tile=one.keys, stages=one.stages)
        for one in aot.SHIPPED
        if (one.size, one.numerics, one.block_q, one.block_k) == (own.size, own.numerics, own.block_q, own.block_k)
    ]
    limit = aot.SHARED_LIMITS[capability]
    made = dict.fromkeys(shipped or [replace(own, tile=own.keys)])
    found = [one for one in made if _attention(one, capability, node.dtype).shared <= limit]
    if all(_attention(one, capability, node.dtype).shared > PLAIN_LAUNCH for one in found):
        found.append(replace(own, tile=TILE // 2))
    return tuple(found)


@functools.cache
def _attention(launch: Launch, capability: int, dtype: str) -> Compiled:
    from qdiff.attention.kernels import aot

    return aot.stripped(aot.compile_kernel(launch, capability, dtype, PTX_VERSIONS[capability]))


@functools.cache
def _packing(node: AttentionNode, capability: int) -> Compiled:
    from qdiff.attention.kernels import aot

    numerics, tiling, size = NUMERICS[node.numerics], node.tiling, node.size
    end = capability, node.dtype, PTX_VERSIONS[capability]
    if node.kind == VALUES:
        return aot.stripped(aot.compile_columns(numerics, tiling, node.heads, size, *end))
    return aot.stripped(aot.compile_rows(numerics, tiling, node.heads, size, node.kind == KEYS, *end))


def compiled(node: AttentionNode, capability: int) -> tuple[Compiled, ...]:
    """Return the kernels that TensorRT may choose from for a node, hidden parameters taken off; of packing there is
    one.

    Args:
        node: the attention in the graph.
        capability: compute capability of the GPU, without its point.

    Raises:
        InputError: sizes or a GPU that the kernels do not have.
        IntegrityError: a kernel whose parameters are not those that the launch gives.
    """
    if capability not in PTX_VERSIONS:
        known = ", ".join(f"{number / 10:.1f}" for number in sorted(PTX_VERSIONS))
        raise InputError(
            f"there is no attention kernel for compute capability {capability / 10:.1f} (for {known})", _plain()
        )
    if node.kind == PRODUCT:
        try:
            made = tuple(_attention(one, capability, node.dtype) for one in launches(node, capability))
        except InputError as error:
            raise InputError(str(error.args[0]), _plain()) from error
    else:
        made = (_packing(node, capability),)
    wanted = interface(node).arguments
    for one in made:
        if one.arguments != wanted or one.parameters != len(wanted):
            raise IntegrityError(
                f"kernel {one.name} takes {one.arguments}, the launch gives {wanted}", "please report this"
            )
    return made


def taken_over(onnx: Path) -> tuple[str, ...]:
    """Return names of the functions in the file that a plugin computes."""
    import onnx as library

    model = library.load(onnx, load_external_data=False)
    names = (function.name for function in model.functions if function.domain == DOMAIN)
    return tuple(name for name in names if (node := AttentionNode.named(name)) and node.kind in PARTS)


def _plain() -> str:
    return f"{option('flags', {'attention': 'plain'})} builds it from plain operators"


def require_static(profiles: Sequence[Profile]) -> None:
    """Refuse profiles with ranges: every change of a shape would cost memory for good.

    Raises:
        UsageError: several profiles, or one with a range.
    """
    fix = f"give one profile with one size for each axis, such as {option('profiles', ['batch=2'])}; {_plain()} for any sizes"
    why = "an engine with the attention kernel is for one size (TensorRT 11 leaks memory whenever a plugin's shape changes)"
    if len(profiles) != 1:
        raise UsageError(f"{why}, and {len(profiles)} profiles were given", fix)
    for name, (low, _, high) in profiles[0].ranges.items():
        if low != high:
            raise UsageError(
                f"{why}, and profile {profiles[0].name!r} has {name} from {list(low)} to {list(high)}", fix
            )


# Plugins are registered once in a process; what GPU the next build is for stands here.
_REGISTERED: dict[str, int] = {}


def register(trt: ModuleType, names: Iterable[str], capability: int) -> None:
    """Compile the kernels of these functions and register a plugin for each. Before the graph is parsed: there errors
    of a kernel would be lines in TensorRT's log.

    Args:
        trt: the library.
        names: of functions in the domain ``qdiff``.
        capability: compute capability of the GPU, without its point.

    Raises:
        MissingDependencyError: no triton, or a TensorRT without such plugins.
        InputError, IntegrityError: as :func:`compiled`.
    """
    plugins = _interface_of(trt)
    nodes = {name: node for name in names if (node := AttentionNode.named(name)) is not None}
    with Progress("kernels", len(nodes)) as progress:
        for node in nodes.values():
            try:
                compiled(node, capability)
            except ModuleNotFoundError as error:
                if (error.name or "").split(".")[0] != "triton":
                    raise
                message = "the attention kernel in an engine needs triton"
                raise MissingDependencyError(message, f"pip install 'qdiff-deploy[tensorrt]', or {_plain()}") from None
            progress.advance()
    for name, node in nodes.items():
        if name not in _REGISTERED:
            _define(trt, plugins, name, node)
        _REGISTERED[name] = capability


def _interface_of(trt: ModuleType) -> ModuleType:
    """Return the module ``tensorrt.plugin``."""
    if hasattr(trt, "QuickPluginCreationRequest"):
        for package in (trt.__name__, f"{trt.__name__}_bindings"):
            try:
                return importlib.import_module(f"{package}.plugin")
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith(package):
                    raise
    raise MissingDependencyError(
        f"{trt.__name__} {trt.__version__} has no ahead-of-time plugins", f"install 11.1, or {_plain()}"
    )


def _define(trt: ModuleType, plugins: Any, name: str, node: AttentionNode) -> None:
    """Register one plugin. Signatures are made here, for TensorRT reads them: a tensor for each input and nothing
    else.
    """
    made, tensor = interface(node), plugins.TensorDesc
    members = {"FP32": "FLOAT", "FP16": "HALF"}
    results: Any = GenericAlias(tuple, (tensor,) * len(made.outputs))
    kernel = tuple[str, str, plugins.KernelLaunchParams, plugins.SymIntExprs]

    def describe(*inputs: tensorrt.plugin.TensorDesc) -> tuple[tensorrt.plugin.TensorDesc, ...]:
        batch = inputs[0].shape_expr[0]
        return tuple(
            plugins.from_shape_expr((batch, *shape), getattr(trt.DataType, members.get(kind, kind)))
            for _, kind, shape in made.outputs
        )

    def choices(*_: tensorrt.plugin.TensorDesc) -> list[tensorrt.plugin.AutoTuneCombination]:
        tactics = list(range(1, len(compiled(node, _REGISTERED[name])) + 1))
        return [plugins.AutoTuneCombination(made.types, "LINEAR", tactics)]

    def implementation(
        *given: Any,
    ) -> tuple[str, str, tensorrt.plugin.KernelLaunchParams, tensorrt.plugin.SymIntExprs]:
        *inputs, _, tactic = given
        chosen = compiled(node, _REGISTERED[name])[tactic - 1]
        sizes = {"tokens": node.tiling.tokens, "text": node.tiling.text, "pitch": inputs[-1].shape_expr[-1]}
        integers = plugins.SymIntExprs(len(made.scalars))
        for place, scalar in enumerate(made.scalars):
            integers[place] = plugins.SymInt32(sizes[scalar])
        launch = plugins.KernelLaunchParams()
        launch.grid_x, launch.grid_y = made.grid
        launch.grid_z = inputs[0].shape_expr[0]
        launch.block_x, launch.shared_mem = chosen.threads, chosen.shared
        return chosen.name, chosen.ptx, launch, integers

    own = [_parameter(one, tensor) for one, _ in made.inputs]
    outputs = _parameter("outputs", results)
    for function, parameters, returns in (
        (describe, own, results),
        (choices, [*own, outputs], list[plugins.AutoTuneCombination]),
        (implementation, [*own, outputs, _parameter("tactic", int)], kernel),
    ):
        vars(function)["__signature__"] = inspect.Signature(parameters, return_annotation=returns)
    identifier = f"{DOMAIN}::{name}"
    plugins.register(identifier)(describe)
    plugins.autotune(identifier)(choices)
    plugins.aot_impl(identifier)(implementation)


def _parameter(name: str, annotation: type | GenericAlias) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
