"""MkDocs hook: writes the reference of the command line from the parser itself, in place of a mark.

A page with the line ``<!-- command line -->`` gets a section for every command, with its arguments, options, defaults and help.
"""

from __future__ import annotations

import html
from typing import Any, Literal, get_args, get_origin

MARK = "<!-- command line -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the reference in the place of the mark."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """Return the Markdown of all commands, those of groups with the group's name before theirs."""
    import typer

    from qdiff.cli.commands import app

    root = typer.main.get_command(app)
    parts = [
        "## Options of every command\n",
        "They stand before the command: `qdiff --quiet run`.\n",
        options_table(root),
    ]
    parts += [section(f"qdiff {name}", command) for name, command in commands(root)]
    return "\n".join(parts)


def commands(group: Any, before: str = "") -> list[tuple[str, Any]]:
    """Return ``(name, command)`` of each command that is not hidden."""
    found = []
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            found += commands(command, f"{before}{name} ")
        elif not command.hidden:
            found.append((before + name, command))
    return found


def section(name: str, command: Any) -> str:
    """Return one command: its synopsis, its help and its tables of arguments and options."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    synopsis = " ".join([name, *(word(argument) for argument in arguments), "[OPTIONS]"])
    lines = [f"## {name}", "", paragraphs(command.help), "", f"```text\n{synopsis}\n```", ""]
    if any(argument.help for argument in arguments):
        lines += ["| argument | |", "| --- | --- |"]
        lines += [f"| `{word(argument)}` | {cell(argument.help or '')} |" for argument in arguments]
        lines.append("")
    return "\n".join(lines + [options_table(command)])


def word(argument: Any) -> str:
    """Return an argument as it stands in a synopsis: in brackets where it may be left out, with dots where it repeats."""
    name = (argument.metavar or argument.name).upper() + ("…" if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def paragraphs(text: str | None) -> str:
    """Return a help text with its form feeds and the parser's own paragraph marks taken off."""
    return (text or "").replace("\b", "").split("\f")[0].strip()


def options_table(command: Any) -> str:
    """Return the options of a command, a row each; a command without any has an empty text."""
    options = [option for option in command.params if option.param_type_name == "option" and not option.hidden]
    if not options:
        return ""
    rows = [f"| {names(option)} | {cell(describe(option))} |" for option in options]
    return "\n".join(["| option | |", "| --- | --- |", *rows, ""])


def names(option: Any) -> str:
    """Return an option's names and what it takes."""
    spelled = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    return spelled if option.is_flag else f"{spelled} `{option.metavar or value_name(option)}`"


def value_name(option: Any) -> str:
    """Return the name of an option's value: its choices where they are few, else its type."""
    kind = option.type_descriptor.annotation
    if get_origin(kind) is Literal:
        return "\\|".join(map(str, get_args(kind)))
    return {str: "TEXT", int: "INTEGER", float: "NUMBER"}.get(kind, "VALUE")


def describe(option: Any) -> str:
    """Return an option's help, with its default where that is a value that the help does not name."""
    text = (option.help or "").strip()
    default = option.default
    if callable(default) or default in (None, False, True, "", (), []) or "[default" in text:
        return text
    if isinstance(default, (list, tuple)):
        default = ", ".join(map(str, default))
    return f"{text} [default: {default}]"


def cell(text: str) -> str:
    """Return text that can stand in a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "\\|")
