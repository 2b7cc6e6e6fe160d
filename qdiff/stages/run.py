"""``qdiff run``: all stages in order, each skipped when it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, MissingDependencyError, command
from qdiff.events import duration, log
from qdiff.runs.run import Run
from qdiff.stages.attention import calibrate_attention, require_sparse
from qdiff.stages.build import build
from qdiff.stages.calibrate import CalibrateOptions, calibrate
from qdiff.stages.compare import DEFAULT_PICTURES, check_gate, compare, require_comparable
from qdiff.stages.decisions import read_recipe
from qdiff.stages.disk import run_bytes
from qdiff.stages.export import export
from qdiff.stages.generate import check_pictures
from qdiff.stages.quantize import quantize
from qdiff.stages.report import report

if TYPE_CHECKING:
    from qdiff.engines import Engine
    from qdiff.models.model import Model

# Where nothing is asked for, every engine that this machine can build is built: an INT8 engine for the CPU, and one for
# the newest consumer GPUs, which needs no GPU to build.
DEFAULT_ENGINES = ("openvino", "onnxruntime", "tensorrt_rtx")


def run_all(
    run: Run,
    options: CalibrateOptions,
    recipe: str = "int8",
    overrides: list[str] | None = None,
    engines: list[str] | None = None,
    *,
    compute_capability: str | None = None,
    profiles: list[str] | None = None,
    pictures: int = DEFAULT_PICTURES,
    minimum_psnr: float | None = None,
    force: bool = False,
    accept_quality: bool = False,
) -> dict[str, Any]:
    """Calibrate, quantize, export, build, compare and report.

    Engines that were not asked for by name and cannot be built here are left out, with a line in the result that says why.

    Raises:
        QualityGateError: :func:`qdiff.stages.quantize.quantize` and :func:`qdiff.stages.compare.compare` say when; not where
            ``accept_quality``.
    """
    from qdiff.engines import choose_engine

    results: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        result = work()
        results[name] = result
        seconds = result.get("seconds")
        log.info("%s: done%s", name, f" ({duration(seconds)})" if seconds is not None else "")
        return result

    check_pictures(pictures)
    check_gate(minimum_psnr)
    require_comparable(engines or [])
    wanted = [choose_engine(name) for name in (engines or DEFAULT_ENGINES)]
    skipped = {}
    buildable = []
    for engine in wanted:
        missing = None if engine.runs_module else engine.missing_for_build()
        if missing is None:
            buildable.append(engine)
        elif engines:
            raise MissingDependencyError(
                f"engine {engine.name!r} cannot be built here: {missing}", f"see: {command('doctor')}"
            )
        else:
            skipped[engine.name] = missing
            log.info("build:%s: left out, %s", engine.name, missing)

    sparse = read_recipe(recipe, overrides).attention is not None
    if sparse:
        require_sparse(options.model)
    targets = {engine.target for engine in buildable if engine.target}
    built = sum(not engine.runs_module for engine in buildable)

    def later(model: Model, trajectory: int) -> int:
        return run_bytes(model, pictures, len(targets), built, trajectory)

    stage("calibrate", lambda: calibrate(run, options, force=force, later=later))
    if sparse:
        stage("attention", lambda: calibrate_attention(run, force=force))
    stage("quantize", lambda: quantize(run, recipe, overrides, force=force, accept_quality=accept_quality))
    for engine in list(buildable):
        reason = _cannot_take(run, engine)
        if reason and engines:
            raise reason
        if reason:
            buildable.remove(engine)
            skipped[engine.name] = reason.message
            log.info("build:%s: left out, %s", engine.name, reason.message)
    for target in dict.fromkeys(engine.target for engine in buildable if engine.target):
        stage(f"export:{target}", lambda target=target: export(run, target, force=force))  # type: ignore[misc]
    for engine in buildable:
        if not engine.runs_module:
            stage(
                f"build:{engine.name}",
                lambda engine=engine: build(  # type: ignore[misc]
                    run, engine.name, profiles=profiles, compute_capability=compute_capability, force=force
                ),
            )
    running = [engine.name for engine in sorted(buildable, key=lambda engine: -engine.rank) if engine.missing() is None]
    compared_engines = running or ["eager"]
    stage(
        "compare", lambda: compare(run, engines=compared_engines, pictures=pictures, force=force, accept_quality=True)
    )
    stage("report", lambda: report(run))
    # the gates close last, so that the report about a failure exists
    compare(run, engines=compared_engines, pictures=pictures, minimum_psnr=minimum_psnr, accept_quality=accept_quality)
    compared = results["compare"]
    return {
        "run": str(run.path),
        "id": run.id,
        "weights": results["calibrate"]["note"],
        "report": results["report"]["html"],
        "images": compared["images"],
        "engines": compared["engines"],
        "float": compared["float"],
        "packed_bytes": results["quantize"]["packed_bytes"],
        "float32_bytes": results["quantize"]["float32_bytes"],
        "skipped": skipped,
        "stages": results,
    }


def _cannot_take(run: Run, engine: Engine) -> InputError | None:
    """Return why the plan cannot be exported for an engine, if so: some formats run in torch alone."""
    if engine.target is None:
        return None
    from qdiff.export.onnx_graph import check_target
    from qdiff.export.translations import TARGETS
    from qdiff.plan.plan import Plan

    try:
        check_target(Plan.load(run.file("plan.json")), TARGETS[engine.target])
    except InputError as reason:
        return reason
    return None
