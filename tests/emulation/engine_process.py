"""Engines of a run in a process of their own: test_processors.py starts it in an emulated processor and denoises with it.

    python engine_process.py RUN ENGINE...

The first line of its output is JSON: what each engine says of its integer products, and which one is the run's default. Then
each request is a line ``ENGINE BYTES`` and so many bytes of safetensors, the inputs of a call; the answer is a line ``BYTES`` and
the tensor ``sample``. Only what qdiff and the CPU libraries do is emulated: an emulator takes a minute to import diffusers alone,
and text encoder, sampler and VAE are torch's, in float32.
"""

from __future__ import annotations

import json
import os
import sys


def main(run_folder: str, *names: str) -> None:
    """Answer calls until the input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    from safetensors.torch import load, save

    from qdiff.engines import choose_engine
    from qdiff.runs.run import Run
    from qdiff.stages.build import default_engine, load_runner

    run = Run.existing(run_folder)
    runners = {name: load_runner(run, name, None, threads=1) for name in names}
    facts = {
        "integers": {name: choose_engine(name).integer_arithmetic() for name in names},
        "default": default_engine(run),
    }
    answers.write(json.dumps(facts).encode() + b"\n")
    answers.flush()
    while request := sys.stdin.buffer.readline():
        name, size = request.decode().split()
        sample = runners[name](load(sys.stdin.buffer.read(int(size))))
        data = save({"sample": sample.contiguous()})
        answers.write(f"{len(data)}\n".encode() + data)
        answers.flush()
    for runner in runners.values():
        runner.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
