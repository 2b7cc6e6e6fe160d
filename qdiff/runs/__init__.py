"""The run folder, which every stage reads and writes.

:mod:`.run` is the folder, :mod:`.stages` the order of the stages and their commands, :mod:`.stage_run` one at work, :mod:`.lock`
keeps others out. :mod:`.manifest` is ``run.json``, :mod:`.partial` what an unfinished stage keeps, :mod:`.leftovers` what may be
deleted, :mod:`.json_diff` says what changed between two settings.
"""
