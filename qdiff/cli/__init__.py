"""The command line.

:mod:`.commands` has all commands: :mod:`.stage_commands` do a stage, :mod:`.view_commands` only show. :mod:`.options` are the
options that they share, :mod:`.text` is what they print, :mod:`.app` the application, :mod:`.main` the entry point.
"""
