"""Denoises one picture by each engine of a run, as ``qdiff generate`` does, up to the VAE: run in an emulated processor by
test_processors.py, which decodes the latents itself. (The VAE is torch's, in float32, and takes most of the time in an emulator.)

    python denoise.py RUN FOLDER ENGINE...        writes FOLDER/latents.safetensors and FOLDER/facts.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

PROMPT, SEED = "a rocket on a blue background", 7


class Denoised(Exception):
    """Leaves the pipeline before its VAE."""


def main(run_folder: str, folder: str, *names: str) -> None:
    """Write the last latents of each engine, and what it said of its integer products."""
    from qdiff.engines import choose_engine
    from qdiff.files import save_tensors
    from qdiff.runs.run import Run
    from qdiff.stages.build import default_engine
    from qdiff.stages.calibrated_model import reload_model
    from qdiff.stages.generate import Session, make_request

    run = Run.existing(run_folder)
    request = make_request(run, [PROMPT], seed=SEED)
    model = reload_model(run)
    latents: dict[str, Tensor] = {}
    for name in names:

        def keep(step: int, timestep: float, values: Tensor, name: str = name) -> None:
            if step == model.steps(request.steps):
                latents[name] = values.clone()
                raise Denoised

        session = Session(run, name, model, threads=1)
        try:
            session.pictures(request, on_step=keep)
        except Denoised:
            pass
        finally:
            session.close()
    save_tensors(Path(folder, "latents.safetensors"), latents)
    facts = {
        "integers": {name: choose_engine(name).integer_arithmetic() for name in names},
        "default": default_engine(run),
    }
    Path(folder, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
