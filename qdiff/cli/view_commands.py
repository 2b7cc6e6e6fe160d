"""The commands that only show: models, what a run holds, this machine, and the web page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdiff.cli import text as present
from qdiff.cli.app import app, show
from qdiff.cli.options import JsonOption, RunArgument
from qdiff.errors import IntegrityError
from qdiff.files import path_of


@app.command()
def models(json: JsonOption = False) -> None:
    """List model families, their bundled weights and their full-size random configurations."""
    from qdiff import api

    show(api.list_models(), json, present.models)


@app.command()
def inspect(
    run: RunArgument,
    layers: Annotated[bool, typer.Option("--layers", help="every layer of the plan")] = False,
    json: JsonOption = False,
) -> None:
    """Show what a run folder holds, and whether its files are unchanged.

    Example: qdiff inspect runs/pixart --layers
    """
    from qdiff import api

    result = api.inspect(run, layers=layers)
    show(result, json, present.inspect)
    if result["changed"]:
        raise IntegrityError(f"{result['run']} is not as it was made: {result['changed'][0]}", result["fixes"][0])


@app.command()
def doctor(json: JsonOption = False) -> None:
    """Show versions, hardware, and which engines can run or build here.

    Example: qdiff doctor
    """
    from qdiff import api

    show(api.doctor(), json, present.doctor)


@app.command()
def demo(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RUN]…", parser=path_of, help="run folders [default: those in runs/]"),
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback needs --auth")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    auth: Annotated[
        Path | None,
        typer.Option(metavar="PATH", parser=path_of, help="file with lines name:password, only for its owner to read"),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="PATH", parser=path_of, help="folder for runs built on the page")
    ] = Path("runs"),
    allow: Annotated[
        list[str] | None, typer.Option(metavar="MODEL=WEIGHTS", help="may be built on the page too")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="GB for loaded engines [default: half the free]")
    ] = None,
) -> None:
    """Start the web page: generate, compare float with engines, inspect plans, build.

    Example: qdiff demo runs/pixart
    """
    from qdiff.app import server

    server.demo(runs or [], host, port, auth, output, allow or [], memory)
