"""What the Triton kernel computes, against the emulator and the oracle: run by test_kernel.py in a process of its own, in
triton's interpreter on any machine and compiled where there is a GPU. By its name it is not collected.

The interpreter has to be chosen before triton is imported, and would take it from the tests that compile.
"""

from __future__ import annotations

import os

import pytest
import torch

from qdiff.attention import emulator, oracle, packing
from qdiff.attention.kernels import aot, gpu, pack, sparse_attention
from qdiff.attention.kernels import moments as moments_kernel
from qdiff.attention.lists import NOTHING, BlockLists, Tiling
from qdiff.attention.nodes import KEYS, PRODUCT, QUERIES, VALUES, WHOLE, AttentionNode
from qdiff.attention.numerics import NUMERICS
from qdiff.engines import trt_plugin
from qdiff.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# To the emulator. On a GPU FP8 scores differ by how exactly tensor cores align products, of which it has a model.
CLOSE = {"bf16": 2e-3, "int8_fp8": 2e-3, "fp8": 2e-3 if INTERPRETED else 5e-3}
CAPABILITY = (0, 0) if INTERPRETED else torch.cuda.get_device_capability()
HEADS = 2
CODED = ("int8_fp8", "fp8")
KERNEL = (*CODED, "bf16")
TILINGS = {
    "no text": Tiling(290, 0, 128, 128),
    "text": Tiling(170, 17, 64, 64),
    "short text": Tiling(190, 3, 128, 64),
    "whole blocks": Tiling(256, 64, 64, 64),
    "wide text": Tiling(400, 17, 128, 128),
    "wide whole blocks": Tiling(384, 128, 128, 128),
    "narrow queries": Tiling(290, 0, 64, 128),
}


def with_every_numerics(*cases):
    return [(numerics, *case) for case in cases for numerics in KERNEL]


def with_some_numerics(*cases):
    """All of them on a GPU; one for each case in the interpreter, which takes seconds for each."""
    if not INTERPRETED:
        return with_every_numerics(*cases)
    return [(KERNEL[number % len(KERNEL)], *case) for number, case in enumerate(cases)]


def heads_of(tiling, size, batch=1, dtype=torch.float32):
    """Queries, keys and values of heads that look at the neighbourhood: positions as waves, a few strong channels, some noise."""
    generator = torch.Generator().manual_seed(size + tiling.tokens)
    waves = torch.arange(1, 9)[:, None] * torch.linspace(0, 6.28, tiling.tokens)
    positions = torch.cat([waves.cos(), waves.sin()]).T

    def features(strength, noise):
        mixed = positions @ torch.randn(batch, HEADS, 16, size, generator=generator) * strength
        return mixed + noise * torch.randn(batch, HEADS, tiling.tokens, size, generator=generator)

    mix = torch.randn(batch, HEADS, 16, size, generator=generator) * 0.7
    q, k = (
        positions @ mix + 0.3 * torch.randn(batch, HEADS, tiling.tokens, size, generator=generator) for _ in range(2)
    )
    k[..., :3] += 4.0
    return tuple(x.to(dtype) for x in (q, k, features(0.5, 0.2) + 0.5))


def lists_of(tiling, density=0.5):
    generator = torch.Generator().manual_seed(tiling.tokens)
    masks = torch.rand(HEADS, tiling.rows, tiling.columns, generator=generator) < density
    masks[:, :, -1] = True  # the block with the empty places
    order = torch.stack([torch.randperm(tiling.ordered, generator=generator) for _ in range(HEADS)])
    return order, masks


def attend(q, k, v, order, lists, tiling, numerics, scale=None, **options):
    on_device = (x.to(DEVICE) for x in (q, k, v))
    return gpu.attend(*on_device, order, lists, tiling, NUMERICS[numerics], scale, **options).cpu()


