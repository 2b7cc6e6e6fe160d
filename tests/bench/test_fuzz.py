"""A small share of the random command lines and requests of :mod:`bench.fuzz`, and that it sees what it is there for."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from bench.fuzz import commands, page
from bench.fuzz.material import DAMAGES, Material


@pytest.mark.slow
def test_random_command_lines(finished, tmp_path):
    faults, codes = commands.check_commands(finished.path, tmp_path / "work", 150, seed=1, limit=90)
    assert not faults, "\n".join(faults)
    assert sum(codes.values()) == 150 and {0, 2, 3, 5} <= codes.keys(), codes


@pytest.mark.slow
def test_random_requests(finished, tmp_path):
    """In a process of its own: what the server's threads leave behind ends with it, and a crash fails this test alone."""
    (tmp_path / "built").mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        faults, statuses = process.submit(_requests, finished.path, tmp_path / "built").result()
    assert not faults, "\n".join(faults)
    assert sum(statuses.values()) == 60 and {200, 404} <= statuses.keys(), statuses


def test_a_bug_a_traceback_and_silence_are_seen():
    """In a process of its own: an alarm in one that has run engines ends it by signal 11, now and then."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(_seen).result()


def _seen() -> None:
    from qdiff.stages import inspection

    def broken():
        raise ZeroDivisionError("of ours")

    inspection.models = broken  # type: ignore[assignment]
    code, text, seconds = commands.run_command(["models"], 60)
    assert code == 1 and "exit 1" in commands._fault(code, text, seconds, 60)
    inspection.models = _wait  # type: ignore[assignment]
    code, text, seconds = commands.run_command(["models"], 0.5)
    assert code == -2 and "no answer after 0.5 s" in commands._fault(code, text, seconds, 0.5)
    assert "traceback" in commands._fault(2, "Traceback (most recent call last):\nerror: x", 0, 60)
    assert not commands._fault(3, "error: there is no such file", 0, 60)


def _requests(run: Path, folder: Path) -> tuple[list[str], Counter[int]]:
    return page.check_requests(run, folder, 60, seed=1, limit=90)


def _wait():
    import time

    time.sleep(30)


@pytest.mark.slow
def test_every_command_and_option_has_its_turn(finished, tmp_path):
    """As typer declares them: nothing has to be listed twice."""
    import typer

    from qdiff.cli import commands as cli

    material, rng = Material(finished.path, tmp_path / "work"), random.Random(0)
    words = [word for _ in range(3_000) for word in commands.command_line(rng, material)]
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        assert name in words
        for option in (one for one in command.params if one.param_type_name == "option"):
            assert any(spelling in words for spelling in option.opts), (name, option.opts)
    assert all(any(f"/runs/{name}" in word for word in words) for name in ("whole", *DAMAGES))
    again = Material(finished.path, tmp_path / "again")
    one, other = (commands.command_line(random.Random(7), each) for each in (material, again))
    assert [word.replace(str(tmp_path / "work"), "") for word in one] == [
        word.replace(str(tmp_path / "again"), "") for word in other
    ]


def test_the_material_is_as_damaged_as_it_says(finished, tmp_path, cli):
    material = Material(finished.path, tmp_path / "work")
    assert cli("inspect", material.runs["whole"]).code == 0
    for name in ("flipped-plan", "cut-weights", "cut-shard", "no-graph"):
        assert cli("inspect", material.runs[name]).code == 5, name
    assert cli("inspect", material.runs["cut-manifest"]).code == 0, "its copy is taken"
    (material.runs["whole"] / "plan.json").write_text("{}")
    material.restore("whole")
    assert cli("inspect", material.runs["whole"]).code == 0
