"""The report of a run: one HTML page that stands alone, and the same as JSON.

:mod:`.data` are the values that it shows, :mod:`.plots` its figures, :mod:`.page` writes it from the files in ``templates/``.
"""
