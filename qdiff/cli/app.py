"""The application: its name, the options of ``qdiff`` itself, and how a command prints its result."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="qdiff",
    help="Quantize a diffusion model, export it, build its engine, and see that it makes the same pictures.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from qdiff.runs.versions import versions

        typer.echo(" ".join(f"{name}={version}" for name, version in versions().items()))
        raise typer.Exit


@app.callback()
def _common(
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="no progress and no log")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="tracebacks and debug log")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="versions, and exit")
    ] = False,
) -> None:
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("qdiff").setLevel(level)


def show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    """Print a result on stdout, as JSON or as what ``text`` makes of it."""
    import json

    typer.echo(json.dumps(result, indent=2, ensure_ascii=False) if as_json else text(result))
