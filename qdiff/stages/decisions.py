"""Where the decisions of ``qdiff quantize`` come from: a recipe's methods, a plan that a hand has edited, or a budget of
formats or routes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdiff.events import log
from qdiff.files import sha256_json, write_json
from qdiff.recipes import members_of, versions_of
from qdiff.runs.partial import Scratch
from qdiff.stages.picture_scores import picture_errors_of, picture_score

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.allocation.candidates import Candidates
    from qdiff.allocation.mixed import Allocation
    from qdiff.allocation.sensitivity import Sensitivity
    from qdiff.plan.plan import Plan
    from qdiff.plan.recipe import Attention, Floors, Recipe
    from qdiff.quantization.layer_plans import Draft
    from qdiff.runs.stage_run import StageRun
    from qdiff.stages.calibrated_model import CalibratedModel

ALLOCATION, TABLE, ROUTING = "allocation.json", "sensitivity.json", "routing.json"
MEASURED = "calibration/sensitivity"  # what was measured for mixed recipes, by fingerprint


def read_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Return a recipe (:func:`qdiff.recipes.load_recipe`) that names only families and engines that there are.

    Raises:
        InputError: unknown, wrong, or of something that is not there.
    """
    from qdiff.engines import ENGINES
    from qdiff.models import FAMILIES
    from qdiff.recipes import load_recipe

    recipe = load_recipe(name, overrides)
    recipe.check_families(FAMILIES)
    recipe.check_device([name for name in ENGINES if ENGINES[name].target is not None])
    return recipe


@dataclass(frozen=True)
class ApplyContext:
    """What every source carries its decisions out with.

    Args:
        scratch: where finished parts are kept, so that a killed run goes on with the next.
        work: what further files go through.
        complete: as of :func:`qdiff.quantization.quantize.quantize_from_draft`; every source sees to it that it is called once.
    """

    scratch: Scratch
    work: StageRun
    complete: Callable[[], None]


class DecisionSource(Protocol):
    """One source."""

    @property
    def name(self) -> str:
        """Return the name of the recipe."""
        ...

    @property
    def attention(self) -> Attention | None:
        """Return how self-attentions are to be sparse, where a recipe says so."""
        ...

    @property
    def floors(self) -> Floors:
        """Return what quality may not fall below."""
        ...

    def inputs(self) -> dict[str, Any]:
        """Return what the outputs depend on."""
        ...

    def draft(self, calibrated: CalibratedModel) -> Draft:
        """Return what is known before the float model has run; refuse what cannot be carried out."""
        ...

    def apply(self, calibrated: CalibratedModel, drafted: Draft, context: ApplyContext) -> Plan:
        """Quantize the model in place and complete it."""
        ...


