"""The process around a command: its exit code, what a user reads when it fails, and Ctrl-C.

Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input, 4 missing extra or hardware, 5 integrity or trust, 6 out of memory or disk,
7 quality gate missed, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer

from qdiff.errors import QdiffError, command_line, out_of_memory

# Typer brings its own copy of click, whose exceptions are not those of the package click.
_UsageError: Any = typer.BadParameter.__base__
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_DISK = (*_NO_SPACE, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
_OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.ENOENT)


def stop_on_interrupt() -> None:
    """Make Ctrl-C end the process in order, now and later."""
    signal.signal(signal.SIGINT, _leave_or_interrupt)


def _leave_or_interrupt(number: int, frame: Any) -> None:
    """End the process at once if it is still importing torch; raise KeyboardInterrupt everywhere else. An exception in
    the middle of torch's own import meets C++ that cannot pass it on and aborts the process (signal 6, now and then);
    nothing has been begun there.
    """
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.__spec__, "_initializing", False):
        sys.stderr.write("\ninterrupted: nothing was begun\n")
        sys.stderr.flush()
        os._exit(130)
    signal.default_int_handler(number, frame)


def run(app: typer.Typer, arguments: Sequence[str]) -> int:
    """Run the command that ``arguments`` name, tell the user of errors on stderr, and return the exit code."""
    from qdiff.events import TerminalListener, listening

    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:  # bytes of another encoding: neither a manifest nor a picture could hold them
            _tell(f"error: the argument {argument!a} is not UTF-8", "give names and prompts in UTF-8")
            return 2
    quiet = any(argument in ("-q", "--quiet") for argument in arguments)
    try:
        with command_line(), listening(None if quiet else TerminalListener()):
            code = app(list(arguments), prog_name="qdiff", standalone_mode=False)
        return _interrupted() if code == 130 else code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except _UsageError as error:
        return _misused(error)
    except SystemExit as leaving:
        cause = leaving.__context__
        if isinstance(cause, OSError) and cause.errno == errno.EPIPE:  # click's answer when who read stdout has gone
            return 0
        raise
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _failed(error)


def _interrupted() -> int:
    _tell("\ninterrupted: finished parts are kept, the same command goes on from there")
    return 130


def _misused(error: Any) -> int:
    if type(error).__name__ != "NoArgsIsHelpError":  # there the help is printed already
        command = error.ctx.command_path if error.ctx else "qdiff"
        _tell(f"error: {error.format_message()}", f"see {command} --help")
    return 2


def _failed(error: Exception) -> int:
    if isinstance(error, QdiffError):
        _tell(f"error: {error}")  # with its own fix
        return error.exit_code
    if out_of_memory(error):
        fix = (
            "use a smaller --batch or fewer samples where the command has them, a machine with more memory, or --device cpu "
            "where a GPU is too small"
        )
        _tell("error: out of memory", fix)
        return 6
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        _tell(
            f"error: {error.strerror}: {error.filename}", "check space and permissions, then run the same command again"
        )
        return 6 if error.errno in _NO_SPACE else 3
    if isinstance(error, OSError) and error.errno in _OF_A_PATH and error.filename is not None:
        _tell(f"error: {error.strerror}: {str(error.filename)[:200]}", "check the paths that were given")
        return 3
    _tell(
        f"error: {type(error).__name__}: {str(error)[:500]}",
        "this is a bug of qdiff; run again with qdiff --debug and report what it prints",
    )
    return 1


def _tell(text: str, fix: str | None = None) -> None:
    typer.echo(text if fix is None else f"{text}\n  fix: {fix}", err=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit with the code of what happened; the entry point."""
    stop_on_interrupt()
    try:
        from qdiff.cli.commands import app
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    sys.exit(run(app, sys.argv[1:] if arguments is None else arguments))
