"""Executors agree: the definition in float64, blocks gathered in torch, the kernel's emulator, and the ONNX graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from qdiff.attention import (
    emulator,
    gathered,
    operator,  # noqa: F401  registers the op
    oracle,
)
from qdiff.attention.lists import NOTHING, BlockLists, Tiling
from qdiff.attention.numerics import NUMERICS
from qdiff.attention.packing import pack
from qdiff.errors import InputError, UsageError

BATCH, HEADS = 2, 3
SHAPES = {"whole": (256, 0, 64, 64, 32), "text and tails": (333, 17, 64, 32, 72), "wide rows": (256, 0, 128, 32, 64)}
# Of the output, relative to float64: what the formats cost on data with channel outliers in the keys.
WITHIN = {"float": 1e-6, "bf16": 2e-3, "int8_fp8": 0.012, "fp8": 0.02}


class Case:
    def __init__(self, shape: str, partial: bool = False) -> None:
        tokens, text, block_q, block_k, size = SHAPES[shape]
        generator = torch.Generator().manual_seed(len(shape))
        self.tiling = Tiling(tokens, text, block_q, block_k)
        self.q, self.k, self.v = (torch.randn(BATCH, HEADS, tokens, size, generator=generator) for _ in range(3))
        self.k += 2 * torch.randn(1, HEADS, 1, size, generator=generator)
        self.v += 1
        self.order = torch.stack([torch.randperm(self.tiling.ordered, generator=generator) for _ in range(HEADS)])
        if partial:
            masks = torch.rand(HEADS, self.tiling.rows, self.tiling.columns, generator=generator) < 0.5
            self.lists = BlockLists.of_masks(masks)
        else:
            widths = torch.tensor([1, self.tiling.columns, (self.tiling.columns + 1) // 2])
            rows = [
                torch.stack(
                    [torch.randperm(self.tiling.columns, generator=generator)[:width] for _ in range(self.tiling.rows)]
                )
                for width in widths
            ]
            self.lists = BlockLists(torch.cat(rows, dim=1).int(), torch.cat([torch.zeros(1).long(), widths.cumsum(0)]))

    def gathered(self, numerics: str = "float", lists: BlockLists | None = None) -> torch.Tensor:
        return gathered.attend(self.q, self.k, self.v, self.order, lists or self.lists, self.tiling, NUMERICS[numerics])

    def exact(self) -> torch.Tensor:
        return oracle.attend(self.q, self.k, self.v, self.order, self.lists, self.tiling)


def apart(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("partial", [False, True], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("numerics", NUMERICS)
def test_executors_agree_with_the_definition(numerics, shape, partial):
    case = Case(shape, partial)
    exact, got = case.exact(), case.gathered(numerics)
    assert apart(got, exact) < WITHIN[numerics]
    packed = pack(case.q, case.k, case.v, case.order, case.tiling, NUMERICS[numerics])
    tiled = emulator.attend(packed, case.order, case.lists, case.tiling, NUMERICS[numerics], tile=32)
    # The same operands: only probabilities are rounded against another maximum.
    assert apart(tiled, got) < (1e-6 if numerics == "float" else 5e-3)
    if numerics != "float":
        assert apart(got, exact) > 1e-4, "these numerics round nothing"


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_everything_is_dense_attention(shape):
    case = Case(shape)
    dense = functional.scaled_dot_product_attention(case.q, case.k, case.v)
    assert apart(case.gathered(lists=BlockLists.full(HEADS, case.tiling)), dense) < 1e-6


@pytest.mark.parametrize("numerics", ["float", "fp8"])
@pytest.mark.parametrize("partial", [False, True], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_the_definition(shape, partial, numerics):
    case = Case(shape, partial)
    operands = [x.double().requires_grad_() for x in (case.q, case.k, case.v)]
    q, k, v = operands
    read = oracle.token_mask(case.order, case.lists, case.tiling)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~read, -1e9)  # a row that reads nothing: no NaN, no gradient
    exact = scores.softmax(dim=-1) * read @ v
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    wanted = torch.autograd.grad((exact * weights).sum(), operands)

    given = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    tiling = case.tiling
    cut = (0, tiling.text, tiling.block_q, tiling.block_k, numerics, q.shape[-1] ** -0.5)
    output = torch.ops.qdiff.sparse_attention(*given, case.order, case.lists.blocks, case.lists.bounds, *cut)
    got = torch.autograd.grad((output * weights).sum(), given)
    assert all(apart(one, other) < 1e-5 for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("partial", [False, True], ids=["even rows", "uneven rows"])
@pytest.mark.parametrize("shape", SHAPES)
def test_samples_at_once_as_on_a_gpu(monkeypatch, shape, partial):
    case = Case(shape, partial)
    one_by_one = {numerics: case.gathered(numerics) for numerics in NUMERICS}
    monkeypatch.setattr(gathered, "at_once", len)
    for numerics, wanted in one_by_one.items():
        assert apart(case.gathered(numerics), wanted) < 1e-5, numerics


def test_the_order_of_a_list_and_its_gaps_do_not_matter():
    case = Case("whole")
    shuffled = [case.lists.of(head)[:, torch.randperm(case.lists.of(head).shape[1])] for head in range(HEADS)]
    turned = BlockLists(torch.cat(shuffled, dim=1), case.lists.bounds)
    assert apart(case.gathered(lists=turned), case.gathered()) < 1e-6
    gaps = torch.full((case.tiling.rows, 1), NOTHING, dtype=torch.int32)
    parts = [torch.cat([case.lists.of(head), gaps], dim=1) for head in range(HEADS)]
    padded = BlockLists(torch.cat(parts, dim=1), case.lists.bounds + torch.arange(HEADS + 1))
    assert apart(case.gathered(lists=padded), case.gathered()) < 1e-6


@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_row_that_reads_nothing_is_zero(numerics):
    case = Case("whole")
    masks = case.lists.masks(case.tiling.columns)
    masks[1, 2] = False
    masks[2] = False
    got = case.gathered(numerics, BlockLists.of_masks(masks))
    blank = got[:, 1, case.order[1, 128:192]]
    assert not blank.any() and not got[:, 2].any() and got.isfinite().all()


def test_what_is_not_read_cannot_reach_the_output():
    case = Case("whole")
    masks = case.lists.masks(case.tiling.columns)
    masks[:, :, 3] = False
    masks[:, :, 0] = True
    lists, wanted = BlockLists.of_masks(masks), None
    wanted = case.gathered(lists=lists)
    for head in range(HEADS):
        case.k[:, head, case.order[head, 192:256]] = torch.nan
        case.v[:, head, case.order[head, 192:256]] = torch.inf
    assert torch.equal(case.gathered(lists=lists), wanted)


def test_a_short_accumulator_shows_unless_it_is_flushed():
    """Hopper's FP8 sums: in one register over all keys the error grows, in one for each tile it does not."""
    tiling = Tiling(8192, 0, 64, 64)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 8192, 32, generator=generator) for _ in range(3))
    order = torch.arange(8192)[None]
    masks = torch.zeros(1, 128, 128, dtype=torch.bool)
    masks[0, 0] = True  # one row of blocks is enough
    lists, row = BlockLists.of_masks(masks), NUMERICS["int8_fp8"]
    packed = pack(q, k, v + 1, order, tiling, row)
    exact = emulator.attend(packed, order, lists, tiling, row)[:, :, :64]

    def cost(flush: bool) -> float:
        short = {"accumulator_bits": emulator.FP22_MANTISSA, "flush": flush}
        return apart(emulator.attend(packed, order, lists, tiling, row, **short)[:, :, :64], exact)

    assert cost(flush=False) > 4 * cost(flush=True)


