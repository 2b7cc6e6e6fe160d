"""Stage 4: build an engine from the exported graph, or find it in the cache; and load engines for the stages after."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, MissingDependencyError, UsageError
from qdiff.runs.run import EDITABLE, Run

if TYPE_CHECKING:
    from qdiff.engines import BuildOptions, Engine, Profile, Runner
    from qdiff.engines.base import Shape
    from qdiff.models.base import Model
    from qdiff.plan.attention_plan import AttentionPlan

DEFAULT_BATCH = "batch=1-2-8"
LONGEST_PROMPT = 512
# Where no GPU is there and none is named, engines are built for the newest consumer GPUs.
DEFAULT_COMPUTE_CAPABILITY = "12.0"


def make_options(
    run: Run, engine: Engine, profiles: list[str], compute_capability: str | None, flags: Mapping[str, str]
) -> BuildOptions:
    """Build options from the words of the command line. Without a profile: the model's own size, batch 1 to 8."""
    from qdiff.engines import BuildOptions
    from qdiff.models import FAMILIES
    from qdiff.plan.plan import Plan

    plan = Plan.load(run.file("plan.json"))
    if engine.name == "tensorrt_rtx" and plan.attention is not None and plan.structure.branches:
        raise UsageError(
            "TensorRT-RTX 1.7 crashes on sparse attention inside an If, so it builds no blocks with branches that follow lists",
            "quantize without --density or without routing, or build for onnxruntime or openvino",
        )
    one_batch = engine.target == "tensorrt" and _switches_blocks(plan)
    one_size = engine.name == "tensorrt" and flags.get("attention") != "plain" and _has_kernel(plan)
    alone = FAMILIES[plan.family].branches_apart or (plan.routing is not None and plan.routing.by_sample)
    batch = f"batch={1 if alone else 2}" if one_batch or one_size else DEFAULT_BATCH
    calibrated = run.entry("calibrate")
    cell = calibrated.get("pixels_per_cell") or FAMILIES[plan.family].pixels_per_cell(plan.config)
    made = tuple(_profile(plan, text, calibrated["shapes"], cell, batch, one_size) for text in (profiles or [""]))
    if one_batch:
        _require_one_batch(made)
    if compute_capability is None and engine.target == "tensorrt" and engine.missing() is not None:
        compute_capability = DEFAULT_COMPUTE_CAPABILITY
    return BuildOptions(profiles=made, compute_capability=compute_capability, flags=dict(flags))


def _has_kernel(plan: Any) -> bool:
    """Return whether the plan's attention has numerics of the kernel that the data-centre engine takes in as a plugin,
    which is for one size (:mod:`qdiff.engines.trt_plugin`).
    """
    from qdiff.attention.numerics import numerics_named

    return plan.attention is not None and numerics_named(plan.attention.numerics).coded


def _switches_blocks(plan: Any) -> bool:
    """Return whether some block has a branch with scales for blocks of values (NVFP4) beside another."""
    from qdiff.formats.table import FORMATS

    several = tuple(f"{name}.branches." for name, count in plan.structure.branches.items() if count > 1)
    return any(layer.name.startswith(several) and FORMATS[layer.activations].block for layer in plan.layers)


def _require_one_batch(profiles: tuple[Profile, ...]) -> None:
    """Refuse profiles with a range of batch sizes: TensorRT-RTX 1.7 compiles no NVFP4 product inside an ``If`` whose
    batch is a range ("Unsupported op"); other axes may be one.
    """
    for profile in profiles:
        low, _, high = profile.ranges["timestep"]
        if low != high:
            raise UsageError(
                f"profile {profile.name!r}: where blocks switch to NVFP4, TensorRT-RTX builds for one batch size, not for "
                f"{low[0]} to {high[0]}",
                "give one, such as --profile batch=1, or several profiles of one each",
            )


def _profile(
    plan: Any, text: str, shapes: dict[str, list[int]], cell: int, batch: str = DEFAULT_BATCH, one_size: bool = False
) -> Profile:
    """Return a profile for the words ``text``; what they do not say is as in calibration (``shapes`` of its tensors).

    Args:
        plan: of the model.
        text: the words of ``--profile``.
        shapes: of the calibration's tensors, by name.
        cell: pixels along one side of a latent cell.
        batch: the words for it where ``text`` has none.
        one_size: whether prompts and lists, too, have one size where ``text`` does not say otherwise.
    """
    from qdiff.engines.profiles import make_profile, parse_profile
    from qdiff.models import FAMILIES
    from qdiff.recording.inputs import latent_of

    config = plan.config
    specs = FAMILIES[plan.family].inputs(config)
    axes = {spec.name: spec.axes for spec in specs}
    sizes = {
        axis: (size, size, size)
        for name, named in axes.items()
        for axis, size in zip(named, shapes[name], strict=True)
        if isinstance(axis, str)
    }
    if "tokens" in sizes and not one_size:
        tokens = sizes["tokens"][0]
        sizes["tokens"] = (2, tokens, max(tokens, LONGEST_PROMPT))
    sizes |= parse_profile(batch)
    recorded = dict(sizes)
    if text:
        sizes |= parse_profile(text, scale=cell)
    one_graph = FAMILIES[plan.family].one_size or plan.attention is not None
    if one_graph and any(sizes.get(axis) != recorded.get(axis) for axis in ("frames", "height", "width")):
        what = "the lists of sparse attention are" if plan.attention else f"a graph of {FAMILIES[plan.family].title} is"
        raise UsageError(
            f"profile {text!r}: {what} for the size that was calibrated",
            "leave the size out of the profile, or calibrate with --height, --width or --frames",
        )
    if plan.attention is not None:
        profile = _with_lists(plan.attention, text, axes, sizes, one_size)
    else:
        profile = make_profile(text or "default", axes, sizes)
    return (
        profile
        if plan.routing is None or plan.routing.reuse is None
        else _with_deltas(plan, profile, latent_of(specs).name)
    )


