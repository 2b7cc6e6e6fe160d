"""``qdiff::sparse_attention`` in ONNX: a call of one of the functions of :mod:`qdiff.export.sparse_attention`.

The scale of the scores goes into the queries; in 16 bit its root into queries and keys, so that no product overflows, as in
:mod:`.attention`.
"""

from __future__ import annotations

import math

from qdiff.attention.lists import Tiling
from qdiff.attention.nodes import DOMAIN, WHOLE, AttentionNode
from qdiff.attention.numerics import numerics_named, require_exported
from qdiff.export.translations import Value, translates
from qdiff.export.translations.quantizers import call

_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}


def _call(
    q: Value,
    k: Value,
    v: Value,
    order: Value,
    blocks: Value,
    bounds: Value,
    first: int,
    tiling: Tiling,
    numerics: str,
    pairs: bool,
) -> Value:
    from onnxscript import opset23 as op

    require_exported(numerics_named(numerics))
    heads, size = int(order.shape[0]), int(v.shape[3])
    made = AttentionNode(WHOLE, numerics, pairs, heads, size, tiling, _DTYPES[v.dtype.name])
    start, end, axis = (op.Constant(value_ints=[value]) for value in (first, first + heads + 1, 0))
    return call(DOMAIN, made.name, [q, k, v, order, blocks, op.Slice(bounds, start, end, axis)], ["same"])


@translates("qdiff::sparse_attention", "onnxruntime")
def sparse_attention_on_cpu(
    q: Value,
    k: Value,
    v: Value,
    order: Value,
    blocks: Value,
    bounds: Value,
    first: int,
    text: int,
    block_q: int,
    block_k: int,
    numerics: str,
    scale: float,
) -> Value:
    """Translate :func:`qdiff.attention.operator.sparse_attention`; the arguments are the same."""
    from onnxscript import opset23 as op

    tiling = Tiling(text + int(order.shape[1]), text, block_q, block_k)
    scaled = op.Mul(q, op.CastLike(op.Constant(value_float=scale), q))
    return _call(scaled, k, v, order, blocks, bounds, first, tiling, numerics, pairs=False)


@translates("qdiff::sparse_attention", "tensorrt")
def sparse_attention(
    q: Value,
    k: Value,
    v: Value,
    order: Value,
    blocks: Value,
    bounds: Value,
    first: int,
    text: int,
    block_q: int,
    block_k: int,
    numerics: str,
    scale: float,
) -> Value:
    """Translate :func:`qdiff.attention.operator.sparse_attention`; the arguments are the same."""
    from onnxscript import opset23 as op

    tiling = Tiling(text + int(order.shape[1]), text, block_q, block_k)
    root = op.CastLike(op.Constant(value_float=math.sqrt(scale)), q)
    return _call(op.Mul(q, root), op.Mul(k, root), v, order, blocks, bounds, first, tiling, numerics, pairs=True)
