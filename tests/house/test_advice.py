"""What errors advise is what their reader can write: commands with flags, or functions with arguments."""

from __future__ import annotations

import ast
import inspect
import re

import pytest

import qdiff
from qdiff import errors
from qdiff.api.calibration import Calibration
from qdiff.errors import command, command_line, option

FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]+|(?<![\w-])-o(?![\w-])")
COMMAND = re.compile(
    r"\bqdiff (models|calibrate|quantize|export|build|run|correct|compare|generate|report|inspect|doctor)\b"
)
OF_THE_COMMAND_LINE = (
    "qdiff/cli/", "app/",  # the web page is started by a command
    "qdiff/errors.py",  # the table of flags
    "qdiff/stages/report.py",  # a file that is read anywhere
    "qdiff/attention/kernels/aot.py",  # flags of another program
    "engines/graph.py",
)  # fmt: skip


def test_advice_reads_as_its_reader_writes():
    assert (option("force", True), option("output"), option("steps", 3)) == ("force=True", "output=", "steps=3")
    assert (
        option("settings", ["a.b=1"]) == 'settings=["a.b=1"]' and option("guidance", [2.0, 7.5]) == "guidance=[2, 7.5]"
    )
    assert option("flags", {"integers": "on"}) == 'flags={"integers": "on"}'
    assert command("quantize", "RUN", force=True) == "qdiff.quantize(run, force=True)"
    assert command("calibrate", source="pixart", output="x") == 'qdiff.calibrate("pixart", output="x")'
    with command_line():
        assert (option("force", True), option("output"), option("steps", 3)) == ("--force", "-o", "--steps 3")
        assert option("settings", ["a.b=1"]) == "--set a.b=1" and option("guidance", [2.0, 7.5]) == "--guidance 2,7.5"
        assert option("flags", {"integers": "on"}) == "--flag integers=on"
        assert command("quantize", "RUN", force=True) == "qdiff quantize RUN --force"
        assert command("calibrate", source="pixart", output="x") == "qdiff calibrate --model pixart -o x"
        assert command("run_all", "…", minimum_psnr=30) == "qdiff run … --min-psnr 30"
    assert option("force", True) == "force=True"


def texts(tree: ast.AST) -> list[ast.Constant]:
    """Every text but docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node for node in constants if id(node) not in docs]


def test_no_text_outside_the_command_line_names_a_flag_or_a_command(shipped):
    named = [
        f"{source.path}:{text.lineno}: {text.value}"
        for source in shipped
        if not source.path.startswith(OF_THE_COMMAND_LINE)
        for text in texts(source.tree)
        if text.value not in ("--force", "-o") and (FLAG.search(text.value) or COMMAND.search(text.value))
    ]
    assert not named, "\n".join(named)


@pytest.fixture(scope="module")
def advice(shipped) -> list[tuple[str, str | None, list[str]]]:
    """Each call of ``option`` and ``command``: where, the function (``None``: any), the arguments."""
    calls = []
    for source in shipped:
        for node in ast.walk(source.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            first = node.args[0]
            if source.path == "qdiff/errors.py" or not isinstance(first, ast.Constant):
                continue
            where = f"{source.path}:{node.lineno}"
            if node.func.id == "option":
                calls.append((where, None, [str(first.value)]))
            elif node.func.id == "command":
                calls.append((where, str(first.value), [word.arg for word in node.keywords if word.arg]))
    assert len(calls) > 80
    return calls


def test_what_is_advised_exists_in_python(advice):
    functions = {name: getattr(qdiff, name) for name in qdiff.__all__ if name != "export"} | {
        "export": qdiff.api.export
    }
    takes = {
        name: {*inspect.signature(function).parameters}
        for name, function in functions.items()
        if inspect.isfunction(function)
    }
    for name, arguments in takes.items():
        if "options" in arguments:
            takes[name] = arguments | {*Calibration.__annotations__}
    known = set().union(*takes.values())
    for where, function, arguments in advice:
        unknown = set(arguments) - (known if function is None else takes[function])
        assert not unknown, f"{where}: {unknown}"


def test_what_is_advised_exists_on_the_command_line(advice):
    import typer

    from qdiff.cli.commands import app

    commands = typer.main.get_command(app).commands
    takes = {name: {flag for option in one.params for flag in option.opts} for name, one in commands.items()}
    known = set().union(*takes.values())
    for where, function, arguments in advice:
        name = function and errors._COMMANDS.get(function, function)
        with command_line():
            unknown = {option(argument) for argument in arguments} - (known if name is None else takes[name])
        assert not unknown, f"{where}: {unknown}"