def _with_deltas(plan: Any, profile: Profile, latent: str) -> Profile:
    """Return a profile of a graph that takes cached deltas (:mod:`qdiff.export.routes`), as large as the latent
    ``latent`` makes them.
    """
    import dataclasses
    import math

    from qdiff.models import FAMILIES
    from qdiff.plan.routing_plan import DELTAS

    grid, width = FAMILIES[plan.family].grid, plan.config["num_attention_heads"] * plan.config["attention_head_dim"]
    count = len(plan.routing.blocks)
    ranges = _triple((count, shape[0], math.prod(grid(plan.config, shape)), width) for shape in profile.ranges[latent])
    return dataclasses.replace(profile, ranges={**profile.ranges, DELTAS: ranges})


def _with_lists(
    attention: AttentionPlan, text: str, axes: dict[str, Any], sizes: dict[str, Any], one_size: bool = False
) -> Profile:
    """Return a profile of a graph that takes lists (:mod:`qdiff.export.list_inputs`): for one size of pictures, and any
    lists, or with ``one_size`` lists as wide as the widest.
    """
    import dataclasses
    import math

    from qdiff.engines.profiles import make_profile
    from qdiff.plan.attention_plan import BLOCKS, BOUNDS

    heads, columns = attention.heads, -(-math.prod(attention.grid) // attention.block_k)
    rows = -(-math.prod(attention.grid) // attention.block_q)
    usual = max(heads, round(heads * columns * attention.density))
    every = (heads * columns,) * 3 if one_size else (heads, usual, heads * columns)
    profile = make_profile(text or "default", axes, sizes)
    listed, bounds = _triple((rows, total) for total in every), (heads + 1,)
    ends = _triple(tuple(round(total * head / heads) for head in range(heads + 1)) for total in every)
    ranges = {**profile.ranges, BLOCKS: listed, BOUNDS: (bounds, bounds, bounds)}
    return dataclasses.replace(profile, ranges=ranges, values={BOUNDS: ends})


def _triple(shapes: Iterable[Shape]) -> tuple[Shape, Shape, Shape]:
    low, usual, high = shapes
    return low, usual, high


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
        profiles: ranges of input sizes, as ``--profile`` takes them.
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
    from qdiff.engines.trust import MANIFEST, trusted
    from qdiff.graphs.parts import parts_of, read
    from qdiff.resources import require_disk
    from qdiff.stages.disk import engine_bytes

    engine = choose_engine(engine_name)
    if engine.runs_module:
        return {"run": str(run.path), "engine": engine.name, "note": "runs the torch module: nothing to build"}
    missing = engine.missing_for_build()
    if missing:
        raise MissingDependencyError(f"engine {engine.name!r} cannot be built here: {missing}", "see: qdiff doctor")
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
                bytes=sum(
                    file.stat().st_size
                    for built in (step, *parts)
                    for file in built.folder.rglob("*")
                    if file.is_file() and file.name != MANIFEST  # it holds seconds, as long as they are
                ),
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
            f"run: qdiff export {run.path} --target {engine.target}",
        )
    return run.file("onnx", str(engine.target), "model.onnx")


def default_engine(run: Run) -> str:
    """Return the fastest engine that can run here and was built in this run; torch itself when none was."""
    from qdiff.engines import ranked

    usable = (engine.name for engine in ranked() if run.done(f"build:{engine.name}") and engine.missing() is None)
    return next(usable, "eager")


def require_runner(run: Run, engine_name: str) -> None:
    """Refuse an engine that :func:`load_runner` could not load, before anything expensive is done for it."""
    from qdiff.engines import choose_engine

    engine = choose_engine(engine_name)
    if engine.runs_module:
        return
    if not run.done(f"build:{engine.name}"):
        raise InputError(
            f"engine {engine.name!r} was not built in {run.path}", f"run: qdiff build {run.path} --engine {engine.name}"
        )
    missing = engine.missing()
    if missing:
        raise MissingDependencyError(
            f"engine {engine.name!r} is built, but cannot run here: {missing}",
            "carry the run folder to a machine that has it, or choose another --engine",
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
        if engine.name == "float":
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
