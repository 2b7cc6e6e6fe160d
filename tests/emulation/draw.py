"""Draws one picture by each engine of a run, as ``qdiff generate`` does: run in an emulated processor by test_processors.py.

python draw.py RUN FOLDER ENGINE...        writes FOLDER/<engine>.png and FOLDER/facts.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

PROMPT, SEED = "a rocket on a blue background", 7


def main(run_folder: str, folder: str, *names: str) -> None:
    """Write the pictures, and what each engine said of its integer products."""
    from qdiff.artifacts import Run
    from qdiff.engines import choose
    from qdiff.stages.build import default_engine
    from qdiff.stages.calibrate import reload_model
    from qdiff.stages.generate import Session, make_request, save_pictures

    run = Run.existing(run_folder)
    request = make_request(run, [PROMPT], seed=SEED)
    model = reload_model(run)
    for name in names:
        session = Session(run, name, model, threads=1)
        pictures = session.pictures(request)
        session.close()
        save_pictures(run, pictures, request, model, [Path(folder, f"{name}.png")])
    facts = {"integers": {name: choose(name).integer_arithmetic() for name in names}, "default": default_engine(run)}
    Path(folder, "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
