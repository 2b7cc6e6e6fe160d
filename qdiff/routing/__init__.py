"""Precision that changes with the step, inside one model: blocks in two precisions, and blocks that are not computed at all.

A block of a chain can be there twice, in a careful recipe (INT8) and in a cheap one (NVFP4), and a third way is to add what it
added the last time it was computed. Which way a call goes is its *route*: an input of the exported graph, set for every step by
a :class:`~.router.Router` from what the blocks reported for the step before (6Bit-Diffusion, arXiv 2603.18742) or from a table.

Here is what runs: :mod:`.blocks` are the modules, :mod:`.router` drives them, :mod:`.follow` makes a backbone follow a plan. What
decides is in :mod:`qdiff.allocation`, what was decided in :mod:`qdiff.plan.routing_plan`.
"""
