"""Stage 4: build an engine from the exported graph, or find it in the cache; and load engines for the stages after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, MissingDependencyError, command, option
from qdiff.runs.run import Run
from qdiff.runs.stages import EDITABLE

if TYPE_CHECKING:
    from qdiff.engines import BuildOptions, Engine, Runner
    from qdiff.models.model import Model


def make_options(
    run: Run, engine: Engine, profiles: list[str], compute_capability: str | None, flags: Mapping[str, str]
) -> BuildOptions:
    """Return build options from the words of the command line. Without a profile: the model's own size, batch 1 to 8.

    Raises:
        UsageError: the engine builds nothing from this run's plan, or not for these profiles.
    """
    from qdiff.engines import BuildOptions
    from qdiff.engines.plan_profiles import CalibratedSizes
    from qdiff.models import FAMILIES
    from qdiff.plan.plan import Plan

    plan = Plan.load(run.file("plan.json"))
    if (refusal := engine.refuses(plan)) is not None:
        raise refusal
    calibrated = run.entry("calibrate")
    cell = calibrated.get("pixels_per_cell") or FAMILIES[plan.family].pixels_per_cell(plan.config)
    sizes = CalibratedSizes(calibrated["shapes"], cell)
    ranges = tuple(engine.profile_for(plan, text, sizes, flags) for text in (profiles or [""]))
    if compute_capability is None:
        compute_capability = engine.default_compute_capability()
    return BuildOptions(profiles=ranges, compute_capability=compute_capability, flags=dict(flags))


def build(
    run: Run,
    engine_name: str | None,
    *,
    profiles: list[str] | None = None,
    compute_capability: str | None = None,
    flags: Mapping[str, str] | None = None,
    whole: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Build into ``engines/<engine>-<key>/`` unless the same engine is there already.

    Args:
        run: with an exported graph.
        engine_name: of the backend.
        profiles: ranges of input sizes, such as ``512`` or ``dyn-256-1024``.
        compute_capability: of the GPU that a TensorRT-RTX engine is for.
        flags: settings of the backend by name.
        whole: one engine that computes everything at every step, where the graph could be cut (:mod:`qdiff.export.hoist`).
        force: build anew what is there.
        dry_run: build nothing; return what is known before.

    Raises:
        InputError: the graph for the engine's target was not exported, or the backend refuses it.
        MissingDependencyError: what building needs is not there.
        IntegrityError: an engine is there whose files were changed.
    """
    from qdiff.engines import choose_engine
    from qdiff.engines.cache import build_cached
    from qdiff.engines.graph import graph_bytes
    from qdiff.engines.parts import options_for
    from qdiff.engines.trust import trusted
    from qdiff.graphs.parts import parts_of, read
    from qdiff.resources import require_disk
    from qdiff.stages.disk import engine_bytes

    engine = choose_engine(engine_name)
    if engine.runs_module:
        return {"run": str(run.path), "engine": engine.name, "note": "runs the torch module: nothing to build"}
    missing = engine.missing_for_build()
    if missing:
        raise MissingDependencyError(
            f"engine {engine.name!r} cannot be built here: {missing}", f"see: {command('doctor')}"
        )
    onnx = exported_graph(run, engine)
    options = make_options(run, engine, profiles or [], compute_capability, flags or {})
    inputs = {"export": run.outputs_hash(f"export:{engine.target}"), "options": options.to_json(), "whole": whole}
    if dry_run:
        return {
            "dry_run": True,
            "run": str(run.path),
            "engine": engine.name,
            "device": engine.device(options),
            "parts": [] if whole else [graph.name for graph in parts_of(onnx)[1:]],
            **inputs,
        }
    # The engine cache has its own, complete key; the manifest only remembers which of its engines is the current one.
    stage = f"build:{engine.name}"
    run.verify(f"export:{engine.target}")
    gone = run.done(stage) and not all(run.file(folder).is_dir() for folder in _folders(run.entry(stage)))
    with run.stage(stage, inputs, force=force or gone, replace=True) as work:
        if work is None:
            for folder in _folders(run.entry(stage)):
                trusted(run.file(folder), engine)
        else:
            require_disk(run.file("engines"), engine_bytes(graph_bytes(onnx)), "the engine")
            everything = read(onnx)
            graphs = ([] if whole else parts_of(onnx)) or [everything]
            step, *parts = [
                build_cached(
                    engine, graph.path, run.file("engines"), options_for(engine, options, everything, graph), force
                )
                for graph in graphs
            ]
            work.fact(
                folder=str(step.folder.relative_to(run.path)),
                parts=[
                    {"name": graph.name, "folder": str(part.folder.relative_to(run.path)), "outputs": graph.outputs}
                    for graph, part in zip(graphs[1:], parts, strict=True)
                ],
                cached=step.was_cached,
                facts=step.facts,
                bytes=_bytes(engine, [built.folder for built in (step, *parts)]),
                device=engine.device(options),
                version=engine.version(),
            )
    entry = run.entry(stage)
    missing_to_run = engine.missing()
    return {
        "run": str(run.path),
        "engine": engine.name,
        "folder": str(run.file(entry["folder"])),
        "parts": [part["name"] for part in built_parts(entry)],
        **{name: entry[name] for name in ("cached", "bytes", "device", "facts", "seconds", "peak_memory_bytes")},
        "runs_here": missing_to_run is None,
        **({"why_not": missing_to_run} if missing_to_run else {}),
    }


def _bytes(engine: Engine, folders: Sequence[Path]) -> int:
    """Return the bytes on disk of a built engine, with the graphs that it reads from elsewhere."""
    from qdiff.engines.trust import MANIFEST

    files = {
        file.resolve()
        for folder in folders
        for file in [*folder.rglob("*"), *engine.reads(folder)]
        if file.is_file() and file.name != MANIFEST  # it holds seconds, as long as they are
    }
    return sum(file.stat().st_size for file in files)


