"""Decide which format, or which branch, each layer or block gets.

:mod:`.sensitivity` and :mod:`.costs` are measured or estimated, :mod:`.knapsack` solves, :mod:`.mixed` chooses formats of
layers; :mod:`.routed` chooses branches by step, with :mod:`.route_table` and :mod:`.route_predictor`.
"""
