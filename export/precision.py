"""In which precision a graph computes what is not quantized: the target's, unless the model's values do not fit into it."""

from __future__ import annotations

from dataclasses import replace

from qdiff.events import log
from qdiff.export.translations import Target
from qdiff.formats.scales import LARGEST_FLOAT16


def fitting_target(target: Target, largest: float | None) -> Target:
    """Return the target with a ``compute`` that holds the model's values: float32 in place of float16 beyond 65,504.

    Float32 and not bfloat16: residual streams that grow so far are sums of parts that differ by orders of magnitude, of which
    bfloat16's 8 bits would keep the largest alone.

    Args:
        target: as registered.
        largest: the largest magnitude that the float model was seen to compute; ``None``: not known, the target's stays.
    """
    if target.compute != "float16" or largest is None or largest <= LARGEST_FLOAT16:
        return target
    log.info("export: values reach %.2g, beyond float16: the graph for %s computes in float32", largest, target.title)
    return replace(target, compute="float32")
