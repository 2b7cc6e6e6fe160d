"""From sensitivities and a budget to a format for every group: costs, the solver's best few, and pictures that decide.

Sums of single layers' errors predict the error of a plan well but not perfectly, and a change of the prediction is not yet a
worse picture. So the solver is asked several times, by every table of
:meth:`qdiff.allocation.sensitivity.Sensitivity.tables`, for its best few each time, and the plan whose pictures come
closest to the float model's is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.allocation import knapsack
from qdiff.allocation.candidates import Candidates
from qdiff.allocation.costs import milliseconds
from qdiff.allocation.sensitivity import Sensitivity
from qdiff.errors import InputError
from qdiff.events import Progress
from qdiff.formats.table import FORMATS
from qdiff.plan.devices import device_named
from qdiff.plan.plan import LayerPlan
from qdiff.plan.recipe import Mixed, match

HEADER_BYTES = 100  # what safetensors' header spends on one tensor, about
FRONTIER = 7  # budgets between the cheapest and the dearest plan that are drawn

Time = Callable[[nn.Module, LayerPlan, list[int]], float]  # milliseconds of a layer on an input of that shape
PictureScore = Callable[[], float]  # mean PSNR in dB of the pictures that the candidates' backbone makes now


@dataclass
class Solution:
    """One plan that was looked at.

    Args:
        weighting: name of the table that it was solved with, or of a uniform plan.
        formats: of every group, as an index.
        cost: in the budget's unit.
        error: sum of the groups' errors, all timesteps alike.
        psnr_db: of its pictures, or ``None`` where none were made.
    """

    weighting: str
    formats: list[int]
    cost: float
    error: float
    psnr_db: float | None = None


@dataclass
class Allocation:
    """What was looked at and what was taken, as JSON values.

    Args:
        measure, budget: the budget's unit and size; ``device`` for which milliseconds are reckoned, or on which they were
            ``measured``.
        solutions: within the budget; ``chosen`` is the index of the one that was taken.
        uniform: every recipe alone.
        frontier: the solver's first solution at other budgets.
    """

    measure: str
    budget: float
    device: str | None
    measured: bool
    groups: list[str]
    formats: list[str]
    chosen: int = 0
    solutions: list[Solution] = field(default_factory=list)
    uniform: list[Solution] = field(default_factory=list)
    frontier: list[Solution] = field(default_factory=list)

    @property
    def choice(self) -> dict[str, int]:
        """Return the format of every group, as an index."""
        return dict(zip(self.groups, self.solutions[self.chosen].formats, strict=True))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Allocation:
        """Return what :meth:`to_json` gave."""
        lists = {name: [Solution(**one) for one in value[name]] for name in ("solutions", "uniform", "frontier")}
        return cls(**{**value, **lists})

    def to_json(self) -> dict[str, object]:
        """Return the allocation as JSON values."""
        return asdict(self)


def decide_formats(
    mixed: Mixed,
    family: str,
    candidates: Candidates,
    sensitivity: Sensitivity,
    score: PictureScore | None,
    branches: int = 1,
    time: Time | None = None,
) -> Allocation:
    """Solve the allocation, look at the plans, and take one.

    Args:
        mixed: what the recipe asks for.
        family: whose minimum formats hold.
        candidates: the formats that every group can have.
        sensitivity: what each group loses in each format.
        score: called with a plan put into the candidates' backbone; ``None``: the solver's first solution is taken unseen.
        branches: samples that one picture puts into a call: 2 with guidance.
        time: measures a layer, for a budget of milliseconds on a device without published rates.

    Raises:
        InputError: a budget that no plan meets, a pattern of ``minimum`` that matches nothing, an unknown device.
    """
    (measure, budget), *_ = mixed.budget.items()
    costs, fixed = costs_of(measure, candidates, sensitivity, mixed.device, branches, time)
    allowed = _allowed(mixed, family, candidates)
    made = Allocation(measure, budget, mixed.device, time is not None, list(candidates.groups), candidates.names)
    measured = sensitivity.table()
    errors = measured.masked_fill(~allowed, math.inf)

    def solution_of(weighting: str, choice: Tensor) -> Solution:
        return Solution(
            weighting,
            choice.tolist(),
            fixed + knapsack.total(costs, choice),
            knapsack.total(measured, choice),
        )

    seen: set[tuple[int, ...]] = set()
    for weighting, table in sensitivity.tables().items():
        table = table.masked_fill(~allowed, math.inf)
        for choice in knapsack.best(table, costs, budget - fixed, mixed.best if score else 1, fixed):
            if tuple(choice.tolist()) not in seen:
                seen.add(tuple(choice.tolist()))
                made.solutions.append(solution_of(weighting, choice))
        if score is None:
            break
    for format, name in enumerate(candidates.names):
        choice = torch.full((len(costs),), format)
        if bool(measured.gather(1, choice[:, None]).isfinite().all()):
            made.uniform.append(solution_of(name, choice))
    if score is None:
        return made
    least, most = knapsack.cheapest(errors, costs), knapsack.total(costs, errors.argmin(dim=1))
    for share in torch.linspace(0, 1, FRONTIER).tolist():
        within = least + share * (most - least)
        made.frontier.append(solution_of("even", knapsack.allocate(errors, costs, within)))
    everything = [*made.solutions, *made.uniform, *made.frontier]
    with Progress("pictures of plans", len(everything)) as progress:
        known: dict[tuple[int, ...], float] = {}
        for solution in everything:
            key = tuple(solution.formats)
            if key not in known:
                candidates.put_all(solution.formats)
                known[key] = score()
            solution.psnr_db = known[key]
            progress.advance()
    made.chosen = max(range(len(made.solutions)), key=lambda index: made.solutions[index].psnr_db or 0.0)
    return made


def costs_of(
    measure: str,
    candidates: Candidates,
    sensitivity: Sensitivity,
    device: str | None,
    branches: int = 1,
    time: Time | None = None,
) -> tuple[Tensor, float]:
    """Return costs ``[group, format]`` in the budget's unit, float64, and what everything else costs besides."""
    costs = torch.zeros(len(candidates.groups), len(candidates.names), dtype=torch.float64)
    weights = sum(_elements(candidates.entries_of(layer)) for layers in candidates.groups.values() for layer in layers)
    rates = device_named(device) if measure == "latency" and device is not None and time is None else None
    for row, (group, layers) in enumerate(candidates.groups.items()):
        for format, possible in enumerate(candidates.possible(group)):
            for layer in layers if possible else ():
                entry = candidates.entries[format][layer]
                if measure == "bits":
                    costs[row, format] += entry.weight_bits() * _elements(entry) / weights
                elif measure == "bytes":
                    costs[row, format] += _stored(candidates, layer, format)
                elif time is not None:
                    shape = [branches, *sensitivity.shapes[row]]
                    costs[row, format] += time(candidates.module(layer, format), entry, shape)
                else:
                    assert rates is not None  # a budget of milliseconds names its device
                    costs[row, format] += milliseconds(entry, branches * sensitivity.tokens[row], rates)
    return costs, _rest(candidates) if measure == "bytes" else 0.0