def emulated(packed, order, lists, tiling, numerics, **options):
    """With the tiles that the kernel takes, and the accumulators of the hardware: in the interpreter float32, on a GPU those of
    its FP8 tensor cores."""
    row, bits = NUMERICS[numerics], None if INTERPRETED else emulator.FP22_MANTISSA
    constants = gpu.tuned(packed.q.shape[-1], row, tiling, CAPABILITY) | options
    launch = sparse_attention.Launch(packed.q.shape[-1], row, tiling.block_q, tiling.block_k, **constants)
    return emulator.attend(packed, order, lists, tiling, row, tile=launch.keys, accumulator_bits=bits)


def error(ours, reference):
    assert ours.shape == reference.shape and bool(torch.isfinite(ours).all())
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize(
    ("numerics", "size", "name"),
    [
        *with_every_numerics((64, "short text"), (72, "text")),
        *with_some_numerics(
            (64, "no text"),
            (72, "whole blocks"),
            (128, "no text"),
            (128, "text"),
            (128, "wide text"),
            (128, "wide whole blocks"),
            (128, "narrow queries"),
        ),
    ],
)
def test_agrees_with_the_emulator_and_the_oracle(numerics, size, name):
    """The emulator has the same operands and rounds the same probabilities: what is left is float32's order of sums, and codes
    that fall the other way because of it. The oracle bound is that of the formats: 3 bits of mantissa in probabilities and
    values, 7 in BF16."""
    tiling = TILINGS[name]
    q, k, v = heads_of(tiling, size, batch=2 if name == "wide text" else 1)
    order, masks = lists_of(tiling)
    lists = BlockLists.of_masks(masks)
    ours = attend(q, k, v, order, lists, tiling, numerics)
    packed = packing.pack(q, k, v, order, tiling, NUMERICS[numerics])
    same = emulated(packed, order, lists, tiling, numerics)
    assert error(ours, same) < CLOSE[numerics]
    assert error(ours, oracle.attend(q, k, v, order, lists, tiling)) < (0.01 if numerics == "bf16" else 0.03)


@pytest.mark.parametrize(
    ("size", "numerics"), [(32, "int8_fp8"), (40, "fp8"), (80, "bf16"), (96, "int8_fp8"), (112, "fp8"), (40, "bf16")]
)
def test_other_head_sizes(size, numerics):
    tiling = Tiling(150, 5, 64, 32)
    q, k, v = heads_of(tiling, size)
    order, masks = lists_of(tiling)
    lists = BlockLists.of_masks(masks)
    ours = attend(q, k, v, order, lists, tiling, numerics)
    packed = packing.pack(q, k, v, order, tiling, NUMERICS[numerics])
    assert error(ours, emulated(packed, order, lists, tiling, numerics)) < CLOSE[numerics]


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_tiles_of_a_block(tile):
    """Two tiles of the last block may be empty."""
    tiling = Tiling(270, 0, 64, 128)
    q, k, v = heads_of(tiling, 64)
    order, masks = lists_of(tiling)
    lists = BlockLists.of_masks(masks)
    packed = packing.pack(q, k, v, order, tiling, NUMERICS["int8_fp8"])
    same = emulated(packed, order, lists, tiling, "int8_fp8", tile=tile)
    assert error(attend(q, k, v, order, lists, tiling, "int8_fp8", tile=tile), same) < 2e-3


@pytest.mark.skipif(CAPABILITY != gpu.HOPPER, reason="no Hopper here")
@pytest.mark.parametrize(("numerics", "in_gluon"), [("int8_fp8", True), ("bf16", True), ("fp8", False)])
def test_a_hopper_has_its_own_kernel(numerics, in_gluon, monkeypatch):
    from qdiff.attention.kernels import hopper

    tiling, calls = TILINGS["wide text"], []
    monkeypatch.setattr(hopper, "attend_packed", lambda *given: calls.append(given) or given[-1])
    q, k, v = heads_of(tiling, 128)
    attend(q, k, v, lists_of(tiling)[0], BlockLists.full(HEADS, tiling), tiling, numerics)
    assert bool(calls) == in_gluon


