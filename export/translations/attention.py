"""Attention as MatMul, Softmax, MatMul.

ONNX has an Attention operator (opset 23), but ONNX Runtime's CPU kernel refuses a mask that broadcasts over the queries,
which is what every text mask is. The three-node form runs everywhere, and OpenVINO and TensorRT recognise and fuse it.

Where the scale goes depends on who runs it. In 16 bit it is split over q and k, as torch's own decomposition does, so that no
product overflows. On a CPU it is applied to the scores: a multiplication between k's DequantizeLinear and the MatMul would
keep OpenVINO from multiplying q and k in INT8.
"""

from __future__ import annotations

import math

from qdiff.export.translations import Value, translates


def _scale(query: Value, scale: float | None) -> float:
    return scale if scale is not None else 1 / math.sqrt(query.shape[-1])


def _constant(value: float, like: Value) -> Value:
    from onnxscript import opset23 as op

    return op.CastLike(op.Constant(value_float=value), like)


def _attend(scores: Value, mask: Value | None, value: Value) -> Value:
    from onnxscript import opset23 as op

    return op.MatMul(op.Softmax(scores if mask is None else op.Add(scores, mask), axis=-1), value)


def _plain_only(is_causal: bool, enable_gqa: bool, dropout_p: float) -> None:
    if is_causal or enable_gqa or dropout_p:
        raise NotImplementedError("diffusion backbones use neither causal nor grouped attention, nor dropout")


@translates("aten::scaled_dot_product_attention", "onnxruntime")
def attention_scaling_scores(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Return ``softmax((q kᵀ) * scale + mask) v`` for ``[batch, heads, tokens, size]``; the mask is additive and
    broadcasts.
    """
    from onnxscript import opset23 as op

    _plain_only(is_causal, enable_gqa, dropout_p)
    scores = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    return _attend(op.Mul(scores, _constant(_scale(query, scale), query)), attn_mask, value)


@translates("aten::scaled_dot_product_attention", "tensorrt")
def attention_scaling_inputs(
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """Return ``softmax((q √scale) (k √scale)ᵀ + mask) v``; shapes as above."""
    from onnxscript import opset23 as op

    _plain_only(is_causal, enable_gqa, dropout_p)
    root = _constant(math.sqrt(_scale(query, scale)), query)
    scores = op.MatMul(op.Mul(query, root), op.Transpose(op.Mul(key, root), perm=[0, 1, 3, 2]))
    return _attend(scores, attn_mask, value)
