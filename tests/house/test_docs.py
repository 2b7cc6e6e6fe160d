"""The documentation is true: links lead somewhere, commands are ones that qdiff knows, exit codes are those of the code.

A fence under an HTML comment ``<!-- run -->`` is run for real in an empty folder: as one shell script, or by Python.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<mark>```+|~~~+)[ ]*(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=mark)[ ]*$", re.S | re.M)
LINK = re.compile(r"!?\[[^\]\n]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HTML_LINK = re.compile(r"<(?:img|a)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"")
SHELLS = {"", "sh", "bash", "shell", "console"}
PYTHON = {"python", "py"}
RUN_MARK = re.compile(r"<!--\s*run\s*-->\s*$")
ALWAYS = {0, 130}  # success and Ctrl-C are no errors of the tree in errors.py


@dataclass(frozen=True)
class Fence:
    """A fenced block: where it stands, its lines, and whether it is marked to be run."""

    page: str
    line: int
    language: str
    body: str
    run: bool

    @property
    def commands(self) -> list[str]:
        """Shell lines with continuations joined and prompts taken off; a console's output is left out."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if any(line.startswith("$ ") for line in lines):
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def pages() -> list[str]:
    """All Markdown pages, relative to the root; hidden folders and what runs and builds leave are no pages."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name[0] != "." and name not in {"runs", "build", "dist"}]
        found += [Path(folder, name).relative_to(ROOT).as_posix() for name in names if name.endswith(".md")]
    return sorted(found)


def fences(page: str) -> list[Fence]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Fence(
            page, text.count("\n", 0, m.start()) + 1, m["language"], m["body"], bool(RUN_MARK.search(text[: m.start()]))
        )
        for m in FENCE.finditer(text)
        if m["language"] in SHELLS | PYTHON
    ]


def prose(page: str) -> str:
    """The page without its fences and code spans, which may show links that are none."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """The names that headings of a page get on GitHub."""
    headings = re.findall(r"^#+\s+(.*?)\s*#*$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(prose(page)) + HTML_LINK.findall(prose(page)):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or not target.resolve().is_relative_to(ROOT):
            broken.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            broken.append(f"{link} (no such heading)")
    assert not broken


ALL_FENCES = [fence for page in pages() for fence in fences(page)]
SHELL_FENCES = [fence for fence in ALL_FENCES if fence.language in SHELLS]
MARKED = [fence for fence in ALL_FENCES if fence.run]


def qdiff_calls(line: str) -> list[list[str]]:
    """Arguments of each ``qdiff …`` in a shell line: pipes and lists taken apart, redirections and ``NAME=value`` dropped."""
    line = re.sub(r"(?<=\s)\d?>{1,2}\s*(?:&\d|\S+)", "", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split, lexer.commenters = True, "#"
    calls: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            calls.append([])
        elif calls[-1] or not re.match(r"\w+=", word):
            calls[-1].append(word)
    found = []
    for call in calls:
        if call[1:3] == ["-m", "qdiff"] and re.search(r"python[\d.]*$", call[0]):
            found.append(call[3:])
        elif call and call[0].rpartition("/")[2] == "qdiff":
            found.append(call[1:])
    return found


def test_shell_lines_are_taken_apart():
    line = "A=1 qdiff run --model pixart 2>log | tee x 2>&1 && .venv/bin/qdiff report runs/x --json > out.json # why"
    assert qdiff_calls(line) == [["run", "--model", "pixart"], ["report", "runs/x", "--json"]]
    assert qdiff_calls("python3 -m qdiff doctor; make run") == [["doctor"]]
    assert qdiff_calls("qdiff generate RUN --prompt 'a cat; a dog'") == [
        ["generate", "RUN", "--prompt", "a cat; a dog"]
    ]
    assert qdiff_calls("make run") == qdiff_calls("pip install qdiff-deploy") == []


@pytest.fixture(scope="module")
def command():
    """The command line as an object that can parse without running."""
    import typer

    import qdiff.cli.commands

    applications = [value for value in vars(qdiff.cli.commands).values() if isinstance(value, typer.Typer)]
    return typer.main.get_command(applications[0])


def problem(command, arguments: list[str]) -> str | None:
    """What is wrong with a command line, or ``None``. Values are not checked: files need not be there."""
    try:
        while True:
            context = command.make_context("qdiff", [], resilient_parsing=True)
            context.resilient_parsing = False  # it was only for making the context without its required arguments
            options, rest, _ = command.make_parser(context).parse_args(list(arguments))
            if not hasattr(command, "commands") or not rest:
                break
            if rest[0] not in command.commands:
                return f"no command {rest[0]!r}"
            command, arguments = command.commands[rest[0]], rest[1:]
    except Exception as error:  # the parser's usage errors share no public base
        return getattr(error, "message", None) or str(error)
    if "--help" in arguments or "--version" in arguments:
        return None
    if rest:
        return f"one argument too many: {rest[0]!r}"
    missing = [p.name for p in command.params if p.required and options.get(p.name) in (None, (), [])]
    return f"without {', '.join(missing)}" if missing else None


def test_the_parser_check_sees():
    import typer

    application = typer.Typer()

    @application.command()
    def run(folder: str, model: str = "pixart") -> None: ...

    @application.command()
    def doctor() -> None: ...

    command = typer.main.get_command(application)
    assert problem(command, ["run", "x", "--model", "wan"]) is problem(command, ["run", "--help"]) is None
    assert "rnu" in (problem(command, ["rnu"]) or "")
    assert "--modle" in (problem(command, ["run", "x", "--modle", "wan"]) or "")
    assert "folder" in (problem(command, ["run"]) or "")
    assert "too many" in (problem(command, ["doctor", "x"]) or "")


@pytest.mark.parametrize("page", sorted({fence.page for fence in SHELL_FENCES}))
def test_commands_are_ones_that_qdiff_knows(page, command):
    wrong = [
        f"line {fence.line}: qdiff {shlex.join(call)}: {trouble}"
        for fence in SHELL_FENCES
        if fence.page == page
        for line in fence.commands
        for call in qdiff_calls(line)
        if (trouble := problem(command, call))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("fence", MARKED, ids=[f"{fence.page}:{fence.line}" for fence in MARKED])
def test_marked_commands_run(fence, tmp_path):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "NO_COLOR": "1",
    }
    python = fence.language in PYTHON
    script = fence.body if python else "set -euo pipefail\n" + "\n".join(fence.commands)
    done = subprocess.run(
        [sys.executable if python else "bash", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def documented_codes() -> dict[int, str]:
    """Exit codes that start a table row or a list item under a heading about exit codes, and the page."""
    found: dict[int, str] = {}
    for page in pages():
        sections = re.split(r"^#+ ", without_fences(page), flags=re.M)
        for section in sections:
            if re.match(r"[^\n]*exit (?:codes?|status)", section, re.I):
                found |= {int(n): page for n in re.findall(r"^\s*[|*-]\s*`?(\d{1,3})`?\b", section, re.M)}
    return found


def without_fences(page: str) -> str:
    return FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def test_exit_codes_are_those_of_the_code():
    from qdiff import errors

    documented = documented_codes()
    assert documented, "no page has a section about exit codes"
    kinds = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.QdiffError)
    ]
    real = {kind.exit_code for kind in kinds} | ALWAYS
    unknown = {code: page for code, page in documented.items() if code not in real}
    assert not unknown, "documented, but nothing exits with them"
    assert real - set(documented) == set(), "not documented"
