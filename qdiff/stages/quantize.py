"""Stage 2: decide and pack. The float model goes in, the plan and the quantized checkpoint come out.

What is decided comes from one of three sources (:mod:`qdiff.stages.decisions`): a recipe, whose methods look at the statistics, a
plan, in which a hand has written it down, or a budget. Everything else is the same for all.
"""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, QualityGateError, UsageError, option
from qdiff.files import read_json, save_tensors, write_json
from qdiff.runs.run import Run
from qdiff.stages.attention import STAGE as ATTENTION
from qdiff.stages.attention import decide_attention, require_statistics
from qdiff.stages.calibrated_model import CalibratedModel, calibrated_model
from qdiff.stages.decisions import ApplyContext, ByBudget, ByPlan, ByRecipe, ByRouting, DecisionSource, read_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.plan.attention_plan import AttentionPlan
    from qdiff.plan.plan import Plan
    from qdiff.runs.stage_run import StageRun

DEFAULT_RECIPE = "int8"
FLOAT_PREDICTIONS = "quantization/predictions.safetensors"  # of the float model, for the checks of later stages
SCRATCH = "quantization/blocks"  # finished blocks of a sequential recipe, until the stage is done
DECIDED = "quantization/plan.json"  # the plan as this stage wrote it: tells what a hand changed in plan.json since
CHECKED_STEPS = 50  # recorded calls on which the whole backbone is compared with float


def quantize(
    run: Run,
    recipe_name: str = DEFAULT_RECIPE,
    overrides: list[str] | None = None,
    *,
    plan_file: Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    accept_quality: bool = False,
) -> dict[str, Any]:
    """Write ``plan.json``, ``model.safetensors``, ``quantization.json`` and ``quantization/``.

    Args:
        run: with a finished calibration.
        recipe_name: of a built-in recipe, or path of a YAML file.
        overrides: entries of the recipe to change, each ``a.b=value``.
        plan_file: a plan whose decisions are taken in place of a recipe's; it may be the run's own ``plan.json``, edited.
        force: quantize anew what is there.
        dry_run: quantize nothing; return what is known before.
        accept_quality: whether a prediction below the recipe's floor is no error.

    Raises:
        UsageError: a plan and a recipe at once.
        InputError: a recipe or plan that cannot be carried out (:mod:`qdiff.plan.recipe`, :mod:`qdiff.quantization.edited_plan`).
        IntegrityError: the plan of another model.
        QualityGateError: the prediction at a recorded step is below ``floors.step`` of the recipe. The files are written.
    """
    decided = _source(run, recipe_name, overrides, plan_file)
    inputs = {"calibrate": run.outputs_hash("calibrate"), **decided.inputs()}
    if decided.attention is not None:
        require_statistics(run)
        inputs["attention"] = run.outputs_hash(ATTENTION)
    if dry_run:
        return {"dry_run": True, "run": str(run.path), **_draft(calibrated_model(run), decided)}
    with run.stage("quantize", inputs, force=force, leftovers=[SCRATCH], needs=["calibrate"]) as work:
        if work is not None:
            _work(calibrated_model(run), decided, work)
    if not accept_quality:
        _require_quality(run)
    return _summary(run)


def _source(run: Run, recipe_name: str, overrides: list[str] | None, plan_file: Path | None) -> DecisionSource:
    """Read the plan now: it may be the file that the work will overwrite."""
    if plan_file is None:
        recipe = read_recipe(recipe_name, overrides)
        if recipe.routing is not None:
            return ByRouting(recipe)
        return ByRecipe(recipe) if recipe.mixed is None else ByBudget(recipe)
    if overrides or recipe_name != DEFAULT_RECIPE:
        raise UsageError(
            f"{option('plan')} holds every decision already: {option('recipe')} and {option('settings')} have nothing to decide "
            "beside it",
            "give either a plan, or a recipe",
        )
    from qdiff.plan.plan import Plan
    from qdiff.quantization.edited_plan import read

    plan = read(plan_file)
    before = Plan.load(run.file(DECIDED)) if run.file(DECIDED).exists() else None
    masks = None
    if plan.attention is not None:
        from qdiff.attention.sparse import SIDECAR, load_masks

        sidecar = plan_file.parent / SIDECAR
        if not sidecar.exists():
            raise InputError(
                f"{plan_file} has sparse attention, and its masks ({SIDECAR}) do not lie beside it",
                f"copy {SIDECAR} from the run that the plan is of, too",
            )
        masks = load_masks(plan.attention, sidecar)
    return ByPlan(plan, before, plan_file, masks)


