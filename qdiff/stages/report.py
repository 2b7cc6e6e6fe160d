"""Stage 6: everything that the other stages found out, on one page and as JSON."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Any

from qdiff.files import read_json
from qdiff.runs.run import Run
from qdiff.runs.versions import versions
from qdiff.stages.generate import CORRECTION
from qdiff.stages.report_attention import attention_result, draw
from qdiff.stages.report_routing import routing_result

if TYPE_CHECKING:
    from qdiff.plan.plan import LayerPlan, Plan
    from qdiff.report.data import CorrectionResult
    from qdiff.report.page import AllocationResult, EngineResult, LayerResult, PromptResult


def report(run: Run) -> dict[str, Any]:
    """Write ``report.html`` and ``report.json`` from the manifest, the plan and the comparison (if there is one)."""
    from qdiff.plan.plan import Plan
    from qdiff.report.page import write_report

    run.verify("quantize")
    for stage in ("correct", "compare"):
        if run.done(stage):
            run.verify(stage)
    plan = Plan.load(run.file("plan.json"))
    data = gather(run, plan)
    inputs = {stage: entry.get("inputs") for stage, entry in run.manifest["stages"].items() if stage != "report"}
    with run.stage("report", {"stages": inputs}, force=True) as work:
        assert work is not None
        if plan.attention is not None:
            work.output(draw(run, plan.attention))
        html, json_path = write_report(run.path, data)
        work.output(html)
        work.output(json_path)
    return {"run": str(run.path), "html": str(html), "json": str(json_path), "warnings": data.warnings}


def gather(run: Run, plan: Plan) -> Any:
    """Return the :class:`qdiff.report.page.ReportData` of a run."""
    from qdiff.report.page import ModelInfo, Quality, ReportData, Sizes, StageResult, TimestepError

    calibrated, quantized = run.entry("calibrate"), run.entry("quantize")
    compared = read_json(run.file("compare.json"), "the comparison") if run.done("compare") else None
    engines = _engines(run, compared)
    best = next((row for row in compared["engines"] if row["name"] != "float"), None) if compared else None
    float_row = compared["engines"][0] if compared else None
    errors = read_json(run.file("quantization.json"), "the quantization errors")["timesteps"]
    quality = Quality()
    if best is not None and float_row is not None:
        quality = Quality(
            best["psnr_db_mean"],
            best["psnr_db_min"],
            best["ssim_mean"],
            (float_row["accuracy"] or {}).get("emoji"),
            (best["accuracy"] or {}).get("emoji"),
            (float_row["accuracy"] or {}).get("motion"),
            (best["accuracy"] or {}).get("motion"),
            best.get("motion", {}).get("magnitude_ratio"),
            best.get("motion", {}).get("change_psnr_db"),
        )
    return ReportData(
        model=ModelInfo(plan.family, plan.weights, quantized["parameters"], calibrated["inputs"]["note"]),
        recipe=plan.recipe,
        run_id=run.id,
        engine=best["name"] if best else None,
        baseline="float",
        quality=quality,
        sizes=Sizes(quantized["float32_bytes"], quantized["packed_bytes"], _artifacts(run)),
        prompts=_prompts(compared, best),
        layers=_layers(run, plan),
        timesteps=[TimestepError(e["timestep"], e["sqnr_db"], e["cosine"]) for e in errors],
        allocation=_allocation(run),
        attention=None if plan.attention is None else attention_result(plan.attention),
        routing=routing_result(run, plan),
        correction=_correction(run),
        engines=engines,
        stages=[
            StageResult(name, entry.get("seconds"), entry.get("peak_memory_bytes"))
            for name, entry in run.manifest["stages"].items()
            if entry.get("status") == "done" and name != "report"
        ],
        machine={"processor": _processor(), "system": f"{platform.system()} {platform.machine()}"},
        versions=versions(),
        commands=list(
            dict.fromkeys(entry["command"] for entry in run.manifest["stages"].values() if "command" in entry)
        ),
        warnings=_warnings(run, compared),
    )


def _correction(run: Run) -> CorrectionResult | None:
    """Return corrections of the trajectory, of runs in which they were tried."""
    from qdiff.report.data import CorrectionResult

    if not run.done("correct"):
        return None
    made = read_json(run.file(CORRECTION), "the correction")
    gains = {row["method"]: row["counts"] for row in made["tried"]}
    return CorrectionResult(made["engine"], made["unit"], gains, made["method"])


def _allocation(run: Run) -> AllocationResult | None:
    """Return how formats were chosen, of runs with a mixed recipe."""
    from qdiff.report.page import AllocationResult, PlanResult
    from qdiff.stages.decisions import ALLOCATION, TABLE

    if ALLOCATION not in run.entry("quantize")["outputs"]:
        return None
    made, measured = read_json(run.file(ALLOCATION), "the allocation"), read_json(run.file(TABLE), "the sensitivities")
    sizes = [len(layers) for layers in measured["groups"].values()]
    plans = []
    for kind in ("solutions", "uniform", "frontier"):
        for index, solution in enumerate(made[kind]):
            layers = dict.fromkeys(made["formats"], 0)
            for format, size in zip(solution["formats"], sizes, strict=True):
                layers[made["formats"][format]] += size
            chosen = kind == "solutions" and index == made["chosen"]
            role = {"solutions": "candidate", "uniform": "uniform", "frontier": "solver"}[kind]
            name = {"solutions": f"weighed {solution['weighting']}", "uniform": solution["weighting"]}
            plans.append(
                PlanResult(
                    name.get(kind, "another budget"),
                    "chosen" if chosen else role,
                    solution["cost"],
                    solution["psnr_db"],
                    layers,
                )
            )
    return AllocationResult(
        made["measure"],
        made["budget"],
        made["device"],
        made.get("measured", False),
        len(sizes),
        len(measured["timesteps"]),
        plans,
        {name: value for name, value in measured["rank_correlations"].items() if value is not None},
    )


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return f"{len(names)} x {names[0]}" if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def _artifacts(run: Run) -> dict[str, int]:
    sizes = {"model.safetensors": run.file("model.safetensors").stat().st_size}
    for stage, entry in run.manifest["stages"].items():
        verb, _, choice = stage.partition(":")
        if verb == "export" and entry.get("status") == "done":
            sizes[f"onnx/{choice}"] = entry["bytes"]
        if verb == "build" and entry.get("status") == "done":
            sizes[f"engine {choice}"] = entry["bytes"]
    return sizes


def _prompts(compared: dict[str, Any] | None, best: dict[str, Any] | None) -> list[PromptResult]:
    from qdiff.report.page import PromptResult

    if compared is None or best is None:
        return []
    return [
        PromptResult(
            prompt,
            seed,
            f"images/float/{i:03d}.png",
            f"images/{best['name']}/{i:03d}.png",
            pair["psnr_db"],
            pair["ssim"],
        )
        for i, (prompt, seed, pair) in enumerate(
            zip(compared["prompts"], compared["seeds"], best["per_picture"], strict=True)
        )
    ]


def _layers(run: Run, plan: Plan) -> list[LayerResult]:
    from qdiff.report.page import LayerResult

    exports = {
        stage.partition(":")[2]: entry["realised"]
        for stage, entry in run.manifest["stages"].items()
        if stage.startswith("export:") and entry.get("status") == "done"
    }
    return [
        LayerResult(
            name=layer.name,
            kind=layer.kind,
            requested=layer.precision,
            realised={target: _precision(layer, realised[layer.name]) for target, realised in exports.items()},
            sqnr_db=layer.sqnr_db,
            smoothing=layer.smoothing,
            timestep_scales=layer.timestep_scales,
            why=layer.why,
            bytes_float=math.prod(layer.shape) * 4,
            bytes_quantized=layer.weight_bytes(),
        )
        for layer in plan.layers
    ]


def _precision(layer: LayerPlan, found: dict[str, Any]) -> str:
    """Return what a graph holds of a layer, in the words of :attr:`qdiff.plan.plan.LayerPlan.precision`."""
    names = ("weights", "per_token")
    realised = {**{name: found[name] for name in names}, "activations": found["activations"] or _plain(layer)}
    return layer.model_copy(update=realised).precision


def _plain(layer: LayerPlan) -> str:
    from qdiff.formats.table import format_named

    return "float" if format_named(layer.activations).quantized else layer.activations


def _engines(run: Run, compared: dict[str, Any] | None) -> list[EngineResult]:
    from qdiff.engines import ranked
    from qdiff.report.page import EngineResult

    measured = {row["name"]: row for row in compared["engines"]} if compared else {}
    rows = []
    for engine in ranked():
        name = engine.name
        built = run.manifest["stages"].get(f"build:{name}", {})
        is_built = built.get("status") == "done"
        why = engine.missing()
        if why is None and not engine.runs_module and not is_built:
            why = "not built in this run"
        row = measured.get(name, {})
        rows.append(
            EngineResult(
                name=name,
                title=engine.title,
                available=why is None,
                why_not=why or "",
                seconds_per_step=row.get("seconds_per_step"),
                speedup=row.get("speedup"),
                speedup_low=row["speedup_range"][0] if "speedup_range" in row else None,
                speedup_high=row["speedup_range"][1] if "speedup_range" in row else None,
                speed_reason=""
                if name == "float"
                else row.get("speed_reason") or "",  # what it is compared with is itself
                peak_memory_bytes=row.get("added_bytes"),
                file_bytes=built.get("bytes") if is_built else None,
                psnr_db_mean=row.get("psnr_db_mean"),
                note=f"built for {built['device']}" if is_built else "",
            )
        )
    return rows


def _warnings(run: Run, compared: dict[str, Any] | None) -> list[str]:
    found = []
    weights = run.entry("calibrate")["inputs"]["weights"]
    if weights.startswith("random:"):
        found.append(
            "The weights are random: the pictures are noise, and the quality numbers say nothing about a trained model."
        )
    for row in compared["engines"] if compared else []:
        if row.get("speed_reason"):
            found.append(
                f"The machine was too busy to tell the speed of {row['name']}: {row['speed_reason']}. "
                "Run qdiff compare --force when it is idle."
            )
    if compared is None:
        found.append("No pictures were compared in this run: qdiff compare RUN makes them.")
    for stage, entry in run.manifest["stages"].items():
        if entry.get("status") != "done" and stage != "report":
            found.append(f"Stage {stage} was begun and not finished.")
    return found
