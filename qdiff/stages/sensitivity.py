"""Stage 2a, of mixed recipes alone: what every group of layers costs in quality in every format.

It does not depend on the budget, so other budgets are tried without measuring again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdiff.artifacts import Run
from qdiff.files import sha256_json
from qdiff.scratch import Scratch
from qdiff.stages.calibrate import reload_model

if TYPE_CHECKING:
    from qdiff.recipe import Recipe

TABLE = "sensitivity.json"
SCRATCH = "calibration/sensitivity"  # finished groups, until the stage is done


def sensitivity(run: Run, recipe: Recipe, *, force: bool = False) -> None:
    """Writes ``sensitivity.json`` for a mixed recipe.

    Raises:
        InputError: recipes that cannot be carried out (:mod:`qdiff.drafting`), or a group that can have none of the formats.
    """
    assert recipe.mixed is not None
    inputs = {
        "calibrate": run.outputs_hash("calibrate"),
        "calls": recipe.mixed.calls,
        "recipes": [
            {"name": name, "recipe": None if member is None else member.model_dump(mode="json")}
            for name, member in zip(recipe.mixed.recipes, recipe.members(), strict=True)
        ],
        "ignore": recipe.ignore,
        "kept": recipe.kept,
    }
    with run.stage("sensitivity", inputs, force=force, replace=True, leftovers=[SCRATCH]) as work:
        if work is not None:
            run.verify("calibrate")
            owner = sha256_json(inputs)
            _work(run, recipe, work, Scratch(run.file(SCRATCH, owner[:12]), owner))


def _work(run: Run, recipe: Recipe, work: Any, scratch: Scratch) -> None:
    from qdiff.candidates import Candidates
    from qdiff.drafting import prepare
    from qdiff.sensitivity import measure
    from qdiff.statistics import Statistics
    from qdiff.trajectory import Trajectory

    assert recipe.mixed is not None
    model = reload_model(run)
    _, statistics = prepare(model, recipe, Statistics.load(run.file("calibration", "statistics.safetensors")))
    candidates = Candidates(model, recipe, statistics)
    found = measure(model, candidates, Trajectory(run.file("calibration")), recipe.mixed.calls, scratch)
    found.save(work.output(run.file(TABLE)))
    work.fact(groups=len(found.groups), formats=found.formats, calls=len(found.timesteps))
    scratch.clear()
