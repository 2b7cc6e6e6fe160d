"""The attention kernel and those that pack for it, compiled ahead of time, without a GPU, and what their machine code turned out
to be.

An engine that takes a kernel takes PTX (TensorRT's ahead-of-time plugins), so what would otherwise be decided at the first call
is decided here:

- **The target** is named: a machine without a GPU has none of its own.
- **Pointers are multiples of 16 bytes.** Triton learns that from the tensors of a call; without the hint, products go through
  registers that spill, and no copy is asynchronous.
- **The version of the PTX** can be capped: the driver that translates it may be older than this compiler.
- **Two parameters are hidden.** Triton appends pointers to scratch memory to every kernel, used or not. A launcher that does not
  know them passes too few; :func:`stripped` takes them off where nothing uses them, and has ptxas prove what is left.

Whether a change of the kernel cost it its tensor cores or its registers can be read off here and is tested; how fast it is,
only a GPU says.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qdiff.attention.kernels.pack import PART, WARPS, Widths, pack_columns_kernel, pack_rows_kernel
from qdiff.attention.kernels.sparse_attention import Launch, sparse_attention_kernel
from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import NUMERICS, Numerics
from qdiff.errors import InputError, IntegrityError, UsageError
from qdiff.formats.table import format_named

CAPABILITIES = (90, 89, 120)
SHARED_LIMITS = {90: 227 * 1024, 89: 99 * 1024, 120: 99 * 1024}  # bytes of a block, by compute capability
ALIGNMENT = ("tt.divisibility", 16)
HIDDEN = 2
PACKING = {"num_stages": 3, "enable_fp_fusion": False}  # as pack_kernel's launches
ELEMENTS = {
    "int8": "i8",
    "fp8": "fp8e4nv",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}
SHIPPED = tuple(
    Launch(size, NUMERICS[numerics], *tiling)
    for size in (64, 72, 128)
    for numerics in ("int8_fp8", "fp8", "bf16")
    for tiling in ((128, 128), (64, 64))
) + tuple(
    Launch(size, NUMERICS[numerics], 128, 128, tile=128) for size in (64, 72, 128) for numerics in ("int8_fp8", "fp8")
)


@dataclass(frozen=True)
class Compiled:
    """One kernel for one kind of GPU.

    Args:
        name: of the entry in the PTX.
        ptx: the text; ``ttgir``: the step before, in which accumulators can be seen.
        target: what ptxas calls the GPU.
        arguments: names of the parameters that a caller passes, in order.
        parameters: how many the entry has, hidden ones among them.
        threads: of a block, as the entry demands.
        shared: bytes of dynamic shared memory of a block.
        registers, spilled: of a thread, the latter in bytes.
        wgmma: asynchronous tensor-core instructions by shape and types (``m64n64k32.s32.s8.s8``).
        mma_sync: how many synchronous ones there are.
        copies: how many asynchronous copies to shared memory.
        global_scratch, profile_scratch: bytes of the hidden memory.
    """

    name: str
    ptx: str = field(repr=False)
    ttgir: str = field(repr=False)
    target: str
    arguments: tuple[str, ...]
    parameters: int
    threads: int
    shared: int
    registers: int
    spilled: int
    wgmma: dict[str, int]
    mma_sync: int
    copies: int
    global_scratch: int
    profile_scratch: int


def compile_kernel(
    launch: Launch,
    capability: int = 90,
    out: str = "bfloat16",
    ptx_version: int | None = None,
    aligned: bool = True,
) -> Compiled:
    """Return the attention kernel with these constants.

    Args:
        launch: the constants.
        capability: 90, 89 or 120: compute capability without its point.
        out: dtype of the output, by torch's name.
        ptx_version: newest version of PTX that may be written, 85 for 8.5; ``None``: what the compiler likes.
        aligned: whether callers promise pointers to multiples of 16 bytes. Without, the kernel is slow: for comparison.

    Raises:
        InputError: a GPU or an output that is not known.
        UsageError: triton is in interpreter mode, in which nothing is compiled.
    """
    scores, output = (ELEMENTS[name or ""] for name in (launch.numerics.scores, launch.numerics.output))
    pointers = {"q": scores, "k": scores, "v": output, "out": _float(out)}
    pointers |= dict.fromkeys(("q_scale", "k_scale", "v_scale", "v_mean"), "fp32")
    pointers |= dict.fromkeys(("order", "ends", "entries"), "i32")
    return _compile(
        sparse_attention_kernel, pointers, launch.constants, launch.options, capability, ptx_version, aligned
    )


def compile_hopper(launch: Launch, capability: int = 90, out: str = "bfloat16") -> Compiled:
    """Return the kernel of :mod:`qdiff.attention.kernels.hopper` with these constants. Arguments as of
    :func:`compile_kernel`.

    Raises:
        InputError: another GPU than a Hopper.
    """
    from qdiff.attention.kernels import hopper

    if capability != 90:
        raise InputError(f"there is no Hopper kernel for compute capability {capability}", "it is for 90 alone")
    scores, output = launch.numerics.scores or "", launch.numerics.output or ""
    types = {"out": _float(out)} | dict.fromkeys(("q_scale", "k_scale", "v_scale", "v_mean"), "fp32")
    types |= dict.fromkeys(("order", "ends", "entries"), "i32")
    for name, box in hopper.boxes_of(launch).items():
        element = output if name == "v" else scores
        layout = hopper.layout_of(box[1], 16 if element == "bfloat16" else 8)
        types[name] = f"tensordesc<{ELEMENTS[element]}[{box[0]}, {box[1]}],{layout!r}>"
    constants, options = hopper.constants_of(launch), hopper.options_of(launch)
    return _compile(hopper.sparse_attention_hopper, types, constants, options, capability, None)


def compile_rows(
    numerics: Numerics,
    tiling: Tiling,
    heads: int,
    size: int,
    keys: bool,
    capability: int,
    x: str,
    ptx_version: int | None,
) -> Compiled:
    """Return the kernel that packs queries or keys, from contiguous memory.

    Args:
        numerics: one with codes.
        tiling: how the sequence is cut into blocks.
        heads: number of heads.
        size: channels of a head.
        keys: whether of keys, which lose their mean; queries have none.
        capability: as of :func:`compile_kernel`, whose errors are raised too.
        x: dtype of the input, by torch's name.
        ptx_version: as of :func:`compile_kernel`.
    """
    element = ELEMENTS[numerics.scores or ""]
    pointers = {"x": _float(x), "mean": "fp32", "order": "i32", "codes": element, "scales": "fp32"}
    constants = rows_constants(numerics, tiling, heads, size, keys)
    return _compile(pack_rows_kernel, pointers, constants, PACKING | {"num_warps": WARPS}, capability, ptx_version)


def rows_constants(numerics: Numerics, tiling: Tiling, heads: int, size: int, keys: bool) -> dict[str, object]:
    """Return compile-time arguments of :func:`compile_rows`."""
    widths = Widths.of(size, numerics)
    return {
        "WIDTH": widths.qk,
        "BLOCK": tiling.block_k if keys else tiling.block_q,
        "LARGEST": float(format_named(numerics.scores or "").element.largest),
        "CENTRED": keys,
        **_strides(tiling, heads, size),
        **widths.channels(size),
        **({} if keys else {"mean": None}),
    }


def compile_columns(
    numerics: Numerics, tiling: Tiling, heads: int, size: int, capability: int, x: str, ptx_version: int | None
) -> Compiled:
    """Return the kernel that packs values, from contiguous memory. Arguments as of :func:`compile_rows`."""
    pointers = {"x": _float(x), "order": "i32", "codes": ELEMENTS[numerics.output or ""]}
    pointers |= dict.fromkeys(("mean", "scales"), "fp32")
    constants = columns_constants(numerics, tiling, heads, size)
    return _compile(pack_columns_kernel, pointers, constants, PACKING | {"num_warps": 4}, capability, ptx_version)


def columns_constants(numerics: Numerics, tiling: Tiling, heads: int, size: int) -> dict[str, object]:
    """Return compile-time arguments of :func:`compile_columns`."""
    widths = Widths.of(size, numerics)
    return {
        "WIDTH": widths.pv,
        "BLOCK": tiling.block_k,
        "PART": min(PART, tiling.block_k),
        "CODED": True,
        **_strides(tiling, heads, size),
        **widths.channels(size),
    }


def _strides(tiling: Tiling, heads: int, size: int) -> dict[str, object]:
    """Return the strides of a contiguous ``[batch, heads, tokens, size]`` as constants: what they are multiples of
    decides how wide loads are.
    """
    plane = tiling.tokens * size
    return {"stride_batch": heads * plane, "stride_head": plane, "stride_token": size}


def _float(name: str) -> str:
    if name not in ("bfloat16", "float16", "float32"):
        raise InputError(f"no kernel reads or writes {name}", "bfloat16, float16 and float32 they do")
    return ELEMENTS[name]


def _compile(
    kernel: object,
    pointers: Mapping[str, str],
    constants: Mapping[str, object],
    options: Mapping[str, object],
    capability: int,
    ptx_version: int | None,
    aligned: bool = True,
) -> Compiled:
    """Return a kernel whose parameters are pointers or descriptors, constants, and otherwise int32."""
    if capability not in CAPABILITIES:
        raise InputError(
            f"no kernel for compute capability {capability}", f"known: {', '.join(map(str, CAPABILITIES))}"
        )
    if not isinstance(kernel, JITFunction):
        raise UsageError("triton runs in its interpreter here", "unset TRITON_INTERPRET to compile")
    names: list[str] = kernel.arg_names
    types = {name: f"*{pointers[name]}" if name in pointers else "i32" for name in names}
    types |= {name: kind for name, kind in pointers.items() if kind.startswith("tensordesc")}
    types |= dict.fromkeys(constants, "constexpr")
    source = _source_of(kernel)(
        kernel,
        types,
        {(names.index(name),): value for name, value in constants.items()},
        {(place,): [list(ALIGNMENT)] for place, name in enumerate(names) if aligned and types[name].startswith("*")},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={**options, "ptx_version": ptx_version}
    )
    ptx, metadata = made.asm["ptx"], made.metadata
    registers, spilled = assemble(ptx)
    return Compiled(
        name=metadata.name,
        ptx=ptx,
        ttgir=made.asm["ttgir"],
        target=_target(ptx),
        arguments=tuple(name for name in names if name not in constants),
        parameters=len(_parameters(ptx)[1]),
        threads=int(_found(r"\.reqntid (\d+)", ptx)),
        shared=metadata.shared,
        registers=registers,
        spilled=spilled,
        wgmma=dict(collections.Counter(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\S+)", ptx))),
        mma_sync=len(re.findall(r"\bmma\.sync", ptx)),
        copies=len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
        global_scratch=metadata.global_scratch_size,
        profile_scratch=metadata.profile_scratch_size,
    )


def _source_of(kernel: JITFunction) -> type[ASTSource]:
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def assemble(ptx: str) -> tuple[int, int]:
    """Translate PTX with the ptxas that triton brings, and throw the result away.

    Returns:
        registers of a thread, and bytes that it spills.

    Raises:
        IntegrityError: it is not valid.
    """
    target = _target(ptx)
    old = int(_found(r"sm_(\d+)", target)) < 90
    tool = triton.knobs.nvidia.ptxas if old else triton.knobs.nvidia.ptxas_blackwell
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx, encoding="utf-8")
        command = [tool.path, "-v", f"--gpu-name={target}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise IntegrityError(f"ptxas refuses the kernel: {done.stderr.strip()[:500]}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    return int(_found(r"Used (\d+) registers", done.stderr)), max(map(int, spills), default=0)


def stripped(compiled: Compiled) -> Compiled:
    """Return the kernel without triton's hidden parameters, assembled anew.

    Raises:
        InputError: it needs scratch memory.
        IntegrityError: it uses the parameters after all, or is not valid without them.
    """
    if compiled.global_scratch or compiled.profile_scratch:
        raise InputError(
            f"the kernel {compiled.name} needs {compiled.global_scratch} and {compiled.profile_scratch} bytes of scratch memory",
            "only a launcher that gives it such memory can run it",
        )
    span, parameters = _parameters(compiled.ptx)
    if len(parameters) != len(compiled.arguments) + HIDDEN:
        raise IntegrityError(f"{compiled.name} has {len(parameters)} parameters, not {HIDDEN} hidden ones at the end")
    head, rest = compiled.ptx[: span[0]], compiled.ptx[span[1] :]
    for parameter in parameters[-HIDDEN:]:
        if re.search(rf"\b{parameter.split()[-1]}\b", rest):
            raise IntegrityError(f"{compiled.name} reads the hidden parameter {parameter}")
    kept = parameters[:-HIDDEN]
    ptx = head + "\n\t" + ",\n\t".join(kept) + "\n" + rest
    registers, spilled = assemble(ptx)
    return replace(compiled, ptx=ptx, parameters=len(kept), registers=registers, spilled=spilled)


def _parameters(ptx: str) -> tuple[tuple[int, int], list[str]]:
    """Return where between the brackets of the entry its parameters stand, and each of them."""
    entry = re.search(r"\.entry \w+\(([^)]*)\)", ptx)
    if entry is None:
        raise IntegrityError("this PTX has no entry")
    return entry.span(1), [parameter.strip() for parameter in entry[1].split(",")]


def _target(ptx: str) -> str:
    return _found(r"^\.target (\w+)", ptx)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.M)
    if match is None:
        raise IntegrityError(f"the compiler's output has no {pattern!r}")
    return match[1]
