"""The run folder, which every stage reads and writes.

:mod:`.run` is the folder with its stages, :mod:`.manifest` its ``run.json``, :mod:`.partial` what an unfinished stage keeps,
:mod:`.leftovers` what may be deleted, :mod:`.json_diff` says what changed between two settings.
"""