def test_tensor_cores_lose_what_lies_far_below_the_largest_product():
    """In FP8 scores as well, where no flush helps; an H200 is 0.4 % from exact sums and 0.2 % from this."""
    tiling = Tiling(290, 0, 128, 128)
    q, k, v = (torch.randn(1, 1, 290, 128, generator=torch.Generator().manual_seed(n)) for n in range(3))
    order, lists = torch.arange(290)[None], BlockLists.full(1, tiling)

    def cost(numerics: str) -> float:
        row = NUMERICS[numerics]
        packed = pack(q, k, v, order, tiling, row)
        exact = emulator.attend(packed, order, lists, tiling, row)
        return apart(emulator.attend(packed, order, lists, tiling, row, accumulator_bits=13), exact)

    assert 5e-4 < cost("fp8") < 1e-2
    assert cost("int8_fp8") < cost("fp8") / 4
    parts = torch.tensor([4.0, 2.0**-12, -(2.0**-12), 2.0**-10])
    assert emulator.aligned_sum(parts, 13) == 4 + 2.0**-10 and emulator.aligned_sum(parts[1:], 13) == 2.0**-10


def test_the_op_reads_its_own_part_of_all_lists():
    case = Case("text and tails")
    everyone = BlockLists.joined([case.lists, case.lists, case.lists])
    tiling = case.tiling
    got = torch.ops.qdiff.sparse_attention(
        case.q, case.k, case.v, case.order, everyone.blocks, everyone.bounds, HEADS,
        tiling.text, tiling.block_q, tiling.block_k, "float", case.q.shape[-1] ** -0.5,
    )  # fmt: skip
    assert torch.equal(got, case.gathered())
    with pytest.raises(UsageError, match="numerics"):
        torch.ops.qdiff.sparse_attention(
            case.q, case.k, case.v, case.order, everyone.blocks, everyone.bounds, 0, 17, 64, 32, "fp9", 1.0
        )


