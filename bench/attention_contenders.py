"""Who takes part in :mod:`bench.attention`: a shape's operands and lists, and what computes attention of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from qdiff.attention import gathered
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.attention.numerics import NUMERICS
from qdiff.plan.attention_plan import BLOCKS, BOUNDS

if TYPE_CHECKING:
    from torch.nn.attention import SDPBackend

    from qdiff.engines.base import Runner

DENSITIES = (1.0, 0.5, 0.3, 0.2)
SAMPLED = 64
FLAGS = {"openvino": {"precision": "f32"}}  # all on the CPU compute in float32
REFERENCE_GPU, REFERENCE_CPU = "cuDNN SDPA BF16", "torch SDPA float32"


@dataclass
class Contender:
    """One row: what is timed, and what it was seen to do."""

    name: str
    density: float
    run: Callable[[], Tensor]
    bare: Callable[[], Tensor] | None = None  # the attention alone, of operands that are packed already
    recorded: bool = False  # whether what is timed is a CUDA graph
    seconds: list[float] = field(default_factory=list)
    bare_seconds: list[float] = field(default_factory=list)
    error: float | None = None


@dataclass(frozen=True)
class Case:
    """A shape's operands ``[1, heads, tokens, size]``, order, and lists by density."""

    q: Tensor
    k: Tensor
    v: Tensor
    tiling: Tiling
    order: Tensor
    lists: dict[float, BlockLists]

    @property
    def block(self) -> int:
        """Return tokens of a block, of queries and of keys."""
        return self.tiling.block_q

    def ordered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the operands in the heads' order, for those who do not reorder."""
        places = self.order.to(self.q.device)[None, :, :, None].expand_as(self.q)
        return self.q.gather(2, places), self.k.gather(2, places), self.v.gather(2, places)

    def restored(self, x: Tensor) -> Tensor:
        """Return the way back of :meth:`ordered`."""
        places = self.order.to(x.device)[None, :, :, None].expand_as(x)
        return torch.empty_like(x).scatter_(2, places, x)


def case_of(heads: int, tokens: int, size: int, block: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Return random operands and lists; the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens, size, generator=generator).to(device, dtype) for _ in range(3))
    tiling = Tiling(tokens, 0, block, block)
    rows = max(width for width in range(1, int(tokens**0.5) + 1) if tokens % width == 0)
    order = torch.arange(tokens).view(rows, -1).T.flatten().expand(heads, -1)
    lists = {}
    for density in DENSITIES:
        kept = max(1, round(density * tiling.columns))
        ranks = torch.rand(heads, tiling.rows, tiling.columns, generator=generator).argsort(dim=2).argsort(dim=2)
        lists[density] = BlockLists.of_masks(ranks < kept)
    return Case(q, k, v, tiling, order, lists)


def sampled_error(case: Case, density: float, output: Tensor) -> float:
    """Return the relative error of some rows against float64 over the same blocks."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randperm(case.tiling.tokens, generator=generator)[:SAMPLED]
    difference = total = 0.0
    masks = case.lists[density].masks(case.tiling.columns)
    for head in range(min(2, case.q.shape[1])):
        position = torch.argsort(case.order[head])
        read = masks[head][position[queries] // case.block][:, position // case.block].to(case.q.device)
        q, k, v = (x[0, head].double() for x in (case.q, case.k, case.v))
        scores = q[queries.to(q.device)] @ k.mT * case.q.shape[-1] ** -0.5
        exact = scores.masked_fill(~read, -torch.inf).softmax(dim=-1) @ v
        found = output[0, head, queries.to(q.device)].double()
        difference += float((found - exact).square().sum())
        total += float(exact.square().sum())
    return (difference / total) ** 0.5


def flex(case: Case, density: float) -> Callable[[], Tensor]:
    """Return a call of FlexAttention, compiled, over the same blocks of tokens that lie in order already."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    masks = case.lists[density].masks(case.tiling.columns).to(case.q.device)
    counts = masks.sum(dim=2, dtype=torch.int32)[None]
    indices = masks.int().argsort(dim=2, descending=True, stable=True).int()[None].contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(indices),
        counts,
        indices,
        BLOCK_SIZE=case.block,
        seq_lengths=(case.tiling.tokens, case.tiling.tokens),
    )
    q, k, v = case.ordered()
    call = _compiled(flex_attention)
    return lambda: call(q, k, v, block_mask=mask)


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


