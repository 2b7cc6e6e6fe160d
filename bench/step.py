"""One denoising step on this machine's CPU: qdiff's INT8 engines beside float runtimes and NNCF's own INT8.

    python -m bench.step --config pixart-67m [--json] [--rounds 10] [--work DIR]

All contenders run the same recorded call (batch 1, random weights of the published size), interleaved round by round, so that
whatever else the machine does hits all of them alike. Of large models not all fit into memory at once (``--together``): then
they run in groups, each with the reference in it, and a speed is over the reference of its own group. ``ratio`` is FP32 in
ONNX Runtime over INT8 in OpenVINO. SQNR is of the step's output against FP32 in ONNX Runtime, on a call that no contender was
calibrated on.

``qdiff int8 openvino`` is the engine as ``qdiff build`` makes it: what is not INT8 runs in BF16 where the CPU has it, and what
follows from prompt or timestep alone is computed once (the call is always the same, so never while the clock runs); ``whole``
computes it at every step, like the peers. The rows that say so compare like with like. The peer is NNCF's post-training INT8 of
the same OpenVINO model with its settings for transformers, calibrated on the same recorded calls.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

CONFIGURATIONS = {
    "pixart-bundled": "pixart",  # the model that comes with qdiff: too small to gain much, quick enough for bench.check
    "pixart-67m": "pixart",
    "pixart-xl": "pixart",
    "sd-1.5": "stable-diffusion",
    "sdxl": "stable-diffusion",
}
Run = Callable[[Mapping[str, Tensor]], Tensor]


def prepare(configuration: str, work: Path) -> tuple[Any, Path]:
    """Calibrate, quantize, export and build with qdiff's own stages (skipped when done), and write the float graph.

    Returns:
        the run and the path of the float ONNX file.
    """
    from qdiff.export.onnx_graph import export_onnx
    from qdiff.export.translations import TARGETS
    from qdiff.runs.run import Run
    from qdiff.stages.build import build
    from qdiff.stages.calibrate import CalibrateOptions, calibrate
    from qdiff.stages.calibrated_model import recorded_calls, reload_model
    from qdiff.stages.export import export
    from qdiff.stages.quantize import quantize

    run = Run(work / configuration)
    weights = "bundled" if configuration.endswith("-bundled") else f"random:{configuration}"
    options = CalibrateOptions(model=CONFIGURATIONS[configuration], weights=weights, samples=2, steps=2, batch=1)
    calibrate(run, options)
    quantize(run)
    export(run, "onnxruntime")
    for engine in ("openvino", "onnxruntime"):
        build(run, engine)
    float_graph = work / f"{configuration}-float" / "model.onnx"
    if not float_graph.exists():
        model = reload_model(run)
        example = next(iter(recorded_calls(run.path))).inputs
        export_onnx(model.family, model.backbone, example, TARGETS["onnxruntime"], float_graph.parent)
    return run, float_graph


def calls(run: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the recorded calls, one sample each: of every call the text-guided half."""
    from qdiff.stages.calibrated_model import recorded_calls

    for step in recorded_calls(run.path):
        yield {name: tensor[-1:] for name, tensor in step.inputs.items()}


