"""Stage 3: write the ONNX graph for a target and check what the file really holds."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import IntegrityError, MissingDependencyError
from qdiff.events import log
from qdiff.files import open_tensors
from qdiff.runs.run import Run
from qdiff.stages.build import assembled, scheduled
from qdiff.stages.calibrated_model import recorded_calls
from qdiff.stages.quantize import FLOAT_PREDICTIONS

if TYPE_CHECKING:
    from qdiff.engines import Runner
    from qdiff.export.parity import StepParity
    from qdiff.plan.plan import Plan

# Parity runs the graph in this engine: its CPU takes every graph that we write, for whatever target (FP4 for TensorRT emulated).
PARITY_ENGINE = "onnxruntime"
PARITY_STEPS = 25


def require_onnx() -> None:
    """Refuse to begin when the packages that write ONNX are not installed.

    Raises:
        MissingDependencyError: with the extra that installs them.
    """
    import importlib.util

    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise MissingDependencyError(
                f"export needs the package {package}, which is not installed", "pip install 'qdiff-deploy[cpu]'"
            )


def export(run: Run, target_name: str, *, force: bool = False, dry_run: bool = False) -> dict[str, Any]:
    """Write ``onnx/<target>/model.onnx`` (+ external data); the checks are part of the stage and cannot be skipped."""
    require_onnx()
    from qdiff.export.precision import fitting_target
    from qdiff.export.translations import TARGETS
    from qdiff.plan.plan import Plan

    target = fitting_target(
        TARGETS[target_name], run.entry("quantize").get("largest_value") if run.done("quantize") else None
    )
    inputs = {
        "quantize": run.outputs_hash("quantize"),
        "target": target.name,
        "opset": target.opset,
        "compute": target.compute,
    }
    if dry_run:
        plan = Plan.load(run.file("plan.json"))
        return {
            "dry_run": True,
            "run": str(run.path),
            "target": target.name,
            "layers": len(plan.layers),
            "opset": target.opset,
        }
    stage, needs = f"export:{target.name}", ("quantize", "calibrate")  # parity replays the trajectory
    with run.stage(stage, inputs, force=force, leftovers=[f"onnx/{target.name}"], needs=needs) as work:
        if work is not None:
            _work(run, target, work)
    entry = run.entry(stage)
    return {
        "run": str(run.path),
        "target": target.name,
        "onnx": str(run.file("onnx", target.name, "model.onnx")),
        **{name: entry[name] for name in ("bytes", "ratio", "parity", "seconds", "peak_memory_bytes")},
    }


def _work(run: Run, target: Any, work: Any) -> None:
    from qdiff.export import checks
    from qdiff.export.hoist import sources_of, write_parts
    from qdiff.export.onnx_graph import check_target, export_onnx
    from qdiff.export.parity import COSINE
    from qdiff.models import FAMILIES
    from qdiff.plan.plan import Plan
    from qdiff.quantization.checkpoint import load_quantized
    from qdiff.resources import require_disk
    from qdiff.stages.disk import export_bytes

    plan = Plan.load(run.file("plan.json"))
    check_target(plan, target)
    family = FAMILIES[plan.family]
    packed = run.file("model.safetensors").stat().st_size
    require_disk(run.file("onnx"), export_bytes(packed), "the ONNX file")
    outputs = bool(target.outputs)
    backbone = load_quantized(plan, run.file("model.safetensors"), outputs=outputs)
    trajectory = recorded_calls(run.path)
    log.info("export: tracing and writing the graph for %s", target.title)
    path = export_onnx(family, backbone, next(iter(trajectory)).inputs, target, run.file("onnx", target.name))
    write_parts(path, sources_of(family, plan.config))
    checks.check_file(path)
    checks.require_sparse(path, plan)
    realised = checks.realised_precision(path, plan)
    lost = checks.downgraded(plan, realised, target.outputs)
    if lost:
        raise IntegrityError(
            "the graph lost precision that the plan asked for: " + "; ".join(lost[:5]), "please report this"
        )
    del backbone  # a 16-bit target has changed its weights; the reference is the checkpoint
    parity = _parity(run, plan, outputs, path)
    for file in sorted(path.parent.iterdir()):
        work.output(file)
    float_bytes = run.entry("quantize")["float32_bytes"]
    work.fact(
        bytes=checks.file_bytes(path),
        ratio=round(checks.file_bytes(path) / float_bytes, 4),
        realised={name: asdict(value) for name, value in realised.items()},
        parity={
            "steps": len(parity),
            "worst_cosine": min(p.cosine for p in parity),
            "worst_sqnr_db": min(p.sqnr_db for p in parity),
            "steps_below_cosine": sum(p.cosine < COSINE for p in parity),
            "worst_loss_db": round(max(p.module_db - p.graph_db for p in parity), 3),
        },
    )


def _parity(run: Run, plan: Plan, outputs: bool, path: Path) -> list[StepParity]:
    import tempfile

    from qdiff.engines import BuildOptions, choose_engine
    from qdiff.export.emulation import emulated
    from qdiff.export.parity import compare, expected_outputs
    from qdiff.graphs.parts import parts_of, read
    from qdiff.models import FAMILIES
    from qdiff.quantization.checkpoint import load_quantized
    from qdiff.recording.inputs import samples_of
    from qdiff.resources import release_memory

    with open_tensors(run.file(FLOAT_PREDICTIONS), "the float predictions") as file:
        references = list(file.get_tensor("predictions"))[:PARITY_STEPS]
    steps = list(islice(recorded_calls(run.path).steps(0), len(references)))
    specs = FAMILIES[plan.family].inputs(plan.config)
    release_memory()
    backbone = load_quantized(plan, run.file("model.safetensors"), outputs=outputs)
    router = None
    if plan.routing is not None:
        from qdiff.routing.blocks import branch_state_of

        # Samples of a batch share routes. So it is one sample alone, and its routes are those that the module took.
        branch_state = branch_state_of(backbone)
        router = None if branch_state is None else branch_state.router
        assert router is not None
        router.record = True
        steps = [replace(step, inputs=samples_of(specs, step.inputs, slice(-1, None))) for step in steps]
        references = [reference[-1:] for reference in references]
    expected = expected_outputs(FAMILIES[plan.family], backbone, steps)
    del backbone
    release_memory()
    engine = choose_engine(PARITY_ENGINE)
    options = BuildOptions(flags={"memory": "low"})
    graphs = parts_of(path) or [read(path)]
    with tempfile.TemporaryDirectory(dir=run.path, prefix=".parity-") as folder, contextlib.ExitStack() as stack:
        runners: list[Runner] = []
        for graph in graphs:
            own = Path(folder, graph.name)
            own.mkdir()
            engine.build(stack.enter_context(emulated(graph.path)), own, options)
            runners.append(engine.load(own, options))
        parts = zip(runners[1:], (graph.outputs for graph in graphs[1:]), strict=True)
        runner = scheduled(run, assembled(runners[0], parts))
        if router is not None:
            runner.router.script = dict(router.history)  # type: ignore[attr-defined]
        try:
            return compare(expected, runner, steps, references, specs)
        finally:
            runner.close()
