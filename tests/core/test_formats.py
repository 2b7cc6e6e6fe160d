"""The contract of every number format, and its numbers against ONNX Runtime, ONNX's reference and torch."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from qdiff import numerics
from qdiff.errors import InputError
from qdiff.formats import FORMATS, format_named

QUANTIZED = [name for name in FORMATS if FORMATS[name].quantized]
PLAIN = [name for name in FORMATS if not FORMATS[name].quantized]


def all_codes(format) -> torch.Tensor:
    """Every value that an element of the format's storage can hold and the format allows."""
    return torch.arange(int(format.lowest), int(format.highest) + 1).to(getattr(torch, format.storage))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_agrees_with_its_storage(name):
    row = format_named(name)
    assert row.name == name and row.bits == torch.zeros(1, dtype=getattr(torch, row.storage)).element_size() * 8
    assert row.effective_bits(64) == row.bits + row.scale_bits / 64
    assert (row.scale_bits > 0) == row.quantized


@pytest.mark.parametrize("name", QUANTIZED)
def test_every_code_comes_back(name):
    row = format_named(name)
    codes = all_codes(row)
    assert len(codes) == 2**row.bits
    for scale in (1.0, 0.0371, 3e-5, 812.5):
        scale = torch.tensor(scale)
        values = numerics.dequantize(codes, scale, row)
        again = numerics.quantize(values, scale, row)
        assert again.dtype == codes.dtype and torch.equal(again, codes)
        assert torch.equal(numerics.quantize_dequantize(values, scale, row), values)


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_ties_and_saturation(name):
    row = format_named(name)
    one = torch.ones(())
    assert numerics.quantize(torch.tensor([0.0, -0.0]), one, row).tolist() == [0, 0]
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert numerics.quantize(halves, one, row).tolist() == [0, 2, 2, 0, -2, -2]  # ties to even
    far = torch.tensor([1e9, -1e9, float("inf"), -float("inf"), row.highest + 1, row.lowest - 1])
    expected = [row.highest, row.lowest] * 3
    assert numerics.quantize(far, one, row).tolist() == expected
    assert numerics.quantize_dequantize(far, one, row).tolist() == expected


@pytest.mark.parametrize("name", QUANTIZED)
def test_scales(name):
    row = format_named(name)
    amax = torch.tensor([0.0, 1e-30, 1e-7, 0.3, 127.0, 6e4, 1e8, 3e38])
    scale = numerics.choose_scale(amax, row)
    assert scale[0] == 1, "a tensor of zeros must not divide by zero"
    assert torch.isfinite(scale).all() and (scale > 0).all()
    assert torch.equal(scale, scale.half().float()), "scales are numbers that float16 holds"
    usual = slice(3, 6)
    largest = numerics.quantize(amax[usual], scale[usual], row)
    assert largest.tolist() == [row.largest] * 3  # the largest value gets the largest code
    assert torch.allclose(scale[usual], amax[usual] / row.largest, rtol=2**-11)


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_have_a_scale_for_each_output_channel_and_err_by_half_a_step(name):
    row = format_named(name)
    weight = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 7)[:, None, None]
    weight[2] = 0
    codes, scale = numerics.quantize_weight(weight, row)
    assert codes.shape == weight.shape and scale.shape == (7,) and scale.dtype == torch.float32
    assert codes[2].abs().sum() == 0
    error = (numerics.dequantize(codes, scale[:, None, None], row) - weight).abs().flatten(1).amax(1)
    # Half a step; where the scale was rounded down, the largest value may fall short by 127.5 * 2^-11 steps more.
    assert (error <= scale * (0.5 + row.largest * 2**-11) + 1e-12).all()


@pytest.mark.parametrize("bad", [[1.0, float("nan")], [float("inf"), -float("inf")], [float("inf"), 0.0]])
def test_nan_and_infinity_are_refused_with_their_count(bad):
    with pytest.raises(InputError, match=f"the weight w holds {sum(not np.isfinite(x) for x in bad)} NaN"):
        numerics.require_finite(torch.tensor(bad), "the weight w")
    numerics.require_finite(torch.full((1000,), 3e38), "large values whose sum float32 cannot hold")
    numerics.require_finite(torch.arange(5), "integers")


def test_an_unknown_format_gets_the_nearest_names():
    with pytest.raises(InputError, match="did you mean int8"):
        format_named("int9")


def _quantize_graph(scale: float) -> onnx.ModelProto:
    scales = [helper.make_tensor("s", TensorProto.FLOAT, [], [scale])]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s"], ["codes"], output_dtype=TensorProto.INT8),
        helper.make_node("DequantizeLinear", ["codes", "s"], ["values"]),
    ]
    graph = helper.make_graph(
        nodes,
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [
            helper.make_tensor_value_info("codes", TensorProto.INT8, [None]),
            helper.make_tensor_value_info("values", TensorProto.FLOAT, [None]),
        ],
        scales,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("scale", [0.0078125, 0.0371, 1.7e-4, 3.0])
def test_int8_is_what_onnx_computes_bit_for_bit(scale):
    row = format_named("int8")
    scale = float(np.float32(scale))
    generator = torch.Generator().manual_seed(1)
    steps = torch.arange(-140, 140, 0.25)  # every tie, and beyond both ends
    x = torch.cat([steps * scale, torch.randn(20_000, generator=generator) * 60 * scale])
    model = _quantize_graph(scale)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes = numerics.quantize(x, torch.tensor(scale), row).numpy()
    values = numerics.quantize_dequantize(x, torch.tensor(scale), row).numpy()
    for got_codes, got_values in (
        session.run(None, {"x": x.numpy()}),
        onnx.reference.ReferenceEvaluator(model).run(None, {"x": x.numpy()}),
    ):
        np.testing.assert_array_equal(codes, got_codes)
        np.testing.assert_array_equal(values, got_values)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_int8_is_what_torch_quantizes_to():
    """torch multiplies by 1/scale, so the two agree on ties where that is exact: at powers of two."""
    scale = 2.0**-5
    x = torch.cat(
        [torch.arange(-140, 140, 0.25) * scale, torch.randn(5000, generator=torch.Generator().manual_seed(2))]
    )
    ours = numerics.quantize(x, torch.tensor(scale), format_named("int8"))
    assert torch.equal(ours, torch.quantize_per_tensor(x, scale, 0, torch.qint8).int_repr())
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    codes, scales = numerics.quantize_weight(weight, format_named("int8"))
    theirs = torch.quantize_per_channel(weight, scales, torch.zeros(6, dtype=torch.int64), 0, torch.qint8).int_repr()
    assert (codes.int() - theirs.int()).abs().max() <= 1 and (codes != theirs).float().mean() < 1e-3