def dense(case: Case, backend: SDPBackend | None) -> Callable[[], Tensor]:
    """Return torch's dense attention by one of its backends; ``None``: as torch chooses."""
    from torch.nn.attention import sdpa_kernel

    def run() -> Tensor:
        if backend is None:
            return functional.scaled_dot_product_attention(case.q, case.k, case.v)
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(case.q, case.k, case.v)

    return run


def flash3(case: Case) -> Callable[[], Tensor]:
    """Return a call of FlashAttention-3, which wants heads behind tokens."""
    from flash_attn_interface import flash_attn_func

    q, k, v = (x.transpose(1, 2).contiguous() for x in (case.q, case.k, case.v))

    def run() -> Tensor:
        out = flash_attn_func(q, k, v)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return run


def by_kernel(case: Case, density: float, numerics: str) -> Contender:
    """Return qdiff on a GPU as a contender: the kernel that it takes there."""
    from qdiff.attention.kernels import gpu, pack
    from qdiff.attention.kernels.sparse_attention import Launch, is_partial

    row, device = NUMERICS[numerics], case.q.device
    rows = gpu.on_device(case.lists[density], case.tiling, device)
    order = case.order.to(device, torch.int32).contiguous()
    size, blocks = case.q.shape[-1], (case.block, case.block)
    constants = gpu.tuned(size, row, case.tiling, torch.cuda.get_device_capability(device))
    launch = Launch(size, row, *blocks, is_partial(case.tiling), **constants)
    packed = pack.pack(case.q, case.k, case.v, order, case.tiling, row)
    out = torch.empty_like(case.q)
    return Contender(
        f"qdiff {numerics}",
        density,
        lambda: gpu.attend_rows(case.q, case.k, case.v, order, rows, case.tiling, row),
        lambda: gpu.attend_packed(packed, order, rows, case.tiling, launch, out),
    )


def by_gathering(case: Case, density: float) -> Contender:
    """Return qdiff's executor for CPUs."""
    lists, row = case.lists[density], NUMERICS["float"]
    return Contender(
        "qdiff gathered float32",
        density,
        lambda: gathered.attend(case.q, case.k, case.v, case.order, lists, case.tiling, row),
    )


class _Sparse(torch.nn.Module):
    """The operator alone, for export."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.tiling = case.tiling
        self.register_buffer("order", case.order.int())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, bounds: Tensor) -> Tensor:
        cut, scale = (0, self.tiling.text, self.tiling.block_q, self.tiling.block_k), q.shape[-1] ** -0.5
        return torch.ops.qdiff.sparse_attention(q, k, v, self.order, blocks, bounds, *cut, "float", scale)


class _Dense(torch.nn.Module):
    """The attention that every target writes, for export."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