@pytest.mark.parametrize("numerics", KERNEL)
def test_full_lists_are_dense_attention(numerics):
    tiling = Tiling(110, 5)
    q, k, v = heads_of(tiling, 64, batch=2)
    order, _ = lists_of(tiling)
    dense = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.1)
    ours = attend(q, k, v, order, BlockLists.full(HEADS, tiling), tiling, numerics, scale=0.1)
    assert error(ours, dense) < (0.01 if numerics == "bf16" else 0.03)


def test_order_repetitions_and_nothing_do_not_matter():
    tiling = TILINGS["no text"]
    q, k, v = heads_of(tiling, 64)
    order, masks = lists_of(tiling)
    rising = BlockLists.of_masks(masks)
    first = attend(q, k, v, order, rising, tiling, "int8_fp8")
    wider = torch.cat([rising.of(0).flip(1), rising.of(0), torch.full_like(rising.of(0), NOTHING), rising.of(1)], dim=1)
    bounds = torch.tensor([0, wider.shape[1] - rising.of(1).shape[1], wider.shape[1]])
    assert torch.equal(attend(q, k, v, order, BlockLists(wider, bounds), tiling, "int8_fp8"), first)


def test_the_kernel_takes_entries_in_any_order():
    """:meth:`BlockLists.by_row` sorts; another order meets another maximum first, which moves the rounding of probabilities."""
    tiling = Tiling(150, 5)
    q, k, v = (x.to(DEVICE) for x in heads_of(tiling, 72))
    order, masks = lists_of(tiling)
    offsets, entries = BlockLists.of_masks(masks).by_row(tiling)
    first = gpu.attend_rows(q, k, v, order, (offsets.to(DEVICE), entries.to(DEVICE)), tiling, NUMERICS["bf16"])
    for start, end in offsets.unfold(1, 2, 1).flatten(0, 1).tolist():
        entries[start:end] = entries[start:end].flip(0)
    second = gpu.attend_rows(q, k, v, order, (offsets.to(DEVICE), entries.to(DEVICE)), tiling, NUMERICS["bf16"])
    assert 0 < error(second, first) < 2e-3


def even(tiling, width=2):
    """Lists as graphs have them, every row of a head equally long, and of one head longer than of the other."""
    generator = torch.Generator().manual_seed(tiling.tokens)
    masks = torch.zeros(HEADS, tiling.rows, tiling.columns, dtype=torch.bool)
    for head, masked in enumerate(masks):
        ranked = torch.rand(tiling.rows, tiling.columns, generator=generator).argsort(dim=1)
        masked.scatter_(1, ranked[:, : min(width + head, tiling.columns)], True)
    return masks


def on_device(packed, tiling, numerics):
    operands = vars(pack.Operands.of(packed, tiling, NUMERICS[numerics])).values()
    return pack.Operands(*(None if x is None else x.to(DEVICE) for x in operands))


@pytest.mark.parametrize(("numerics", "name"), with_some_numerics(("no text",), ("short text",), ("whole blocks",)))
def test_lists_as_a_graph_has_them(numerics, name):
    """Bounds and blocks of these heads among those of others give what offsets and entries give, bit for bit."""
    tiling = TILINGS[name]
    q, k, v = heads_of(tiling, 64)
    order, _ = lists_of(tiling)
    lists = BlockLists.of_masks(even(tiling))
    everyone = BlockLists.joined([lists, lists])
    moved = on_device(packing.pack(q, k, v, order, tiling, NUMERICS[numerics]), tiling, numerics)
    found = []
    for matrix, rows in ((False, lists.by_row(tiling)), (True, (everyone.bounds[HEADS:].int(), everyone.blocks))):
        launch = sparse_attention.Launch(64, NUMERICS[numerics], tiling.block_q, tiling.block_k, matrix=matrix)
        out = torch.full_like(q, torch.nan, device=DEVICE)
        given = tuple(x.to(DEVICE) for x in rows)
        found.append(sparse_attention.attend_packed(moved, order.int().to(DEVICE), given, tiling, launch, out).cpu())
    assert torch.equal(*found) and bool(torch.isfinite(found[0]).all())


