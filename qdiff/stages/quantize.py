"""Stage 2: decide and pack. The float model goes in, the plan and the quantized checkpoint come out."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

from qdiff.artifacts import Run
from qdiff.files import save_tensors, sha256_json, write_json
from qdiff.stages.calibrate import reload_model

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.models.base import Model
    from qdiff.plan import Plan
    from qdiff.trajectory import Trajectory

FLOAT_PREDICTIONS = "calibration/predictions.safetensors"  # of the float model, for the checks of later stages
CHECKED_STEPS = 50  # recorded calls on which the whole backbone is compared with float


def quantize(
    run: Run,
    recipe_name: str = "int8",
    overrides: list[str] | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Writes ``plan.json``, ``model.safetensors`` and ``quantization.json``."""
    from qdiff.recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides)
    inputs = {"calibrate": run.outputs_hash("calibrate"), "recipe": recipe.model_dump(mode="json")}
    if dry_run:
        return _dry_run(run, recipe)
    with run.stage("quantize", inputs, force=force) as work:
        if work is not None:
            run.verify("calibrate")
            _work(run, recipe, work)
    return _summary(run)


def _work(run: Run, recipe: Any, work: Any) -> None:
    import torch

    from qdiff.quantize import quantize, save_quantized
    from qdiff.statistics import Statistics
    from qdiff.trajectory import Trajectory

    model = reload_model(run)
    trajectory = Trajectory(run.file("calibration"))
    expected = _predictions(model, trajectory)
    parameters = sum(parameter.numel() for parameter in model.backbone.parameters())
    float_bytes = sum(parameter.numel() * 4 for parameter in model.backbone.parameters())
    plan = quantize(model, recipe, Statistics.load(run.file("calibration", "statistics.safetensors")))
    errors = _errors(expected, _predictions(model, trajectory))
    _refuse_idle(plan, errors)
    plan.save(work.output(run.file("plan.json")))
    save_quantized(model.backbone, plan, work.output(run.file("model.safetensors")))
    predictions = torch.stack([prediction for _, prediction in expected])
    save_tensors(work.output(run.file(FLOAT_PREDICTIONS)), {"predictions": predictions})
    write_json(work.output(run.file("quantization.json")), {"timesteps": errors})
    packed = run.file("model.safetensors").stat().st_size
    work.fact(
        recipe=recipe.name,
        recipe_sha256=sha256_json(recipe.model_dump(mode="json")),
        parameters=parameters,
        quantized_layers=len(plan.quantized),
        kept_layers=len(plan.layers) - len(plan.quantized),
        float32_bytes=float_bytes,
        packed_bytes=packed,
        worst_sqnr_db=min(error["sqnr_db"] for error in errors),
    )


def _predictions(model: Model, trajectory: Trajectory) -> list[tuple[float, Tensor]]:
    import torch

    with torch.inference_mode():
        return [
            (step.timestep, model.family.call(model.backbone, step.inputs))
            for step in islice(trajectory.steps(0), CHECKED_STEPS)
        ]


def _errors(expected: list[tuple[float, Tensor]], got: list[tuple[float, Tensor]]) -> list[dict[str, float]]:
    from qdiff.metrics import cosine, decibels, sqnr_db

    return [
        {
            "timestep": timestep,
            "sqnr_db": decibels(sqnr_db(reference, prediction)),
            "cosine": cosine(reference, prediction),
        }
        for (timestep, reference), (_, prediction) in zip(expected, got, strict=True)
    ]


def _refuse_idle(plan: Plan, errors: list[dict[str, float]]) -> None:
    """A quantized model that equals the float model is one whose quantizers are off."""
    from qdiff.metrics import DB_CAP

    if plan.quantized and any(error["sqnr_db"] >= DB_CAP for error in errors):
        raise RuntimeError("the quantized model's output equals the float model's: its quantizers are off")


def _summary(run: Run) -> dict[str, Any]:
    entry = run.entry("quantize")
    names = (
        "recipe",
        "quantized_layers",
        "kept_layers",
        "float32_bytes",
        "packed_bytes",
        "worst_sqnr_db",
        "seconds",
        "peak_memory_bytes",
    )
    return {"run": str(run.path), "plan": str(run.file("plan.json")), **{name: entry[name] for name in names}}


def _dry_run(run: Run, recipe: Any) -> dict[str, Any]:
    """Formats and bytes of every layer, without deciding smoothing or scales."""
    from qdiff.plan import LayerPlan
    from qdiff.statistics import Statistics

    model = reload_model(run)
    statistics = Statistics.load(run.file("calibration", "statistics.safetensors"))
    groups = {name: group for group, entry in statistics.inputs.items() for name in entry.layers}
    ignored = recipe.ignored(model.family.name, list(groups))
    rows = []
    for name, group in groups.items():
        linear: Any = model.backbone.get_submodule(name)
        out_features, in_features = linear.weight.shape
        planned = LayerPlan(
            name=name,
            kind="Linear",
            shape=(out_features, in_features),
            bias=False,
            weights=recipe.kept if name in ignored else recipe.scheme.weights,
            activations=recipe.kept if name in ignored else recipe.scheme.activations,
        )
        rows.append(
            {
                "name": name,
                "weights": planned.weights,
                "activations": planned.activations,
                "bytes_float": 4 * out_features * in_features,
                "bytes": planned.weight_bytes(),
                "why": f"ignore pattern {ignored[name]!r}" if name in ignored else f"group {group}",
            }
        )
    return {"dry_run": True, "run": str(run.path), "recipe": recipe.name, "layers": rows}