@dataclass(frozen=True)
class _OfRecipe:
    """What the sources that follow a recipe have in common."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def attention(self) -> Attention | None:
        return self.recipe.attention

    @property
    def floors(self) -> Floors:
        return self.recipe.floors


@dataclass(frozen=True)
class ByRecipe(_OfRecipe):
    """Decisions of a recipe's methods."""

    def inputs(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json")}

    def draft(self, calibrated: CalibratedModel) -> Draft:
        from qdiff.quantization.layer_plans import draft_plan

        return draft_plan(calibrated.model, self.recipe, calibrated.statistics)

    def apply(self, calibrated: CalibratedModel, drafted: Draft, context: ApplyContext) -> Plan:
        from qdiff.quantization.quantize import quantize_from_draft

        return quantize_from_draft(
            calibrated.model, self.recipe, drafted, calibrated.trajectory, context.scratch, context.complete
        )


@dataclass(frozen=True)
class ByPlan:
    """Decisions that stand in a plan. ``before`` are those that the run had until now, ``masks`` what its attention reads."""

    plan: Plan
    before: Plan | None
    source: Path
    masks: Tensor | None = None

    @property
    def name(self) -> str:
        return self.plan.recipe

    @property
    def attention(self) -> None:
        return None  # it stays as the plan has it

    @property
    def floors(self) -> Floors:
        from qdiff.plan.recipe import Floors

        return Floors()

    def inputs(self) -> dict[str, Any]:
        from qdiff.quantization.edited_plan import decisions

        return {"plan": decisions(self.plan)}

    def draft(self, calibrated: CalibratedModel) -> Draft:
        from qdiff.errors import InputError, command
        from qdiff.quantization.edited_plan import settle
        from qdiff.quantization.layer_plans import Draft, change

        if self.plan.structure.branches:
            raise InputError(
                f"{self.source} has blocks with several branches, and no plan by hand can",
                "change the routing of the recipe: "
                + command("quantize", "RUN", recipe="routed", settings=["routing.…"]),
            )
        statistics = change(calibrated.model, self.plan.structure, calibrated.statistics)
        settled = settle(self.plan, calibrated.model, statistics, self.before, self.source)
        return Draft(settled.structure, statistics, {layer.name: layer for layer in settled.layers})

    def apply(self, calibrated: CalibratedModel, drafted: Draft, context: ApplyContext) -> Plan:
        from qdiff.quantization.quantize import quantize_as_planned

        plan = self.plan.model_copy(update={"layers": list(drafted.entries.values())})
        plan = quantize_as_planned(calibrated.model, plan, drafted.statistics)
        context.complete()
        return plan


@dataclass(frozen=True)
class ByBudget(_OfRecipe):
    """Formats by a solver that is given sensitivities and a budget; then, as :class:`ByRecipe`, each layer's methods."""

    def inputs(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json"), **self.measured_inputs()}

    def measured_inputs(self) -> dict[str, Any]:
        """Return what sensitivities depend on besides the calibration: not the budget."""
        assert self.recipe.mixed is not None
        members = [member and member.model_dump(mode="json") for member in members_of(self.recipe)]
        shared = {
            name: getattr(self.recipe, name) for name in ("ignore", "storage_dtype", "split_shortcuts", "first_token")
        }
        measured = {name: getattr(self.recipe.mixed, name) for name in ("calls", "probes")}
        return {"members": members, "shared": shared, **measured}

    def draft(self, calibrated: CalibratedModel) -> Draft:
        from qdiff.allocation.mixed import check_wishes
        from qdiff.quantization.layer_plans import Draft, entries_of, prepare

        model = calibrated.model
        structure, statistics = prepare(model, self.recipe, calibrated.statistics)
        assert self.recipe.mixed is not None
        drafts = [entries_of(model, m, statistics, lenient=True) for m in members_of(self.recipe) if m is not None]
        check_wishes(self.recipe.mixed, model.family.name, drafts)
        entries = drafts[0]
        why = f"{' or '.join(self.recipe.mixed.recipes)}, as the budget allows"
        open_entries = {
            name: entry.model_copy(update={"why": why}) if entry.quantized else entry for name, entry in entries.items()
        }
        return Draft(structure, statistics, open_entries)

    def apply(self, calibrated: CalibratedModel, drafted: Draft, context: ApplyContext) -> Plan:
        from qdiff.quantization.quantize import quantize_from_draft

        # what was chosen from is let go before the model is made: it holds every layer in every format
        drafted, table, made = self._chosen(calibrated, drafted, context.scratch)
        plan = quantize_from_draft(
            calibrated.model, self.recipe, drafted, calibrated.trajectory, context.scratch, context.complete
        )
        # written last: a budget or a layer that is refused leaves an earlier quantization whole
        table.save(context.work.file(TABLE))
        write_json(context.work.file(ALLOCATION), made.to_json())
        taken = made.solutions[made.chosen]
        context.work.fact(budget={made.measure: made.budget}, cost=taken.cost, plan_psnr_db=taken.psnr_db)
        return plan

    def _chosen(
        self, calibrated: CalibratedModel, drafted: Draft, scratch: Scratch
    ) -> tuple[Draft, Sensitivity, Allocation]:
        from qdiff.allocation.candidates import Candidates
        from qdiff.allocation.mixed import Allocation

        candidates = Candidates(calibrated.model, self.recipe, drafted.statistics)
        table = measured(calibrated, candidates, self.measured_inputs())
        kept = scratch.load("allocation")  # a run that was killed goes on with the plan that it had chosen
        made = self._decided(calibrated, candidates, table) if kept is None else Allocation.from_json(kept[1])
        scratch.save("allocation", {}, made.to_json())
        return candidates.draft(drafted, made.choice), table, made

    def _decided(self, calibrated: CalibratedModel, candidates: Candidates, table: Sensitivity) -> Allocation:
        from qdiff.allocation.mixed import decide_formats

        assert self.recipe.mixed is not None
        score = None
        if count := self.recipe.mixed.pictures:
            score = picture_score(calibrated, candidates.backbone, count)
        branches = 2 if calibrated.guided else 1
        time = None
        if self.recipe.mixed.times_layers:
            from qdiff.stages.layer_times import LayerTimes

            assert self.recipe.mixed.device is not None
            time = LayerTimes(self.recipe.mixed.device)
        family = calibrated.model.family.name
        return decide_formats(self.recipe.mixed, family, candidates, table, score, branches, time)

    def check_size(self, packed: int) -> None:
        """Say when a checkpoint came out larger than a budget in bytes: the budget is kept by an estimate."""
        assert self.recipe.mixed is not None
        budget = self.recipe.mixed.budget.get("bytes")
        if budget is not None and packed > budget:
            log.warning("quantize: the checkpoint has %d bytes, the budget was %.0f: lower it a little", packed, budget)


@dataclass(frozen=True)
class ByRouting(_OfRecipe):
    """Blocks that change between recipes from step to step: the whole model by each recipe, then routes by a budget and
    pictures.
    """

    def inputs(self) -> dict[str, Any]:
        versions = [version.model_dump(mode="json") for version in versions_of(self.recipe)]
        return {"recipe": self.recipe.model_dump(mode="json"), "versions": versions}

    def draft(self, calibrated: CalibratedModel) -> Draft:
        from qdiff.errors import InputError, option
        from qdiff.quantization.layer_plans import draft_plan

        model = calibrated.model
        if not model.family.chain or not model.family.blocks(model.backbone):
            raise InputError(
                f"recipe {self.name!r} routes the blocks of a chain, and {model.family.title} is none",
                f"use {option('recipe', 'mixed')}, which chooses once for each layer",
            )
        return [draft_plan(model, version, calibrated.statistics) for version in versions_of(self.recipe)][0]

    def apply(self, calibrated: CalibratedModel, drafted: Draft, context: ApplyContext) -> Plan:
        from qdiff.allocation.quantize_routed import quantize_routed

        routing = self.recipe.routing
        assert routing is not None
        made = quantize_routed(
            calibrated.model,
            self.recipe,
            drafted.statistics,
            calibrated.trajectory,
            context.scratch,
            lambda backbone: picture_score(calibrated, backbone, routing.pictures),
            guided=calibrated.guided,
        )
        context.complete()
        write_json(context.work.file(ROUTING), made.decision.to_json())
        return made.plan


def measured(calibrated: CalibratedModel, candidates: Candidates, depends_on: dict[str, Any]) -> Sensitivity:
    """Return sensitivities, measured once for a calibration and the recipes that are chosen from; the budget does not
    matter.

    Finished groups and the whole table are kept beside the calibration, under the fingerprint of what they depend on.
    """
    from qdiff.allocation.sensitivity import Sensitivity, measure_sensitivity

    owner = sha256_json({"calibrate": calibrated.fingerprint, **depends_on})
    scratch = Scratch(calibrated.path / MEASURED / owner[:12], owner)
    found = scratch.load("table")
    if found is not None:
        return Sensitivity(**found[1])
    probes = depends_on["probes"]
    errors = picture_errors_of(calibrated, candidates.backbone, probes) if probes else None
    table = measure_sensitivity(
        calibrated.model, candidates, calibrated.trajectory, depends_on["calls"], scratch, errors
    )
    scratch.clear()
    scratch.save("table", {}, asdict(table))
    return table
