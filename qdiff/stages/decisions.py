"""Where the decisions of ``qdiff quantize`` come from: a recipe's methods, a plan that a hand has edited, or a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdiff.files import write_json
from qdiff.stages.calibrate import options_of

if TYPE_CHECKING:
    from qdiff.artifacts import Run
    from qdiff.candidates import Candidates
    from qdiff.drafting import Draft
    from qdiff.mixing import Judge
    from qdiff.models.base import Model
    from qdiff.plan import Plan
    from qdiff.recipe import Recipe
    from qdiff.scratch import Scratch
    from qdiff.statistics import Statistics
    from qdiff.trajectory import Trajectory

ALLOCATION = "allocation.json"
PLAN_SEED = 20_000  # of the pictures that decide between plans: neither calibration's nor comparison's


class Decisions(Protocol):
    """One source."""

    @property
    def name(self) -> str:
        """Of the recipe."""
        ...

    def inputs(self) -> dict[str, Any]:
        """What the outputs depend on."""
        ...

    def draft(self, model: Model, statistics: Statistics) -> Draft:
        """What is known before the float model has run; refuses what cannot be carried out."""
        ...

    def apply(self, model: Model, drafted: Draft, trajectory: Trajectory, scratch: Scratch, work: Any) -> Plan:
        """Quantizes the model in place; further files go through ``work``."""
        ...


@dataclass(frozen=True)
class ByRecipe:
    """Decisions of a recipe's methods."""

    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.name

    def inputs(self) -> dict[str, Any]:
        return {"recipe": self.recipe.model_dump(mode="json")}

    def draft(self, model: Model, statistics: Statistics) -> Draft:
        from qdiff.drafting import draft

        return draft(model, self.recipe, statistics)

    def apply(self, model: Model, drafted: Draft, trajectory: Trajectory, scratch: Scratch, work: Any) -> Plan:
        from qdiff.quantize import carry_out

        return carry_out(model, self.recipe, drafted, trajectory, scratch)


@dataclass(frozen=True)
class ByPlan:
    """Decisions that stand in a plan. ``before`` are those that the run had until now."""

    plan: Plan
    before: Plan | None
    source: Path

    @property
    def name(self) -> str:
        return self.plan.recipe

    def inputs(self) -> dict[str, Any]:
        from qdiff.edited_plan import decisions

        return {"plan": decisions(self.plan)}

    def draft(self, model: Model, statistics: Statistics) -> Draft:
        from qdiff.drafting import Draft, change
        from qdiff.edited_plan import settle

        statistics = change(model, self.plan.structure, statistics)
        settled = settle(self.plan, model, statistics, self.before, self.source)
        return Draft(settled.structure, statistics, {layer.name: layer for layer in settled.layers})

    def apply(self, model: Model, drafted: Draft, trajectory: Trajectory, scratch: Scratch, work: Any) -> Plan:
        from qdiff.quantize import quantize_as_planned

        plan = self.plan.model_copy(update={"layers": list(drafted.entries.values())})
        return quantize_as_planned(model, plan, drafted.statistics)


@dataclass(frozen=True)
class ByBudget:
    """Formats by a solver that was given sensitivities and a budget; then, as :class:`ByRecipe`, each layer's methods."""

    recipe: Recipe
    run: Run

    @property
    def name(self) -> str:
        return self.recipe.name

    def inputs(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "sensitivity": self.run.outputs_hash("sensitivity") if self.run.done("sensitivity") else None,
            "members": [member and member.model_dump(mode="json") for member in self.recipe.members()],
        }

    def draft(self, model: Model, statistics: Statistics) -> Draft:
        from qdiff.drafting import Draft, entries_of, prepare

        structure, statistics = prepare(model, self.recipe, statistics)
        members = self.recipe.members()
        first = next(member for member in members if member is not None)
        entries = entries_of(model, first, statistics, lenient=True)
        assert self.recipe.mixed is not None
        why = f"{' or '.join(self.recipe.mixed.recipes)}, as the budget allows"
        open_entries = {
            name: entry.model_copy(update={"why": why}) if entry.quantized else entry for name, entry in entries.items()
        }
        return Draft(structure, statistics, open_entries)

    def apply(self, model: Model, drafted: Draft, trajectory: Trajectory, scratch: Scratch, work: Any) -> Plan:
        from qdiff.candidates import Candidates
        from qdiff.mixing import decide
        from qdiff.quantize import carry_out
        from qdiff.sensitivity import Sensitivity
        from qdiff.stages.sensitivity import TABLE

        assert self.recipe.mixed is not None
        table = Sensitivity.load(self.run.file(TABLE))
        candidates = Candidates(model, self.recipe, drafted.statistics)
        judge = None
        if count := self.recipe.mixed.pictures:
            lines = self.run.file("calibration", "prompts.txt").read_text(encoding="utf-8").splitlines()
            prompts = [lines[index % len(lines)] for index in range(count)]
            judge = judge_of(self.run, model, candidates, prompts, PLAN_SEED + options_of(self.run).seed)
        made = decide(self.recipe.mixed, model.family.name, candidates, table, judge)
        write_json(work.output(self.run.file(ALLOCATION)), made.to_json())
        taken = made.solutions[made.chosen]
        work.fact(budget={made.measure: made.budget}, cost=taken.cost)
        return carry_out(model, self.recipe, candidates.draft(drafted, made.choice), trajectory, scratch)


def judge_of(run: Run, model: Model, candidates: Candidates, prompts: list[str], seed: int) -> Judge:
    """Compares the pictures of the candidates' backbone with those of the float model, same prompts and seeds.

    Args:
        seed: of the first picture.
    """
    from dataclasses import replace

    from qdiff.engines.eager import ModuleRunner
    from qdiff.engines.pipeline import insert
    from qdiff.images import to_pixels
    from qdiff.metrics import paired
    from qdiff.models.base import Request

    calibrated = options_of(run)
    seeds = [seed + index for index in range(len(prompts))]
    request = Request(
        prompts, seeds, steps=calibrated.steps, guidance=calibrated.guidance, scheduler=calibrated.scheduler
    )
    names = [spec.name for spec in model.family.inputs(model.backbone.config)]  # type: ignore[arg-type]

    def make(backbone: Any) -> Any:
        images: list[Any] = []
        with insert(model.pipeline, model.family.backbone_attribute, ModuleRunner(backbone), names):
            for start in range(0, len(prompts), 8):
                part = slice(start, start + 8)
                images += model.generate(replace(request, prompts=prompts[part], seeds=seeds[part]))
        return to_pixels(images)

    expected = make(model.backbone)
    return lambda: paired(expected, make(candidates.backbone)).psnr_db_mean