class Graphs:
    """The operator and dense attention as plain ONNX in CPU engines."""

    def __init__(self, case: Case, folder: Path) -> None:
        from qdiff.engines import BuildOptions, choose_engine
        from qdiff.export.onnx_graph import write_graph
        from qdiff.export.translations import TARGETS

        self.case = case
        batch, listed = torch.export.Dim("batch", min=1, max=8), torch.export.Dim("listed", min=2, max=2**20)
        two = [torch.cat([x, x]) for x in (case.q, case.k, case.v)]  # a batch of one would be taken for a constant
        lists = case.lists[1.0]
        axes: tuple[Any, ...] = ({0: batch}, {0: batch}, {0: batch})
        written = {
            "dense": (_Dense(), tuple(two), axes, ["q", "k", "v"]),
            "sparse": (
                _Sparse(case),
                (*two, lists.blocks, lists.bounds),
                (*axes, {1: listed}, None),
                ["q", "k", "v", BLOCKS, BOUNDS],
            ),
        }
        self.runners: dict[tuple[str, str], Runner] = {}
        for kind, (module, values, shapes, names) in written.items():
            path = folder / f"{kind}.onnx"
            write_graph(module.eval(), values, shapes, TARGETS["onnxruntime"], names).save(str(path))
            for engine in ("onnxruntime", "openvino"):
                built = folder / f"{kind}-{engine}"
                built.mkdir()
                options = BuildOptions(threads=torch.get_num_threads(), flags=FLAGS.get(engine, {}))
                choose_engine(engine).build(path, built, options)
                self.runners[kind, engine] = choose_engine(engine).load(built, options)

    def dense(self, engine: str) -> Callable[[], Tensor]:
        """Read everything."""
        operands = {"q": self.case.q, "k": self.case.k, "v": self.case.v}
        return lambda: self.runners["dense", engine](operands)

    def sparse(self, engine: str, density: float) -> Callable[[], Tensor]:
        """Follow the lists of that density."""
        lists = self.case.lists[density]
        operands = {
            "q": self.case.q,
            "k": self.case.k,
            "v": self.case.v,
            BLOCKS: lists.blocks,
            BOUNDS: lists.bounds,
        }
        return lambda: self.runners["sparse", engine](operands)


def contenders(case: Case, on_gpu: bool, folder: Path) -> tuple[list[Contender], list[str]]:
    """Return all rows that run here, each run once and its error taken, and why others are left out. The reference is
    the first row.
    """
    from torch.nn.attention import SDPBackend

    makers: list[tuple[str, float, Callable[[], Contender]]] = []

    def add(name: str, density: float, make: Callable[[], Callable[[], Tensor]]) -> None:
        makers.append((name, density, lambda: Contender(name, density, make())))

    if on_gpu:
        add(REFERENCE_GPU, 1.0, lambda: dense(case, SDPBackend.CUDNN_ATTENTION))
        add("flash SDPA BF16", 1.0, lambda: dense(case, SDPBackend.FLASH_ATTENTION))
        add("FlashAttention-3 BF16", 1.0, lambda: flash3(case))
    else:
        add(REFERENCE_CPU, 1.0, lambda: dense(case, None))
        graphs = Graphs(case, folder)
        for engine in ("onnxruntime", "openvino"):
            add(f"dense in {engine}", 1.0, lambda engine=engine: graphs.dense(engine))
    for density in DENSITIES:
        add("FlexAttention", density, lambda density=density: flex(case, density))
        if not on_gpu:
            for engine in ("onnxruntime", "openvino"):
                add(
                    f"qdiff in {engine}",
                    density,
                    lambda density=density, engine=engine: graphs.sparse(engine, density),
                )
            makers.append(("qdiff gathered float32", density, lambda density=density: by_gathering(case, density)))
        for numerics in ("int8_fp8", "fp8", "bf16") if on_gpu else ():
            make = lambda density=density, numerics=numerics: by_kernel(case, density, numerics)  # noqa: E731
            makers.append((f"qdiff {numerics}", density, make))
    found, absent = [], []
    for name, density, make_row in makers:
        try:
            row = make_row()
            output = row.run()
            row.error = sampled_error(case, density, case.restored(output) if name == "FlexAttention" else output)
            if row.bare is not None:
                row.bare()
        except Exception as error:  # a peer that is not there or refuses the shape costs its own row only
            said = (str(error).strip().splitlines() or [""])[0]
            absent.append(f"{name} at density {density:g}: {type(error).__name__}: {said}")
            continue
        found.append(row)
    return found, absent
