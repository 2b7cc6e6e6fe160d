"""``qdiff::choose`` in ONNX: a call that :mod:`qdiff.export.branches` makes an ``If`` of before the file is written; and
``qdiff::shaped_like``, a Reshape.
"""

from __future__ import annotations

from collections.abc import Sequence

from qdiff.export.branches import CHOOSE
from qdiff.export.function_text import DOMAIN
from qdiff.export.translations import Value, translates
from qdiff.export.translations.quantizers import call


@translates("qdiff::choose", "onnxruntime", "tensorrt")
def choose(which: Value, alternatives: Sequence[Value]) -> Value:
    """Translate :func:`qdiff.routing.ops.choose`; the arguments are the same."""
    return call(DOMAIN, f"{CHOOSE}{len(alternatives)}", [which, *alternatives], ["T1"])


@translates("qdiff::shaped_like", "onnxruntime", "tensorrt")
def shaped_like(x: Value, reference: Value) -> Value:
    """Translate :func:`qdiff.routing.ops.shaped_like`; the arguments are the same."""
    from onnxscript import opset23 as op

    return op.Reshape(x, op.Shape(reference))