def unseen(call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a call that nobody was calibrated on: the recorded one with other noise."""
    import torch

    generator = torch.Generator().manual_seed(1234)
    latent = next(name for name in ("hidden_states", "sample") if name in call)
    noise = torch.randn(call[latent].shape, generator=generator)
    return {**call, latent: noise * call[latent].std()}


def openvino_model(path: Path, precision: str, shapes: Mapping[str, Tensor]) -> Run:
    """Return a graph in OpenVINO, static shapes, latency hint; ``precision`` is that of what is not quantized."""
    import openvino as ov

    core = ov.Core()
    return _compiled(core, core.read_model(path), precision, shapes)


def _compiled(core: Any, model: Any, precision: str, shapes: Mapping[str, Tensor]) -> Run:
    import torch

    model.reshape({name: list(tensor.shape) for name, tensor in shapes.items()})
    compiled = core.compile_model(model, "CPU", {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision})
    names = {port.get_any_name() for port in compiled.inputs}

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items() if name in names}
        return torch.from_numpy(compiled(arrays)[0].copy())

    return call


def nncf_model(path: Path, samples: list[dict[str, Tensor]], precision: str) -> Run:
    """Return the float graph quantized to INT8 by NNCF: post-training quantization with the transformer preset."""
    import logging

    import nncf
    import openvino as ov

    logging.getLogger("nncf").setLevel(logging.ERROR)
    core = ov.Core()
    model = core.read_model(path)
    model.reshape({name: list(tensor.shape) for name, tensor in samples[0].items()})
    dataset = nncf.Dataset([{name: tensor.numpy() for name, tensor in sample.items()} for sample in samples])
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars would stand in the JSON
        quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples))
    return _compiled(core, quantized, precision, samples[0])


def onnxruntime_model(path: Path) -> Run:
    """Return a graph in ONNX Runtime's CPU provider."""
    import onnxruntime as ort
    import torch

    settings = ort.SessionOptions()
    settings.add_session_config_entry(
        "session.force_spinning_stop", "1"
    )  # else its threads burn the next contender's time
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def call(inputs: Mapping[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return call


def contenders(run: Any, float_graph: Path, peers: bool) -> dict[str, Callable[[], Run]]:
    """Return all rows by name, each to be loaded when it is needed; the first is the reference."""
    from qdiff.stages.build import load_runner

    samples = list(calls(run))
    int8_graph = run.file("onnx", "onnxruntime", "model.onnx")
    rows: dict[str, Callable[[], Run]] = {
        "onnxruntime fp32": lambda: onnxruntime_model(float_graph),
        "openvino fp32": lambda: openvino_model(float_graph, "f32", samples[0]),
        "openvino fp32 in bf16": lambda: openvino_model(float_graph, "bf16", samples[0]),
        "qdiff int8 onnxruntime": lambda: load_runner(run, "onnxruntime", None),
        "qdiff int8 openvino": lambda: load_runner(run, "openvino", None),
        "qdiff int8 onnxruntime, whole": lambda: whole(run, "onnxruntime"),
        "qdiff int8 openvino, whole": lambda: whole(run, "openvino"),
        "qdiff int8 openvino, rest f32": lambda: openvino_model(int8_graph, "f32", samples[0]),
    }
    if peers:
        rows["nncf int8 openvino, rest bf16"] = lambda: nncf_model(float_graph, samples, "bf16")
        rows["nncf int8 openvino, rest f32"] = lambda: nncf_model(float_graph, samples, "f32")
    return rows


def whole(run: Any, engine: str) -> Run:
    """Return an engine that computes everything at every step."""
    from qdiff.stages.build import build, load_runner

    build(run, engine, whole=True)
    runner = load_runner(run, engine, None)
    build(run, engine)
    return runner


def groups_of(names: list[str], together: int) -> list[list[str]]:
    """Return the names in groups of at most ``together``, the first name leading every one."""
    reference, rest = names[0], names[1:]
    size = max(1, together - 1)
    return [[reference, *rest[start : start + size]] for start in range(0, len(rest), size)]


def measure(rows: dict[str, Run], call: dict[str, Tensor], rounds: int) -> dict[str, list[float]]:
    """Return seconds of ``rounds`` calls each, interleaved, after one warm-up call each.

    Every round has another order: a contender pays for what the one before it leaves in the caches, so none always follows
    the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for run in rows.values():
        run(call)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        order = list(rows.items())
        shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run(call)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table_of(
    group: list[str], made: dict[str, Callable[[], Run]], call: dict[str, Tensor], rounds: int
) -> list[dict[str, Any]]:
    """Return the rows of one group, its reference first; what it loads is let go at the end."""
    from qdiff.evaluation.metrics import decibels, sqnr_db

    rows, other = {name: made[name]() for name in group}, unseen(call)
    seconds = measure(rows, call, rounds)
    expected, base = rows[group[0]](other), statistics.median(seconds[group[0]])
    return [
        {
            "name": name,
            "median_seconds": statistics.median(values),
            "min_seconds": min(values),
            "speedup": base / statistics.median(values),
            "sqnr_db": None if name == group[0] else decibels(sqnr_db(expected, rows[name](other))),
        }
        for name, values in seconds.items()
    ]


def benchmark(configuration: str, work: Path, rounds: int, peers: bool, together: int = 8) -> dict[str, Any]:
    """Return the whole benchmark as a JSON value."""
    from qdiff.resources import release_memory
    from qdiff.runs.versions import versions

    run, float_graph = prepare(configuration, work)
    made = contenders(run, float_graph, peers)
    call = next(calls(run))
    table: list[dict[str, Any]] = []
    for group in groups_of(list(made), together):
        found = table_of(group, made, call, rounds)
        table += found[1:] if table else found
        for row in found:
            print(f"{row['name']}: {row['median_seconds']:.3f} s, {row['speedup']:.2f}x", file=sys.stderr, flush=True)
        release_memory()
    by_name = {row["name"]: row for row in table}
    return {
        "config": configuration,
        "ratio": by_name["qdiff int8 openvino"]["speedup"],
        "rounds": rounds,
        "together": together,
        "rows": table,
        "stages": {
            name: {"seconds": entry["seconds"], "peak_memory_bytes": entry["peak_memory_bytes"]}
            for name, entry in run.manifest["stages"].items()
            if entry["status"] == "done"
        },
        "float32_bytes": run.entry("quantize")["float32_bytes"],
        "onnx_ratio": run.entry("export:onnxruntime")["ratio"],
        "versions": versions(),
    }


def show(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    from qdiff.cli.text import size, table

    rows = [
        (
            row["name"],
            f"{1000 * row['median_seconds']:.1f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['sqnr_db']:.1f}" if row["sqnr_db"] is not None else "reference",
        )
        for row in result["rows"]
    ]
    stages = [(name, f"{s['seconds']:.1f} s", size(s["peak_memory_bytes"])) for name, s in result["stages"].items()]
    return "\n\n".join(
        [
            f"{result['config']}: one denoising step, batch 1, median of {result['rounds']} interleaved rounds",
            table(rows, ("CONTENDER", "STEP", "SPEED", "SQNR dB")),
            table(stages, ("STAGE", "TIME", "PEAK MEMORY"))
            + f"\nfloat32 weights {size(result['float32_bytes'])}, INT8 ONNX file {result['onnx_ratio']:.3f} of that",
        ]
    )


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=CONFIGURATIONS, default="pixart-67m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--work", type=Path, help="folder for the run, kept and reused [default: a temporary one]")
    parser.add_argument(
        "--together", type=int, default=8, help="contenders in memory at once, the reference among them"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave NNCF out")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from qdiff import device

    device.set_device(device.HOST)
    peers = not arguments.no_peers
    if peers:
        import importlib.util

        if importlib.util.find_spec("nncf") is None:
            sys.exit("the peer needs NNCF: pip install 'qdiff-deploy[bench]', or leave it out with --no-peers")
    from qdiff.events import TerminalListener, listening

    with listening(TerminalListener()), tempfile.TemporaryDirectory() as temporary:
        result = benchmark(
            arguments.config, arguments.work or Path(temporary), arguments.rounds, peers, arguments.together
        )
    print(json.dumps(result, indent=2) if arguments.json else show(result))


if __name__ == "__main__":
    main()
