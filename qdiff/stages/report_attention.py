"""What the report says about sparse attention: from the plan and the masks beside it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qdiff.runs.run import Run

if TYPE_CHECKING:
    from pathlib import Path

    from qdiff.plan.attention_plan import AttentionPlan
    from qdiff.report.page import AttentionResult

PICTURE = "attention.png"


def attention_result(plan: AttentionPlan) -> AttentionResult:
    """Return density, recall and error of every head."""
    from qdiff.report.page import AttentionResult, HeadResult

    edges = [*plan.edges, 0.0]
    groups = [f"{high:.2f} to {low:.2f}" for high, low in zip(edges, edges[1:], strict=False)]
    heads = [
        HeadResult(
            layer.name,
            number,
            head.order,
            head.density,
            head.recall,
            [-10 * math.log10(max(error, 1e-10)) for error in head.error],
        )
        for layer in plan.layers
        for number, head in enumerate(layer.heads)
    ]
    tokens = plan.tokens - plan.text
    blocks = (-(-tokens // plan.block_q), -(-tokens // plan.block_k))
    return AttentionResult(plan.numerics, plan.density, plan.overall, blocks, plan.block_k, groups, heads, PICTURE)


def draw(run: Run, plan: AttentionPlan) -> Path:
    """Write the picture of the masks into the run folder."""
    from qdiff.attention.drawing import draw_masks
    from qdiff.attention.sparse import SIDECAR, load_masks
    from qdiff.files import write_atomically

    picture, path = draw_masks(load_masks(plan, run.file(SIDECAR))), run.file(PICTURE)
    write_atomically(path, lambda file: picture.save(file, format="PNG", optimize=True))
    return path