def _work(calibrated: CalibratedModel, decided: DecisionSource, work: StageRun) -> None:
    import torch

    from qdiff.quantization.checkpoint import save_quantized
    from qdiff.quantization.edited_plan import BY_HAND
    from qdiff.recording.magnitude import Magnitude
    from qdiff.resources import require_disk
    from qdiff.stages.disk import quantization_bytes

    model = calibrated.model
    needed = quantization_bytes(model, calibrated.trajectory_bytes)
    require_disk(calibrated.path, needed, "the quantized checkpoint")
    drafted = decided.draft(calibrated)  # what cannot be carried out is refused before the float model has run
    sparse = _attention(calibrated, decided)
    with Magnitude(model.backbone) as magnitude:
        expected = _predictions(calibrated)
    if not any(bool(prediction.any()) for _, prediction in expected):
        raise InputError("the float model predicts nothing but zeros", "are these the right weights?")
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    scratch = work.scratch(SCRATCH)

    def complete() -> None:
        if sparse is not None:
            from qdiff.attention.sparse import install, schedule_of

            install(model.family, model.backbone, sparse[0], schedule_of(*sparse))

    plan = decided.apply(calibrated, drafted, ApplyContext(scratch, work, complete))
    if sparse is not None:
        from qdiff.attention.sparse import SIDECAR, save_masks

        plan = plan.model_copy(update={"attention": sparse[0]})
        save_masks(sparse[1], work.file(SIDECAR))
    errors = _errors(expected, _predictions(calibrated))
    _refuse_idle(plan, errors)
    plan.save(work.file("plan.json"))
    plan.save(work.file(DECIDED))
    checkpoint = work.file("model.safetensors")
    save_quantized(model.backbone, plan, checkpoint)
    predictions = torch.stack([prediction for _, prediction in expected])
    save_tensors(work.file(FLOAT_PREDICTIONS), {"predictions": predictions})
    write_json(work.file("quantization.json"), {"timesteps": errors})
    packed = checkpoint.stat().st_size
    if isinstance(decided, ByBudget):
        decided.check_size(packed)
    work.fact(
        recipe=plan.recipe,
        device=str(model.device),
        parameters=parameters,
        quantized_layers=len(plan.quantized),
        kept_layers=len(plan.layers) - len(plan.quantized),
        layers_by_hand=sum(layer.why.startswith(BY_HAND) for layer in plan.layers),
        float32_bytes=4 * parameters,
        packed_bytes=packed,
        largest_value=magnitude.largest if math.isfinite(magnitude.largest) else None,
        floors=decided.floors.model_dump(),
        worst_sqnr_db=min(error["sqnr_db"] for error in errors),
        density=plan.attention and plan.attention.density,
        overall_density=plan.attention and plan.attention.overall,
    )
    scratch.clear()


def _attention(calibrated: CalibratedModel, decided: DecisionSource) -> tuple[AttentionPlan, Tensor] | None:
    """Return the plan and the masks of sparse attention: by a recipe's wish, or as an edited plan has them."""
    if decided.attention is not None:
        return decide_attention(calibrated, decided.attention)
    if isinstance(decided, ByPlan) and decided.plan.attention is not None and decided.masks is not None:
        return decided.plan.attention, decided.masks
    return None


def _predictions(calibrated: CalibratedModel) -> list[tuple[float, Tensor]]:
    """Return the prediction of the backbone, as it now is, at every recorded call of the first shard."""
    import torch

    from qdiff.routing.follow import predict

    model = calibrated.model
    with torch.inference_mode():
        return [
            (step.timestep, predict(model.family, model.backbone, step.inputs))
            for step in islice(calibrated.trajectory.steps(0), CHECKED_STEPS)
        ]


def _errors(expected: list[tuple[float, Tensor]], got: list[tuple[float, Tensor]]) -> list[dict[str, float]]:
    from qdiff.evaluation.metrics import cosine, decibels, sqnr_db

    return [
        {
            "timestep": timestep,
            "sqnr_db": decibels(sqnr_db(reference, prediction)),
            "cosine": cosine(reference, prediction),
        }
        for (timestep, reference), (_, prediction) in zip(expected, got, strict=True)
    ]


def _refuse_idle(plan: Plan, errors: list[dict[str, float]]) -> None:
    """Refuse a quantized model that equals the float model: its quantizers are off."""
    from qdiff.evaluation.metrics import DB_CAP

    if plan.quantized and any(error["sqnr_db"] >= DB_CAP for error in errors):
        raise RuntimeError("the quantized model's output equals the float model's: its quantizers are off")


def floor_of(run: Run, name: str) -> float:
    """Return a floor in dB (:class:`qdiff.plan.recipe.Floors`) of the recipe that a run was quantized by."""
    from qdiff.plan.recipe import Floors

    return float((run.entry("quantize").get("floors") or Floors().model_dump())[name])


def _require_quality(run: Run) -> None:
    floor = floor_of(run, "step")
    steps = read_json(run.file("quantization.json"), "the errors of quantization")["timesteps"]
    below = [step for step in steps if not step["sqnr_db"] >= floor]
    if below:
        worst = min(below, key=lambda step: step["sqnr_db"])
        raise QualityGateError(
            f"the quantized model's prediction at timestep {worst['timestep']:g} is {worst['sqnr_db']:.1f} dB from float "
            f"({len(below)} of {len(steps)} recorded calls are below the floor of {floor:g} dB)",
            f"see the layers' sqnr_db in {run.file('plan.json')}, and keep the worst (recipe: ignore) or give them more bits; "
            f"or take it as it is with {option('accept_quality', True)}",
        )


def _summary(run: Run) -> dict[str, Any]:
    entry = run.entry("quantize")
    names = (
        "recipe",
        "quantized_layers",
        "kept_layers",
        "layers_by_hand",
        "float32_bytes",
        "packed_bytes",
        "worst_sqnr_db",
        "density",
        "overall_density",
        "budget",
        "cost",
        "plan_psnr_db",
        "seconds",
        "peak_memory_bytes",
    )
    return {"run": str(run.path), "plan": str(run.file("plan.json")), **{name: entry.get(name) for name in names}}


def _draft(calibrated: CalibratedModel, decided: DecisionSource) -> dict[str, Any]:
    """Return the formats and bytes of every layer; nothing that only the work can decide."""
    sparse = _attention(calibrated, decided)
    rows = [
        {
            "name": entry.name,
            "weights": entry.weights,
            "activations": entry.activations,
            "bytes_float": 4 * math.prod(entry.shape),
            "bytes": entry.weight_bytes(),
            "why": entry.why or f"group {entry.group}",
        }
        for entry in decided.draft(calibrated).entries.values()
    ]
    attention = sparse and sparse[0]
    return {
        "recipe": decided.name,
        "density": attention and attention.density,
        "overall_density": attention and attention.overall,
        "layers": rows,
    }
