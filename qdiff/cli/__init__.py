"""The command line.

:mod:`.commands` parses and calls a stage, :mod:`.options` are the options that commands share, :mod:`.text` is what they print,
:mod:`.main` the entry point with exit codes.
"""