class Attention(nn.Module):
    def __init__(self, case: Case, numerics: str) -> None:
        super().__init__()
        self.register_buffer("order", case.order.int())
        self.tiling, self.numerics = case.tiling, numerics

    def forward(self, q, k, v, blocks, bounds):
        tiling, scale = self.tiling, q.shape[-1] ** -0.5
        cut = (tiling.text, tiling.block_q, tiling.block_k)
        return torch.ops.qdiff.sparse_attention(q, k, v, self.order, blocks, bounds, HEADS, *cut, self.numerics, scale)


def write(case: Case, numerics: str, target: str, path) -> BlockLists:
    """The graph of one attention whose heads come after those of another; its lists."""
    from qdiff.export.onnx_graph import write_graph
    from qdiff.export.translations import TARGETS

    lists = BlockLists.joined([case.lists, case.lists])
    dtype = getattr(torch, TARGETS[target].compute)
    batch, listed = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("listed", min=2, max=1000)
    values = (case.q.to(dtype), case.k.to(dtype), case.v.to(dtype), lists.blocks, lists.bounds)
    shapes = ({0: batch}, {0: batch}, {0: batch}, {1: listed}, None)
    names = ["q", "k", "v", "blocks", "bounds"]
    write_graph(Attention(case, numerics).eval(), values, shapes, TARGETS[target], names).save(str(path))
    return lists


@pytest.mark.parametrize("shape", ["whole", "text and tails"])
@pytest.mark.parametrize(
    ("numerics", "target", "within"),
    [
        ("float", "onnxruntime", 1e-6),
        ("int8_fp8", "onnxruntime", 1e-3),
        ("fp8", "onnxruntime", 1e-3),
        ("float", "tensorrt", 2e-3),
        ("int8_fp8", "tensorrt", 6e-3),
        ("fp8", "tensorrt", 6e-3),
    ],
)
def test_the_graph_computes_the_same_and_takes_other_lists(numerics, target, within, shape, tmp_path):
    import onnx
    import onnxruntime

    case, path = Case(shape), tmp_path / "model.onnx"
    lists = write(case, numerics, target, path)
    onnx.checker.check_model(str(path), full_check=True)
    settings = onnxruntime.SessionOptions()
    if target == "tensorrt":  # as engines/ort.py: it would make an integer product of FP8 codes
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    dtype = "float16" if target == "tensorrt" else "float32"
    other = Case(shape)
    other.lists = BlockLists.of_masks(case.lists.masks(case.tiling.columns).flip(0))
    for now, given in ((case, lists), (other, BlockLists.joined([case.lists, other.lists]))):
        feed = {name: getattr(case, name).numpy().astype(dtype) for name in "qkv"}
        got = session.run(None, {**feed, "blocks": given.blocks.numpy(), "bounds": given.bounds.numpy()})[0]
        assert apart(torch.from_numpy(got), case.gathered(numerics, now.lists)) < within


def test_an_engine_for_a_gpu_builds_with_lists_as_inputs(tmp_path):
    """FP8 products behind Q/DQ, and shapes that follow from the numbers in an input."""
    pytest.importorskip("tensorrt_rtx")
    from qdiff.engines import BuildOptions, choose_engine
    from qdiff.engines.base import Profile

    case, path = Case("whole"), tmp_path / "model.onnx"
    lists = write(case, "fp8", "tensorrt", path)
    shape, entries = tuple(case.q.shape), case.lists.blocks.shape[1]
    ranges = {name: ((1, *shape[1:]), shape, (4, *shape[1:])) for name in "qkv"}
    ranges["blocks"] = tuple((case.tiling.rows, total) for total in (6, 2 * entries, 24))
    ranges["bounds"] = ((7,),) * 3
    values = {"bounds": (tuple(range(7)), tuple(lists.bounds.tolist()), tuple(range(0, 25, 4)))}
    (tmp_path / "engine").mkdir()
    options = BuildOptions((Profile("one", ranges, values),), "12.0")
    facts = choose_engine("tensorrt_rtx").build(path, tmp_path / "engine", options)
    assert facts["tensors"].get("fp8", 0) >= 3 * HEADS, "queries, keys and values of each head are FP8"


def test_numerics_without_an_onnx_form_are_refused(tmp_path):
    with pytest.raises(InputError, match="bf16"):
        write(Case("whole"), "bf16", "onnxruntime", tmp_path / "model.onnx")
