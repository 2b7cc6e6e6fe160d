"""The buffers of a quantized layer (:class:`qdiff.nn.quant_linear.QuantLinear`), from what was decided about its group."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.formats import scales
from qdiff.formats.table import format_named
from qdiff.methods import Problem, Solution
from qdiff.plan.plan import Kept, LayerPlan


def buffers_of(
    problem: Problem, solution: Solution, index: int, bias: Tensor | None, kept: Kept
) -> dict[str, Tensor | None]:
    """Return the buffers of a group's layer ``index`` (:class:`qdiff.nn.quant_linear.QuantLinear`), but for its output's
    scale."""
    storage = getattr(torch, kept)
    weight = problem.quantized_weights(solution)[index]
    scale, stretch = problem.activation_scale(solution)
    given = problem.biases(solution)[index]
    bias = None if bias is None else bias.detach().float()
    total = given if bias is None else bias if given is None else bias + given
    down, up = (None, None) if solution.low_rank is None else solution.low_rank[index]
    return {
        "codes": weight.packed(),
        "scale": weight.scale,
        "tensor_scale": weight.tensor_scale,
        "bias": None if total is None else scales.to_storage(total, kept).float(),
        "input_scale": scale,
        "multiplier": None if solution.multiplier is None else solution.multiplier[:: problem.taps],
        "shift": solution.shift,
        "rotation": None if solution.rotation is None else solution.rotation.last,
        "outlier_rotation": None if solution.rotation is None else solution.rotation.first,
        "outlier_order": None if solution.rotation is None else solution.rotation.order,
        "down": None if down is None else down.to(storage),
        "up": None if up is None else up.to(storage),
        "timestep_scale": stretch,
    }


def output_scale(amax: Tensor, plan: LayerPlan) -> Tensor | None:
    """The constant scale of a layer's output from its ranges by timestep ``[T]``; ``None`` when the output stays float."""
    return None if plan.output is None else scales.choose_scale(amax.max(), format_named(plan.output))
