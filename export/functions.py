"""Quantizers that ONNX has no operator for, as ONNX local functions in the domain ``qdiff``.

A run-time block scale, a power-of-two scale, a code of FP4: ONNX Runtime's CPU and OpenVINO have no kernels for them. Each is
written here once, in operators that every runtime has, as a function that travels inside the file. The graph then says
``qdiff.BlockQuantizeDequantize_nvfp4`` where it could say forty nodes: a person can read it, :mod:`.checks` can tell a
quantizer from arithmetic that happens to look like one, and a runtime with a kernel of its own can take the call over. ONNX
Runtime inlines functions when it loads a file; for OpenVINO, which knows none, the engine does it.

The bodies follow :mod:`qdiff.formats.scales` and :mod:`qdiff.formats.dynamic` operation by operation, in float32, so the
values are torch's, bit for bit (the tests compare them). Two things differ from how torch gets there:

- A power of two below amax comes from a logarithm, a table and a comparison, since ONNX cannot see a float's bits; the
  comparison makes it exact whatever the logarithm rounded to.
- E4M3 and E5M2 are Casts. ONNX Runtime's is exact. OpenVINO's rounds to float16 first, so about one value in 250 lands on the
  neighbouring code.

=============================== ==================================================================
``BlockQuantizeDequantize_F``   ``x [..., n]`` (, ``tensor_scale []``) to its values on the grid, a scale a block
``TokenQuantizeDequantize_F``   the same with one scale for each row of the last axis
``QuantizeDequantize_F``        ``x``, ``scale []``: a static scale
``BlockQuantize_F``             ``x [..., n]``, ``tensor_scale []`` to ``codes [..., n]`` (values, in float32) and E4M3 scales
``ScaleBlocks_F``               undoes it: ``values [..., n]``, ``scale [..., n / block]`` to the product, in the scale's dtype
``Dequantize_F``                the same for a weight's codes: UINT4 ``[out, in]``, or packed codes of 6 bits
``Unpack_F``                    codes of a 6-bit integer, packed as UINT8 ``[out, 3/4 in]``, to INT8 ``[out, in]``
``PowerOfTwo``                  E8M0 codes (UINT8, biased by 127) to float32
=============================== ==================================================================

``F`` is a row of :data:`qdiff.formats.table.FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qdiff.attention.nodes import AttentionNode
from qdiff.errors import InputError
from qdiff.export.function_text import DOMAIN, Body, Function
from qdiff.export.sparse_attention import attention_function
from qdiff.formats.scales import (
    LARGEST_E4M3,
    LARGEST_FLOAT16,
    SMALLEST_E4M3,
    SMALLEST_POWER,
    SMALLEST_SCALE,
    largest_power,
    largest_scale,
)
from qdiff.formats.table import Element, Format, format_named

if TYPE_CHECKING:
    from onnx import FunctionProto

_FLOAT, _INT8, _INT32, _INT64, _FLOAT16, _BFLOAT16, _E4M3, _E5M2 = (
    1,
    3,
    6,
    7,
    10,
    16,
    17,
    19,
)  # onnx.TensorProto's numbers
_CASTS = {"e4m3": _E4M3, "e5m2": _E5M2}


def text_of(name: str) -> str:
    """Return a function in ONNX's textual syntax, by its name in the domain.

    Raises:
        InputError: no such function, or a format that it does not exist for.
    """
    kind, _, rest = name.partition("_")
    if kind == "PowerOfTwo":
        made = _power_of_two()
    elif (node := AttentionNode.named(name)) is not None:
        made = attention_function(node)
    elif kind in _KINDS:
        made = _KINDS[kind](format_named(rest))
    else:
        raise InputError(f"there is no ONNX function {DOMAIN}.{name}")
    return made.text(name)


def function(name: str) -> FunctionProto:
    """Return the function. Raises as :func:`text_of`."""
    import onnx.parser

    return onnx.parser.parse_function(text_of(name))


def _static(format: Format) -> Function:
    body = Body()
    values = _on_grid(body, body.do("Div(x, scale)"), format.element)
    return Function("x, scale", body.do(f"Mul({values}, scale)"), body)


def _by_token(format: Format) -> Function:
    body = Body()
    rows = body.cast("x", _FLOAT)
    _, scale = _own_scales(body, rows, format)
    values = body.do(f"Mul({_on_grid(body, body.do(f'Div({rows}, {scale})'), format.element)}, {scale})")
    return Function("x", body.do(f"CastLike({values}, x)"), body)


def _by_block(format: Format) -> Function:
    body = Body()
    codes, _, scale = _blocks_on_grid(body, format)
    values = body.do(f"Reshape({body.do(f'Mul({codes}, {scale})')}, {body.do('Shape(x)')})")
    return Function(_dynamic_inputs(format), body.do(f"CastLike({values}, x)"), body)


def _codes_and_scales(format: Format) -> Function:
    body = Body()
    codes, stored, _ = _blocks_on_grid(body, format)
    shape = body.do("Shape(x)")
    shorter = body.do(f"Concat<axis = 0>({body.do('Shape<end = -1>(x)')}, {body.integers(-1)})")
    codes = body.do(f"Reshape({codes}, {shape})")
    scales = body.cast(body.do(f"Reshape({stored}, {shorter})"), _E4M3)
    return Function(_dynamic_inputs(format), f"{codes}, {scales}", body)


def _blocks_on_grid(body: Body, format: Format) -> tuple[str, str, str]:
    rows = body.do(f"Reshape({body.cast('x', _FLOAT)}, {body.integers(-1, format.block)})")
    stored, scale = _own_scales(body, rows, format)
    return _on_grid(body, body.do(f"Div({rows}, {scale})"), format.element), stored, scale


def _dynamic_inputs(format: Format) -> str:
    return "x, tensor_scale" if format.tensor_scale else "x"


def _weight(format: Format) -> Function:
    body = Body()
    index = body.cast("codes", _INT32) if format.bits == 4 else _fields(body)
    values = body.do(f"Gather<axis = 0>({body.table(format.element.values())}, {index})")
    return Function("codes, scale", _times_blocks(body, values, format.block), body)


def _unpack(format: Format) -> Function:
    body = Body()
    half = body.small_integers(2 ** (format.bits - 1))
    around = body.do(f"Mod({body.do(f'Add({_fields(body)}, {half})')}, {body.small_integers(2**format.bits)})")
    return Function("codes", body.cast(body.do(f"Sub({around}, {half})"), _INT8), body)


def _fields(body: Body) -> str:
    """Return the bit patterns in ``codes``, four of 6 bits in three bytes (:mod:`qdiff.formats.packing`), by arithmetic
    that runtimes fold.
    """
    three = body.do(f"Reshape({body.cast('codes', _INT32)}, {body.integers(0, -1, 3)})")
    parts = body.do(f"Mul({three}, {body.small_integers(1, 2**8, 2**16)})")
    word = body.do(f"ReduceSum<keepdims = 1>({parts}, {body.integers(2)})")
    shifted = body.do(f"Div({word}, {body.small_integers(1, 2**6, 2**12, 2**18)})")
    return body.do(f"Reshape({body.do(f'Mod({shifted}, {body.small_integers(2**6)})')}, {body.integers(0, -1)})")


def _scale_blocks(format: Format) -> Function:
    body = Body()
    return Function("values, scale", _times_blocks(body, "values", format.block), body)


def _times_blocks(body: Body, values: str, block: int) -> str:
    blocks = body.do(f"Reshape({body.do(f'CastLike({values}, scale)')}, {body.integers(-1, block)})")
    product = body.do(f"Mul({blocks}, {body.do(f'Reshape(scale, {body.integers(-1, 1)})')})")
    return body.do(f"Reshape({product}, {body.do(f'Shape({values})')})")


def _power_of_two() -> Function:
    body = Body()
    powers = tuple(2.0 ** (code - 127) for code in range(1, 255))
    index = body.do(f"Sub({body.cast('codes', _INT64)}, {body.integers(1)})")
    return Function("codes", body.do(f"Gather<axis = 0>({body.table(powers)}, {index})"), body)


_KINDS: dict[str, Callable[[Format], Function]] = {
    "QuantizeDequantize": _static,
    "TokenQuantizeDequantize": _by_token,
    "BlockQuantizeDequantize": _by_block,
    "BlockQuantize": _codes_and_scales,
    "Dequantize": _weight,
    "ScaleBlocks": _scale_blocks,
    "Unpack": _unpack,
}


def _own_scales(body: Body, rows: str, format: Format) -> tuple[str, str]:
    """Return a scale for each row of ``rows [..., n]`` from its own amax: as it is stored, and what codes are
    multiplied with.
    """
    amax = body.do(f"ReduceMax<keepdims = 1>({body.do(f'Abs({rows})')}, {body.integers(-1)})")
    if format.scale == "float16":
        ideal = body.do(f"Div({amax}, {body.number(format.largest)})")
        scale = _on_half_grid(body, body.clip(ideal, SMALLEST_SCALE, largest_scale(format.element)))
    elif format.scale == "e4m3":
        unit = body.do(f"Mul({body.number(format.largest)}, tensor_scale)")
        ideal = body.clip(body.do(f"Div({amax}, {unit})"), SMALLEST_E4M3, LARGEST_E4M3)
        scale = body.cast(body.cast(ideal, _E4M3), _FLOAT)
    else:
        scale = _power_below(body, amax)
        scale = body.do(f"Mul({scale}, {body.number(2.0**-format.element.largest_exponent)})")
        scale = body.clip(scale, SMALLEST_POWER, largest_power(format.element))
    some = body.do(f"Greater({amax}, {body.number(0.0)})")
    stored = body.do(f"Where({some}, {scale}, {body.number(1.0)})")
    return stored, body.do(f"Mul({stored}, tensor_scale)") if format.tensor_scale else stored


def _on_half_grid(body: Body, x: str) -> str:
    """Return what :func:`qdiff.formats.scales.to_half_grid` returns for positive numbers."""
    half, wide = (body.cast(body.cast(x, dtype), _FLOAT) for dtype in (_FLOAT16, _BFLOAT16))
    return body.do(f"Where({body.do(f'Greater({x}, {body.number(LARGEST_FLOAT16)})')}, {wide}, {half})")


def _power_below(body: Body, x: str) -> str:
    """Return 2^floor(log2 x) for x >= 0 (2^-127 and less for what is smaller than 2^-126)."""
    logarithm = body.do(f"Mul({body.do(f'Log({x})')}, {body.number(1.4426950408889634)})")
    exponent = body.clip(body.do(f"Floor({logarithm})"), -126.0, 127.0)
    index = body.cast(body.do(f"Add({exponent}, {body.number(126.0)})"), _INT64)
    powers = body.table(tuple(2.0 ** (place - 126) for place in range(254)))
    guess = body.do(f"Gather<axis = 0>({powers}, {index})")
    too_large = body.do(f"Greater({guess}, {x})")
    guess = body.do(f"Where({too_large}, {body.do(f'Mul({guess}, {body.number(0.5)})')}, {guess})")
    twice = body.do(f"Mul({guess}, {body.number(2.0)})")
    return body.do(f"Where({body.do(f'LessOrEqual({twice}, {x})')}, {twice}, {guess})")


def _on_grid(body: Body, ratio: str, element: Element) -> str:
    """Return what :func:`qdiff.formats.elements.round_to_grid` returns."""
    if element.kind == "integer":
        return body.clip(body.do(f"Round({ratio})"), element.lowest, element.highest)
    within = body.clip(ratio, element.lowest, element.highest)
    if element.name in _CASTS:
        return body.cast(body.cast(within, _CASTS[element.name]), _FLOAT)
    if element.mantissa_bits == 0:
        raise InputError(f"{element.name} has no mantissa: its ties have no ONNX form", "it is a format for studies")
    magnitude = body.do(f"Abs({within})")
    step = body.number(2.0 ** (element.smallest_exponent - element.mantissa_bits))
    for exponent in range(element.smallest_exponent + 1, element.largest_exponent + 1):
        above = body.do(f"GreaterOrEqual({magnitude}, {body.number(2.0**exponent)})")
        step = body.do(f"Where({above}, {body.number(2.0 ** (exponent - element.mantissa_bits))}, {step})")
    counts = body.do(f"Round({body.do(f'Div({within}, {step})')})")
    return body.do(f"Mul({counts}, {step})")
