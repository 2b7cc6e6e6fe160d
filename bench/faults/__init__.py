"""Kills and damaged files: does a run folder survive what happens to it?

    python -m bench.faults kills [--stage NAME …] [--count 50] [--seed 0] [--work DIR] [--json FILE]
    python -m bench.faults interrupts [the same]
    python -m bench.faults damage [--only FILE …] [--change NAME …] [--seed 0] [--work DIR] [--json FILE]

- **kills**: a stage is killed (SIGKILL) at a moment that is uniform over its usual duration, one time in four it is killed again
  on its way on, and then the same command is run to its end. The folder must hold the very bytes of an undisturbed run, and
  nothing else.
- **interrupts**: the same with SIGINT and SIGTERM in turn; the process must also end with the signal's exit code and without a
  traceback.
- **damage**: one file of a finished run is changed (cut, a bit flipped, taken from another run, …), then every command is run.
  Each must refuse (exit 2, 3 or 5), make the file anew, or give what it gives on the whole folder.

What is compared and what is left out of the comparison (times, memory, the signature of the times) is in
:mod:`bench.faults.contents`. Commands run in processes that are forked from one interpreter that has imported everything
(:mod:`bench.faults.processes`): the process is real and its death is too, it only does not import torch for five seconds.

Each trial leaves one line in the work folder; trials that are there are not run again.
"""
