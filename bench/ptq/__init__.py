"""Post-training methods side by side: qdiff's recipes, ModelOpt's own algorithms, torchao and optimum-quanto.

    python -m bench.ptq [--model pixart] [--only NAME …] [--pictures 64] [--json] [--work DIR]

What makes the comparison fair, and where that is decided:

- **One calibration.** Every row is given the same float model and the same recorded calls (:mod:`bench.ptq.shared`). qdiff's
  rows also get the statistics that ``qdiff calibrate`` collected; collecting them is counted in their seconds. The peers
  replay the calls.
- **The same layers.** What the recipes ignore for the family stays float for everybody, and each maker checks that it changed
  exactly those layers (:func:`bench.ptq.material.Material.check`).
- **One scoring code** (:mod:`bench.ptq.score`). A row changes ``model.backbone`` to a torch module that simulates its
  numbers. The scores replay other calls, of other prompts and other noise, and run diffusers' pipeline with that module in
  it. The code never asks who made it.
- **One count of bits** (:mod:`bench.ptq.bits`), by which scales and low-rank factors cost what they cost on disk.
- **A guard** (:mod:`bench.ptq.guard`): a row whose predictions equal float's, or another row's, has not done what its name
  says.

Each row runs in a process of its own, so that its peak of memory is its own, and leaves one JSON file and its predictions in
the work folder; rows that are there are not run again.
"""