def test_no_list_leads_outside_the_keys():
    """What it computes from them is nothing to rely on; on a GPU, reading elsewhere would end the process."""
    tiling = TILINGS["text"]
    q, k, v = heads_of(tiling, 64)
    order, _ = lists_of(tiling)
    moved = on_device(packing.pack(q, k, v, order, tiling, NUMERICS["int8_fp8"]), tiling, "int8_fp8")
    launch = sparse_attention.Launch(64, NUMERICS["int8_fp8"], tiling.block_q, tiling.block_k, matrix=True)
    blocks = torch.tensor([NOTHING, 2**30, -(2**31)], dtype=torch.int32).expand(tiling.rows, -1).contiguous()
    rows = (torch.tensor([-5, 2**30, 2], dtype=torch.int32).to(DEVICE), blocks.to(DEVICE))
    out = torch.full_like(q, torch.nan, device=DEVICE)
    found = sparse_attention.attend_packed(moved, order.int().to(DEVICE), rows, tiling, launch, out)
    assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    ("numerics", "size", "name", "dtype"),
    [
        ("int8_fp8", 64, "short text", torch.float16),
        ("int8_fp8", 72, "text", torch.bfloat16),
        ("fp8", 128, "no text", torch.float32),
    ],
)
def test_the_plugins_of_an_engine(numerics, size, name, dtype):
    """The four kernels with the tensors and the integers that TensorRT is told of, codes under the name of INT8, one after the
    other as in an exported graph; the emulator is given the same queries, keys and values."""
    tiling, batch, row = TILINGS[name], 2, NUMERICS[numerics]
    whole = AttentionNode(WHOLE, numerics, True, HEADS, size, tiling, str(dtype).removeprefix("torch."))
    types = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
    types |= {"INT8": torch.int8, "INT32": torch.int32}

    def run(kind, launched, constants, fp8, *given):
        told = trt_plugin.interface(whole.part(kind))
        for (argument, wanted), x in zip(told.inputs, given, strict=True):
            assert x.dtype == types[wanted] and x.is_contiguous(), argument
        made = [torch.empty(batch, *shape, dtype=types[wanted], device=DEVICE) for _, wanted, shape in told.outputs]
        sizes = {"tokens": tiling.tokens, "text": tiling.text, "pitch": given[-1].shape[-1]}
        values = (*given, *(sizes[scalar] for scalar in told.scalars), *made)
        named = dict(zip(told.arguments, values, strict=True))
        named |= {argument: named[argument].view(torch.float8_e4m3fn) for argument in fp8}
        launched[(*told.grid, batch)](**named, **constants)
        return made

    q, k, v = (x.to(DEVICE) for x in heads_of(tiling, size, batch=batch, dtype=dtype))
    q = q * size**-0.5
    order, _ = lists_of(tiling)
    lists = BlockLists.of_masks(even(tiling))
    places, blocks, bounds = (x.to(DEVICE) for x in (order.int(), lists.blocks, lists.bounds.int()))
    k_mean, v_mean = (x.float().mean(dim=2, keepdim=True) for x in (k, v))
    v_scale = (v.float() - v_mean).abs().amax(dim=2, keepdim=True) / 448
    sizes, rows = (row, tiling, HEADS, size), pack.pack_rows_kernel
    coded = ["codes"] if row.scores == "fp8" else []
    q8, q_scale = run(QUERIES, rows, aot.rows_constants(*sizes, False), coded, q, places)
    k8, k_scale = run(KEYS, rows, aot.rows_constants(*sizes, True), coded, k, k_mean, places)
    columns = aot.columns_constants(*sizes)
    (v8,) = run(VALUES, pack.pack_columns_kernel, columns, ["codes"], v, v_mean, v_scale, places)
    launch = sparse_attention.Launch(
        size, row, tiling.block_q, tiling.block_k, sparse_attention.is_partial(tiling), 1.0, matrix=True
    )
    coded = ["q", "k", "v"] if row.scores == "fp8" else ["v"]
    operands = (q8, k8, v8, q_scale, k_scale, v_scale, v_mean, places, bounds, blocks)
    constants = launch.constants | launch.options
    (ours,) = run(PRODUCT, sparse_attention.sparse_attention_kernel, constants, coded, *operands)
    packed = packing.pack(q.cpu(), k.cpu(), v.cpu(), order, tiling, row)
    bits = None if INTERPRETED else emulator.FP22_MANTISSA
    same = emulator.attend(packed, order, lists, tiling, row, 1.0, tile=launch.keys, accumulator_bits=bits)
    assert ours.dtype == dtype
    assert error(ours.cpu(), same) < (CLOSE[numerics] if dtype != torch.bfloat16 else 5e-3)


