"""Whatever a command raises ends in one exit code and in words that say what to do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import typer

from qdiff.cli import main
from qdiff.errors import IntegrityError, MemoryExhaustedError, QualityGateError, UsageError


def of_the_system(number):
    return OSError(number, "as the system says", "/somewhere/file")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (UsageError("wrong", "right"), 2, "error: wrong\n  fix: right\n"),
        (IntegrityError("changed"), 5, "error: changed\n"),
        (QualityGateError("too low"), 7, "error: too low\n"),
        (MemoryError(), 6, "out of memory\n  fix: use a smaller --batch"),
        (MemoryExhaustedError("too large", "take less"), 6, "error: too large\n  fix: take less\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 6, "out of memory"),
        (of_the_system(errno.ENOSPC), 6, "as the system says: /somewhere/file\n  fix: check space"),
        (of_the_system(errno.EACCES), 3, "as the system says: /somewhere/file\n  fix: check space and permissions"),
        (of_the_system(errno.ECONNRESET), 1, "a bug of qdiff"),
        (ValueError("x" * 1000), 1, f"error: ValueError: {'x' * 500}\n  fix: this is a bug of qdiff"),
        (KeyboardInterrupt(), 130, "the same command goes on from there"),
    ],
)
def test_every_error_has_its_code_and_its_words(capsys, error, code, said):
    app = typer.Typer()

    @app.command()
    def work(debug: bool = False) -> None:
        if error is not None:
            raise error

    assert main.run(app, []) == code
    written = capsys.readouterr()
    assert said in written.err and "Traceback" not in written.err and not written.out
    assert bool(written.err) == (code != 0)
    if code not in (0, 130):
        with pytest.raises(type(error)):
            main.run(app, ["--debug"])


def test_what_is_no_option_names_the_help(capsys):
    app = typer.Typer()
    app.command()(lambda: None)
    assert main.run(app, ["--nothing"]) == 2
    assert "fix: see qdiff --help" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error():
    """A pipe whose other end is closed before anything is written to it."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "qdiff", "models"], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 0 and not done.stderr
