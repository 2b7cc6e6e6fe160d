"""What the report says about routes: from the plan and what was tried on the way to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.files import read_json
from qdiff.runs.run import Run
from qdiff.stages.decisions import ROUTING

if TYPE_CHECKING:
    from qdiff.plan.plan import Plan
    from qdiff.report.data import RoutingResult


def routing_result(run: Run, plan: Plan) -> RoutingResult | None:
    """Return how precision changes with the step, of runs with a routed recipe."""
    from qdiff.report.data import RoutesResult, RoutingResult

    if ROUTING not in run.entry("quantize")["outputs"]:
        return None
    made, routing = read_json(run.file(ROUTING), "the routes"), plan.routing
    tried = [
        RoutesResult(one["name"], kind, one["used_bits"], one["psnr_db"], one["skipped"])
        for kind, rows in (("rule", "rules"), ("uniform", "uniform"), ("reuse", "reuse"))
        for one in made[rows]
    ]
    return RoutingResult(
        made["recipes"],
        made["blocks"],
        made["chosen"],
        [timestep for timestep, _ in made["history"]],
        [routes for _, routes in made["history"]],
        tried,
        made["final"]["used_bits"],
        None if routing is None else routing.used_activation_bits,
        None if routing is None else routing.resident_bits,
        made["final"]["skipped"],
        {block: value for block, value in made["r2"].items() if value is not None},
    )
