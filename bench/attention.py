"""Block-sparse attention beside torch's dense attention, FlexAttention with the same blocks, and FlashAttention-3.

    python -m bench.attention [--json] [--rounds 20] [--shape HEADS TOKENS SIZE]

All contenders of a shape take turns, round by round; times are medians, speeds are over cuDNN's dense attention in BF16 of the
same rounds. On a GPU every contender is a recorded CUDA graph (or its row says so), so that nothing waits for Python, the L2
cache is overwritten before every call, and events measure the GPU's time. ``ATTENTION`` leaves out what qdiff spends on ordering
and quantizing, ``ALL`` does not. TFLOP/s count the block pairs that are read.

Data are white noise, which no format likes: there is nothing in it that a mean or a neighbourhood would take out. An error is
the relative one against float64 over the same blocks, on some query rows of two heads
(:func:`bench.attention_contenders.sampled_error`). Block lists are random, every row as long as the others; the order of the
tokens is a transposed grid.

Without a GPU there is no kernel to measure: a smaller shape is run on the CPU, all in float32. Torch's dense attention, and that
of CPU engines, stand beside the blocks gathered in torch and in plain ONNX, and FlexAttention where it compiles. Speeds are then
over torch's dense attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.attention_contenders import REFERENCE_CPU, REFERENCE_GPU, Case, Contender, case_of, contenders

SHAPES = ((12, 75_600, 128), (12, 32_760, 128), (48, 17_776, 64), (16, 4_096, 72))
CPU_SHAPE = (8, 4_096, 64)
L2_BYTES = 256 * 2**20


def timed_on_cpu(run: Callable[[], Tensor]) -> float:
    """Return seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def recorded(run: Callable[[], Tensor], pool: Any) -> Callable[[], Any] | None:
    """Return ``run`` as a CUDA graph, or ``None`` where it cannot be one."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, pool=pool):
            run()
    except RuntimeError as error:
        print(f"not recorded: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None

    def replay() -> Any:
        graph.replay()
        return run  # which keeps alive what the graph reads and writes

    return replay


def timed_on_gpu(run: Callable[[], Tensor], flush: Tensor) -> float:
    """Return seconds that the GPU spends on one call, its cache overwritten."""
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def measure(rows: list[Contender], rounds: int, on_gpu: bool) -> None:
    """Time all rows in turn, ``rounds`` times after one that does not count."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda") if on_gpu else torch.empty(0)
    if on_gpu:
        # One pool for all: graphs run one after the other, and nobody reads the results.
        pool = torch.cuda.graph_pool_handle()
        for row in rows:
            graphs = [None if call is None else recorded(call, pool) for call in (row.run, row.bare)]
            row.recorded = graphs[0] is not None
            row.run, row.bare = graphs[0] or row.run, graphs[1] or row.bare
    for turn in range(rounds + 1):
        for row in rows:
            seconds = timed_on_gpu(row.run, flush) if on_gpu else timed_on_cpu(row.run)
            bare = timed_on_gpu(row.bare, flush) if row.bare is not None else None
            if turn > 0:
                row.seconds.append(seconds)
                row.bare_seconds += [bare] if bare is not None else []


def result_of(rows: list[Contender], case: Case) -> list[dict[str, Any]]:
    """Return what was measured, as data. A speed is given only beside a reference that ran."""
    heads, tokens, size = case.q.shape[1:]
    reference = next((r for r in rows if r.name in (REFERENCE_GPU, REFERENCE_CPU)), None)
    made = []
    for row in rows:
        median = statistics.median(row.seconds)
        work = 4 * heads * tokens**2 * size * float(case.lists[row.density].density(case.tiling.columns).mean())
        made.append(
            {
                "name": row.name,
                "density": row.density,
                "median_seconds": median,
                "attention_seconds": statistics.median(row.bare_seconds) if row.bare_seconds else None,
                "tflops": work / median / 1e12,
                "speedup": statistics.median(reference.seconds) / median if reference else None,
                "error": row.error,
                "recorded": row.recorded,
            }
        )
    return made


def benchmark(shapes: list[tuple[int, int, int]], rounds: int, on_gpu: bool) -> dict[str, Any]:
    """Return all shapes."""
    torch.manual_seed(0)
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    tables = []
    for heads, tokens, size in shapes:
        block = 64 if on_gpu and tokens < 16_000 else 128
        case = case_of(heads, tokens, size, block, device, dtype)
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            rows, absent = contenders(case, on_gpu, Path(folder))
            measure(rows, rounds, on_gpu)
        tables.append(
            {
                "heads": heads,
                "tokens": tokens,
                "size": size,
                "block": block,
                "absent": absent,
                "rows": result_of(rows, case),
            }
        )
        print(f"{heads} x {tokens} x {size}: done", file=sys.stderr, flush=True)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "gpu": on_gpu, "rounds": rounds, "torch": torch.__version__, "shapes": tables}


def show(result: dict[str, Any]) -> str:
    """Return the result as tables."""
    from qdiff.cli.text import table

    parts = [f"{result['device']}, torch {result['torch']}, medians of {result['rounds']} interleaved rounds"]
    if not result["gpu"]:
        parts.append("This ran on a CPU: it says nothing about the kernel, which needs an NVIDIA GPU.")
    for shape in result["shapes"]:
        lines = []
        for row in shape["rows"]:
            alone, speed = row["attention_seconds"], row["speedup"]
            lines.append(
                (
                    row["name"] if row["recorded"] or not result["gpu"] else f"{row['name']} (not recorded)",
                    f"{row['density']:g}",
                    f"{1000 * row['median_seconds']:.2f}",
                    f"{1000 * alone:.2f}" if alone is not None else "",
                    f"{row['tflops']:.1f}" if result["gpu"] else f"{row['tflops']:.3f}",
                    f"{speed:.2f}x" if speed is not None else "",
                    f"{row['error']:.1e}",
                )
            )
        title = f"{shape['heads']} heads, {shape['tokens']} tokens, size {shape['size']}, blocks of {shape['block']}"
        head = ("CONTENDER", "DENSITY", "ALL ms", "ATTENTION ms", "TFLOP/s", "SPEED", "ERROR")
        parts.append("\n".join([title, table(lines, head), *(f"left out: {line}" for line in shape["absent"])]))
    return "\n\n".join(parts)


def main() -> None:
    """Parse the command line and run the benchmark; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("HEADS", "TOKENS", "SIZE"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or min(map(min, arguments.shape or SHAPES)) < 1:
        parser.error("--rounds and the sizes of a --shape are at least 1")
    on_gpu = torch.cuda.is_available()
    shapes = [tuple(shape) for shape in arguments.shape] if arguments.shape else list(SHAPES if on_gpu else [CPU_SHAPE])
    result = benchmark(shapes, arguments.rounds, on_gpu)
    print(json.dumps(result, indent=2) if arguments.json else show(result))


if __name__ == "__main__":
    main()