@pytest.mark.parametrize(("numerics", "size"), [*with_every_numerics((64,)), *with_some_numerics((128,))])
def test_rows_that_read_nothing_are_zero(numerics, size):
    tiling = TILINGS["no text"]
    q, k, v = heads_of(tiling, size)
    order, masks = lists_of(tiling)
    masks[1, 1] = False
    lists = BlockLists.of_masks(masks)
    ours = attend(q, k, v, order, lists, tiling, numerics)
    blank = order[1, tiling.block_q : 2 * tiling.block_q]
    assert torch.equal(ours[0, 1, blank], torch.zeros(len(blank), size))
    assert error(ours, oracle.attend(q, k, v, order, lists, tiling)) < 0.03
    nobody = BlockLists.of_masks(torch.zeros_like(masks))
    assert torch.equal(attend(q, k, v, order, nobody, tiling, numerics), torch.zeros_like(q))


@pytest.mark.parametrize(("numerics", "size"), [*with_every_numerics((72,)), *with_some_numerics((128,))])
def test_what_is_skipped_is_not_read(numerics, size):
    """NaN in a block of keys and values that no row lists, and in the memory that the output is written to."""
    tiling = TILINGS["no text"]
    q, k, v = heads_of(tiling, size)
    order, masks = lists_of(tiling)
    masks[:, :, 1] = False
    constants = gpu.tuned(size, NUMERICS[numerics], tiling, CAPABILITY)
    launch = sparse_attention.Launch(size, NUMERICS[numerics], tiling.block_q, tiling.block_k, **constants)

    def run(packed, masks):
        operands = vars(pack.Operands.of(packed, tiling, NUMERICS[numerics])).values()
        moved = pack.Operands(*(None if x is None else x.to(DEVICE) for x in operands))
        rows = tuple(x.to(DEVICE) for x in BlockLists.of_masks(masks).by_row(tiling))
        out = torch.full_like(q, torch.nan, device=DEVICE)
        return gpu.attend_packed(moved, order.int().to(DEVICE), rows, tiling, launch, out).cpu()

    packed = packing.pack(q, k, v, order, tiling, NUMERICS[numerics])
    clean = run(packed, masks)
    for codes in (packed.k, packed.v):
        bits = codes.view(torch.int8 if codes.itemsize == 1 else torch.int16)
        bits[:, :, tiling.block_k : 2 * tiling.block_k] = torch.iinfo(bits.dtype).max  # NaN but of INT8
    if packed.k_scale is not None:
        packed.k_scale[:, :, 1] = torch.nan
    poisoned = run(packed, masks)
    assert bool(torch.isfinite(clean).all()) and torch.equal(poisoned, clean)
    assert bool(run(packed, torch.ones_like(masks)).isnan().any()), "the poison is none"