def _elements(entry: LayerPlan) -> int:
    return math.prod(entry.shape)


def _stored(candidates: Candidates, layer: str, format: int) -> int:
    """Return bytes of a layer in the checkpoint."""
    module, entry = candidates.module(layer, format), candidates.entries[format][layer]
    if not entry.quantized:
        return FORMATS[entry.weights].bits // 8 * _elements(entry) + 4 * entry.shape[0] * entry.bias + 2 * HEADER_BYTES
    tensors = module.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() + HEADER_BYTES for tensor in tensors)


def _rest(candidates: Candidates) -> float:
    """Return bytes of everything in the checkpoint that no format is chosen for."""
    chosen = {layer for layers in candidates.groups.values() for layer in layers}
    rest = 0
    for name, parameter in candidates.backbone.named_parameters():
        if name.rpartition(".")[0] not in chosen:
            rest += 2 * parameter.numel() + HEADER_BYTES
    return float(rest)


def _allowed(mixed: Mixed, family: str, candidates: Candidates) -> Tensor:
    """Return which formats ``minimum`` leaves: bool ``[group, format]``."""
    allowed = torch.ones(len(candidates.groups), len(candidates.names), dtype=torch.bool)
    for pattern, name in mixed.minimum.get(family, {}).items():
        names = [layer for layers in candidates.groups.values() for layer in layers]
        hits = match("the mixed.minimum", [pattern], family, names)
        least = mixed.recipes.index(name)
        for row, layers in enumerate(candidates.groups.values()):
            if hits.keys().isdisjoint(layers):
                continue
            bits = [_bits(candidates, layers, format) for format in range(len(candidates.names))]
            allowed[row] &= torch.tensor([each >= bits[least] for each in bits])
    return allowed


def _bits(candidates: Candidates, layers: list[str], format: int) -> float:
    """Return bits of a group's weights in a format; 0 where it cannot have it."""
    entries = candidates.entries[format]
    return sum(entries[layer].weight_bits() * _elements(entries[layer]) for layer in layers if layer in entries)


def check_wishes(mixed: Mixed, family: str, drafts: list[dict[str, LayerPlan]]) -> None:
    """Refuse what no measurement can make possible, before one is begun.

    Args:
        mixed: what the recipe asks for.
        family: name of the model's family.
        drafts: what each recipe of the list alone says about every layer.

    Raises:
        InputError: a pattern of ``minimum`` that matches no layer that can be quantized, or a budget of fewer bits than the
            cheapest formats have.
    """
    chosen_for = [name for name in drafts[0] if any(draft[name].quantized for draft in drafts)]
    match("the mixed.minimum", list(mixed.minimum.get(family, {})), family, chosen_for)
    least = weights = 0.0
    for name in chosen_for:
        entries = [draft[name] for draft in drafts if draft[name].quantized]
        least += min(entry.weight_bits() for entry in entries) * _elements(entries[0])
        weights += _elements(entries[0])
    if weights and mixed.budget.get("bits", math.inf) < least / weights * (1 - 1e-9):
        raise InputError(
            f"the budget of {mixed.budget['bits']:g} bits is below {least / weights:.4g}, what the cheapest formats come to",
            "raise the budget, or allow cheaper formats",
        )