def _folders(entry: Mapping[str, Any]) -> list[str]:
    """Return folders of a built engine: the step's, and those of what is computed once."""
    return [entry["folder"], *(part["folder"] for part in built_parts(entry))]


def built_parts(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what is computed once; runs of earlier versions have none."""
    parts: list[dict[str, Any]] = entry.get("parts", [])
    return parts


def exported_graph(run: Run, engine: Engine) -> Path:
    """Return the ONNX file that ``engine`` takes.

    Raises:
        InputError: it was not exported, with the command that does it.
    """
    stage = f"export:{engine.target}"
    if not run.done(stage):
        raise InputError(
            f"engine {engine.name!r} needs the graph for target {engine.target!r}, which {run.path} does not hold",
            f"run: {command('export', run.path, target=engine.target)}",
        )
    return run.file("onnx", str(engine.target), "model.onnx")


def default_engine(run: Run) -> str:
    """Return the fastest engine that can run here and was built in this run; torch itself when none was."""
    from qdiff.engines import ranked

    usable = (engine for engine in ranked() if engine.runs_module or run.done(f"build:{engine.name}"))
    return next(engine.name for engine in usable if engine.missing() is None)


def require_runner(run: Run, engine_name: str) -> None:
    """Refuse an engine that :func:`load_runner` could not load, before anything expensive is done for it."""
    from qdiff.engines import choose_engine

    engine = choose_engine(engine_name)
    if engine.runs_module:
        return
    if not run.done(f"build:{engine.name}"):
        raise InputError(
            f"engine {engine.name!r} was not built in {run.path}",
            f"run: {command('build', run.path, engine=engine.name)}",
        )
    missing = engine.missing()
    if missing:
        raise MissingDependencyError(
            f"engine {engine.name!r} is built, but cannot run here: {missing}",
            f"carry the run folder to a machine that has it, or choose another with {option('engine')}",
        )


def load_runner(run: Run, engine_name: str, model: Model | None, threads: int | None = None) -> Runner:
    """Return a loaded engine of this run.

    Args:
        run: with a built engine.
        engine_name: of the engine.
        model: the float pipeline; only the ``float`` engine needs it.
        threads: of the processor; ``None``: the engine's own choice.

    Raises:
        InputError: the engine was not built in this run.
        MissingDependencyError: it cannot run here.
        IntegrityError: its files were changed since it was built.
    """
    from qdiff import device
    from qdiff.engines import choose_engine
    from qdiff.engines.cache import load_trusted
    from qdiff.models import FAMILIES
    from qdiff.models.base import NamedInputs
    from qdiff.plan.plan import Plan
    from qdiff.quantization.checkpoint import load_quantized

    engine = choose_engine(engine_name)
    if engine.runs_module:
        if engine.runs_float:
            assert model is not None
            return engine.load_module(NamedInputs(model.family, model.backbone))
        run.verify("quantize")
        plan = Plan.load(run.file("plan.json"))
        backbone = load_quantized(plan, run.file("model.safetensors")).to(device.chosen())
        return engine.load_module(NamedInputs(FAMILIES[plan.family], backbone))
    stage = f"build:{engine.name}"
    require_runner(run, engine_name)
    entry = run.entry(stage)
    step, *parts = [load_trusted(engine, run.file(folder), threads) for folder in _folders(entry)]
    outputs = [part["outputs"] for part in built_parts(entry)]
    return scheduled(run, assembled(step, zip(parts, outputs, strict=True)))


def beside(run: Run, engines: Iterable[str]) -> contextlib.AbstractContextManager[None]:
    """Return where the float model, text encoder and VAE are while those engines run: beside an engine of the host on
    the host, unless a device was named.
    """
    from qdiff import device

    built = [f"build:{name}" for name in engines]
    return device.on_host(any(run.done(stage) and run.entry(stage)["device"] == device.HOST for stage in built))


def device_beside(run: Run, engines: Iterable[str]) -> dict[str, str]:
    """Return inputs of a stage whose result depends on where the float model is beside those engines: a GPU by its
    name.
    """
    from qdiff import device

    with beside(run, engines):
        where = device.chosen()
    return {} if where.type == device.HOST else {"device": str(where)}


def assembled(step: Runner, parts: Iterable[tuple[Runner, Sequence[str]]]) -> Runner:
    """Return the runner of a step, with the parts that are computed once where there are any."""
    from qdiff.engines.hoisted import HoistedRunner

    found = list(parts)
    return HoistedRunner(step, found) if found else step


def scheduled(run: Run, runner: Runner) -> Runner:
    """Return the runner of an exported graph; one that gives it its lists where the plan's attention is sparse, or its
    routes.
    """
    from qdiff.plan.plan import Plan

    plan = Plan.load(run.file("plan.json"))
    if (
        plan.attention is not None or plan.routing is not None
    ):  # else nothing of the plan is used: the engine is what it is
        from qdiff.attention.sparse import SIDECAR

        run.verify("quantize", only={SIDECAR, EDITABLE})
    if plan.attention is not None:
        from qdiff.attention.sparse import load_schedule
        from qdiff.engines.scheduled import ScheduledRunner

        runner = ScheduledRunner(runner, load_schedule(plan.attention, run.path))
    if plan.routing is not None:
        from qdiff.engines.routed import RoutedRunner
        from qdiff.models import FAMILIES
        from qdiff.routing.follow import varying_inputs
        from qdiff.routing.router import Router

        family = FAMILIES[plan.family]
        return RoutedRunner(runner, Router(plan.routing, varying_inputs(family, plan.config)), family, plan.config)
    return runner