@pytest.mark.parametrize("numerics", KERNEL)
@pytest.mark.parametrize(
    ("size", "dtype", "name"),
    [(64, torch.float32, "text"), (72, torch.float32, "short text"), (72, torch.bfloat16, "no text")],
)
def test_packs_as_packing_does(numerics, size, dtype, name):
    """Bit for bit, given the means."""
    tiling = TILINGS[name]
    q, k, v = heads_of(tiling, size, batch=2, dtype=dtype)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))  # as projections leave them
    v[..., 5] = 0.75  # a channel without deviation
    q[0, 0, : tiling.text] = 0
    order, _ = lists_of(tiling)
    moved = (x.to(DEVICE) for x in (q, k, v))
    packed = packing.pack(q, k, v, order, tiling, NUMERICS[numerics])
    theirs = pack.Operands.of(packed, tiling, NUMERICS[numerics])
    moments = None
    if numerics in CODED:
        means = k.mean(dim=2, dtype=torch.float32), theirs.v_mean, theirs.v_scale
        moments = moments_kernel.Moments(*(x.to(DEVICE).contiguous() for x in means))
    ours = pack.pack(*moved, order.int().to(DEVICE), tiling, NUMERICS[numerics], moments)
    for part, reference in vars(theirs).items():
        if part in ("v_mean", "v_scale"):
            continue  # given
        found = getattr(ours, part)
        if reference is None:
            assert found is None
            continue
        found = found.cpu()
        assert found.shape == reference.shape and found.dtype == reference.dtype, part
        assert torch.equal(found.view(torch.uint8), reference.view(torch.uint8)), part


@pytest.mark.parametrize(("size", "tokens"), [(72, 1100), (64, 17), (128, 512)])
def test_moments_are_those_of_torch(size, tokens):
    k, v = (torch.randn(2, tokens, 3, size).transpose(1, 2).bfloat16() + shift for shift in (0.5, -2.0))
    v[0, 1, :, 7] = 0.75  # a channel without deviation
    found = moments_kernel.moments_of(k.to(DEVICE), v.to(DEVICE), NUMERICS["fp8"])
    mean = v.mean(dim=2, dtype=torch.float32)
    amax = (v.float() - mean[:, :, None]).abs().amax(dim=2)
    torch.testing.assert_close(found.k_mean.cpu(), k.mean(dim=2, dtype=torch.float32), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.v_mean.cpu(), mean, rtol=1e-6, atol=1e-6)
    amax[0, 1, 7] = 448.0
    torch.testing.assert_close(found.v_scale.cpu(), amax / 448, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_writes_what_it_was_given(dtype):
    tiling = TILINGS["whole blocks"]
    q, k, v = heads_of(tiling, 64, dtype=dtype)
    order, masks = lists_of(tiling)
    lists = BlockLists.of_masks(masks)
    ours = attend(q, k, v, order, lists, tiling, "bf16")
    assert ours.dtype == dtype
    assert error(ours, oracle.attend(q, k, v, order, lists, tiling)) < 0.01


@pytest.mark.parametrize(
    ("size", "numerics", "tiling", "options", "part"),
    [
        (64, "float", Tiling(256), {}, "does not compute 'float'"),
        (16, "bf16", Tiling(256), {}, "32 to 128 channels, not 16"),
        (160, "bf16", Tiling(256), {}, "not 160"),
        (64, "fp8", Tiling(256, 0, 32, 64), {}, "32 x 64"),
        (64, "fp8", Tiling(256, 0, 64, 96), {}, "64 x 96"),
        (64, "fp8", Tiling(256, 0, 64, 64), {"tile": 128}, "no tiles of 128"),
        (64, "fp8", Tiling(256), {"scale": 0.0}, "not 0.0"),
    ],
)
def test_refuses_what_it_does_not_compute(size, numerics, tiling, options, part):
    x = torch.zeros(1, 1, tiling.tokens, size)
    with pytest.raises(InputError, match=part):
        attend(x, x, x, torch.arange(tiling.ordered)[None], BlockLists.full(1, tiling), tiling, numerics, **options)
