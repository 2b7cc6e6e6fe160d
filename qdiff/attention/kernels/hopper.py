"""Block-sparse attention for Hopper alone: bulk copies by a warp that does nothing else, and groups of warps that compute.

The same function of the same operands as :mod:`qdiff.attention.kernels.sparse_attention`, which see for what is computed;
here is when. In that kernel all warps of a program copy, multiply and take exponentials in step. Here (FlashAttention-3's
division of labour, arXiv 2407.08608, section 3.1):

- **One warp copies.** It walks the list of key blocks and has the tensor memory accelerator write tiles of keys and values into a
  ring of buffers; a barrier in shared memory counts the bytes of each as they arrive, another the readers that are done.
- **Warpgroups compute**, 64 queries each: one, with two programs on a multiprocessor, or two of one program. None waits for the
  other, so that one multiplies while the other takes its exponentials. Registers that the copying warp does not need are theirs.

Asking for the next tile's scores before this tile's exponentials (section 3.2 there) was measured too, and was slower: the
registers that it takes cost more than the wait that it saves.

It is written in Gluon, Triton's language in which layouts and barriers are explicit. Descriptors of the operands are made by the
host for every call, which is why TensorRT's plugins (no parameters of 128 bytes) keep the other kernel. There is no interpreter
for it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qdiff.attention.kernels.pack import Operands
from qdiff.attention.kernels.sparse_attention import OFFSET as EXPONENT
from qdiff.attention.kernels.sparse_attention import Launch
from qdiff.attention.lists import Tiling

OFFSET = gl.constexpr(EXPONENT.value)
GROUP = 64  # queries of a warpgroup
_load = (
    getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
)  # the same, by its name in newer and older versions of triton
COMPUTING, COPYING = 240, 24  # registers of a thread
# Before they are shared out, by warpgroups: two programs of 256 threads, or one of 384, have all of a multiprocessor's.
REGISTERS = {1: 128, 2: 168}


@gluon.jit
def _block(entries, number, last):
    return gl.load(entries + number, mask=number < last, other=0)


@gluon.jit
def _copy(
    q,
    k,
    v,
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    entries,
    first,
    last,
    q_place,
    k_place,
    v_channel,
    GROUPS: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Run the copying warp: copy the queries once, then a tile of keys and one of values for every step."""
    PARTS: gl.constexpr = BLOCK_K // TILE
    GROUP: gl.constexpr = q_tiles.shape[1]
    if last > first:  # else nobody would wait for it
        mbarrier.expect(q_full, GROUPS * q.block_type.nbytes)
        for number in gl.static_range(GROUPS):
            _load(q, [q_place + number * GROUP, 0], q_full, q_tiles.index(number))
    block = _block(entries, first, last)
    for step in range((last - first) * PARTS):
        upcoming = _block(entries, first + (step + 1) // PARTS, last)
        part = (step % PARTS) * TILE
        stage = step % STAGES
        free = ((step // STAGES) & 1) ^ 1
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        _load(k, [k_place + block * BLOCK_K + part, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        _load(v, [v_channel + block * SIZE, part], v_full.index(stage), v_tiles.index(stage))
        block = upcoming


@gluon.jit
def _compute(
    q_tiles,
    k_tiles,
    v_tiles,
    q_full,
    k_full,
    k_empty,
    v_full,
    v_empty,
    q_scale,
    k_scale,
    v_scale,
    v_mean,
    order,
    entries,
    first,
    last,
    tokens,
    text,
    head,
    plane,
    out,
    GROUP_NUMBER: gl.constexpr,
    SCALE: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    CODED: gl.constexpr,
    PARTIAL: gl.constexpr,
):
    """Compute with one warpgroup what :func:`qdiff.attention.kernels.sparse_attention.sparse_attention_kernel`
    computes, for its 64 queries.
    """
    PARTS: gl.constexpr = BLOCK_K // TILE
    GROUP: gl.constexpr = q_tiles.shape[1]
    BITS: gl.constexpr = q_tiles.dtype.primitive_bitwidth
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 256 // BITS])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 256 // BITS])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 32 // BITS)
    SUM: gl.constexpr = gl.int32 if q_tiles.dtype == gl.int8 else gl.float32
    text_columns = gl.cdiv(text, BLOCK_K)
    columns = text_columns + gl.cdiv(tokens - text, BLOCK_K)
    key = gl.arange(0, TILE, gl.SliceLayout(0, SCORES))
    no_scores = gl.zeros([GROUP, TILE], SUM, SCORES)
    no_output = gl.zeros([GROUP, SIZE], gl.float32, OUTPUT)
    largest = gl.full([GROUP], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([GROUP], gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.zeros([GROUP, SIZE], gl.float32, OUTPUT)
    steps = (last - first) * PARTS
    queries = q_tiles.index(GROUP_NUMBER)
    if CODED:
        factor_q = gl.load(q_scale) * SCALE
    if steps > 0:
        mbarrier.wait(q_full, 0)
        block = _block(entries, first, last)
        for step in range(steps):
            stage = step % STAGES
            phase = (step // STAGES) & 1
            upcoming = _block(entries, first + (step + 1) // PARTS, last)
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_tiles.index(stage).permute((1, 0))
            scores = warpgroup_mma(queries, keys, no_scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, [scores]).to(gl.float32)
            mbarrier.arrive(k_empty.index(stage), count=1)
            if PARTIAL:
                if (block == text_columns - 1) | (block == columns - 1):
                    end = gl.where(block < text_columns, text, text_columns * BLOCK_K + tokens - text)
                    there = key < end - block * BLOCK_K - (step % PARTS) * TILE
                    scores = gl.where(there[None, :], scores, float("-inf"))
            if CODED:
                factor = factor_q * gl.load(k_scale + block)
            else:
                factor = SCALE
            grown = gl.maximum(largest, gl.max(scores, 1) * factor)
            probabilities = gl.exp2(scores * factor - (grown - OFFSET)[:, None])
            fade = gl.exp2(largest - grown)
            total = total * fade + gl.sum(probabilities, 1)
            largest = grown
            if CODED:
                split = probabilities.reshape([GROUP, TILE // 16, 2, 4, 2])
                probabilities = split.permute((0, 1, 3, 2, 4)).reshape([GROUP, TILE])
            codes = gl.convert_layout(probabilities.to(v_tiles.dtype), OPERAND)
            mbarrier.wait(v_full.index(stage), phase)
            values = v_tiles.index(stage).permute((1, 0))
            part = warpgroup_mma(codes, values, no_output, use_acc=False, is_async=True)
            part = warpgroup_mma_wait(0, [part])
            mbarrier.arrive(v_empty.index(stage), count=1)
            acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUTPUT))[:, None] + part
            block = upcoming
    listed = steps > 0
    share = gl.convert_layout(1.0 / gl.where(listed, total, 1.0), gl.SliceLayout(1, OUTPUT))
    result = acc * share[:, None]
    channel = gl.arange(0, SIZE, gl.SliceLayout(0, OUTPUT))
    if CODED:
        scale = gl.load(v_scale + plane * SIZE + channel)
        mean = gl.load(v_mean + plane * SIZE + channel)
        result = result * scale[None, :] + gl.where(listed, mean, 0.0)[None, :]
    place = (
        gl.program_id(0) * (q_tiles.shape[0] * GROUP)
        + GROUP_NUMBER * GROUP
        + gl.arange(0, GROUP, gl.SliceLayout(1, OUTPUT))
    )
    rank = place - gl.cdiv(text, BLOCK_Q) * BLOCK_Q
    ordered = (rank >= 0) & (rank < tokens - text)
    token = gl.load(order + head.to(gl.int64) * (tokens - text) + rank, mask=ordered, other=0) + text
    token = gl.where(ordered, token, gl.where(place < text, place, -1))
    to = out + (plane * tokens + token)[:, None] * SIZE + channel[None, :]
    gl.store(to, result.to(out.dtype.element_ty), mask=(token >= 0)[:, None])


@gluon.jit(do_not_specialize=["tokens", "text"])
def sparse_attention_hopper(
    q,
    k,
    v,
    q_scale,
    k_scale,
    v_scale,
    v_mean,
    order,
    ends,
    entries,
    tokens,
    text,
    out,
    SCALE: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    CODED: gl.constexpr,
    PARTIAL: gl.constexpr,
    GROUPS: gl.constexpr,
    COMPUTING: gl.constexpr,
    COPYING: gl.constexpr,
):
    """Compute the attention of ``GROUPS`` times 64 queries of a block. The grid is ``(blocks of queries times BLOCK_Q /
    (64 GROUPS), heads, batch)``.

    ``q``, ``k`` and ``v`` are descriptors: ``[all places, SIZE]`` in boxes of a warpgroup's queries and of ``TILE`` keys, and
    ``[all blocks' channels, BLOCK_K]`` in boxes of ``[SIZE, TILE]``. The rest is as in
    :func:`qdiff.attention.kernels.sparse_attention.sparse_attention_kernel`.
    """
    SHARE: gl.constexpr = BLOCK_Q // (GROUPS * 64)
    row, head = gl.program_id(0) // SHARE, gl.program_id(1)
    rows = gl.num_programs(0) // SHARE
    plane = gl.program_id(2).to(gl.int64) * gl.num_programs(1) + head
    columns = gl.cdiv(text, BLOCK_K) + gl.cdiv(tokens - text, BLOCK_K)
    first = gl.load(ends + head * (rows + 1) + row)
    last = gl.load(ends + head * (rows + 1) + row + 1)

    q_tiles = gl.allocate_shared_memory(q.dtype, [GROUPS] + q.block_type.shape, q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_type.shape, k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_type.shape, v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=GROUPS)
        mbarrier.init(v_empty.index(stage), count=GROUPS)

    if CODED:
        q_scale += plane * rows + row
        k_scale += plane * columns
    q_place = (plane * gl.num_programs(0) + gl.program_id(0)).to(gl.int32) * (GROUPS * 64)
    k_place = plane.to(gl.int32) * columns * BLOCK_K
    v_channel = plane.to(gl.int32) * columns * SIZE
    # Gluon takes these tuples as they stand: put into a variable, constants would be values of the run.
    # fmt: off
    if GROUPS == 2:
        gl.warp_specialize([
            (_compute, (
                q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                q_scale, k_scale, v_scale, v_mean, order, entries, first, last, tokens, text, head, plane, out,
                0, SCALE, SIZE, BLOCK_Q, BLOCK_K, TILE, STAGES, CODED, PARTIAL,
            )),
            (_compute, (
                q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                q_scale, k_scale, v_scale, v_mean, order, entries, first, last, tokens, text, head, plane, out,
                1, SCALE, SIZE, BLOCK_Q, BLOCK_K, TILE, STAGES, CODED, PARTIAL,
            )),
            (_copy, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                entries, first, last, q_place, k_place, v_channel, GROUPS, SIZE, BLOCK_K, TILE, STAGES,
            )),
        ], [4, 1], [COMPUTING, COPYING])
    else:
        gl.warp_specialize([
            (_compute, (
                q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                q_scale, k_scale, v_scale, v_mean, order, entries, first, last, tokens, text, head, plane, out,
                0, SCALE, SIZE, BLOCK_Q, BLOCK_K, TILE, STAGES, CODED, PARTIAL,
            )),
            (_copy, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, k_empty, v_full, v_empty,
                entries, first, last, q_place, k_place, v_channel, GROUPS, SIZE, BLOCK_K, TILE, STAGES,
            )),
        ], [1], [COPYING])
    # fmt: on


def attend_packed(
    operands: Operands,
    order: Tensor,
    rows: tuple[Tensor, Tensor],
    tiling: Tiling,
    launch: Launch,
    out: Tensor,
) -> Tensor:
    """Do the work of :func:`qdiff.attention.kernels.sparse_attention.attend_packed` on a Hopper, with lists row by row.
    One warpgroup computes each 64 queries that the launch gives a program.
    """
    batch, heads = out.shape[:2]
    ends, entries = rows
    boxes = boxes_of(launch)
    unused = order  # a pointer that a kernel without scales does not read
    scales = operands.q_scale, operands.k_scale, operands.v_scale, operands.v_mean
    programs = (tiling.text_rows + tiling.rows) * (launch.block_q // launch.rows)
    sparse_attention_hopper[(programs, heads, batch)](
        _described(operands.q, boxes["q"]),
        _described(operands.k, boxes["k"]),
        _described(operands.v, boxes["v"]),
        *(unused if scale is None else scale for scale in scales),
        order,
        ends,
        entries,
        tiling.tokens,
        tiling.text,
        out,
        **constants_of(launch),
        **options_of(launch),
    )
    return out


def constants_of(launch: Launch) -> dict[str, object]:
    """Return the kernel's compile-time arguments."""
    names = ("SCALE", "SIZE", "BLOCK_Q", "BLOCK_K", "TILE", "CODED", "PARTIAL")
    return {
        **{name: launch.constants[name] for name in names},
        "STAGES": launch.options["num_stages"],
        "GROUPS": launch.rows // GROUP,
        "COMPUTING": COMPUTING,
        "COPYING": COPYING,
    }


def options_of(launch: Launch) -> dict[str, int | bool]:
    """Return the compiler's options."""
    return {"num_warps": 4, "maxnreg": REGISTERS[launch.rows // GROUP], "enable_fp_fusion": True}


def boxes_of(launch: Launch) -> dict[str, tuple[int, int]]:
    """Return rows and columns of what is copied at once, by the operand's name."""
    size, tile = launch.size, launch.keys
    return {"q": (GROUP, size), "k": (tile, size), "v": (size, tile)}


def layout_of(columns: int, bits: int) -> gl.NVMMASharedLayout:
    """Return how a box with rows of ``columns`` elements lies in shared memory."""
    return gl.NVMMASharedLayout(min(128, columns * bits // 8), bits, 2)


def _described(x: Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """Return a descriptor of ``x [..., columns]`` as a matrix that is copied in boxes."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), list(box), layout_of(box[1], 8 * x.itemsize))
