"""The documentation site builds strictly: links and anchors lead somewhere, and every page is in the navigation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
OTHER_HOST = re.compile(rb"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"(?:https?:)?//[^\"]+\"")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Return the folder of a site that was built strictly."""
    pytest.importorskip("material", reason="the group docs is not installed")
    pytest.importorskip("mkdocstrings_handlers.python", reason="the group docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"make docs fails:\n{done.stdout}\n{done.stderr}"
    return folder


def test_no_page_asks_another_host(site):
    asking = [
        page.relative_to(site).as_posix() for page in site.rglob("*.html") if OTHER_HOST.search(page.read_bytes())
    ]
    assert not asking


def test_every_command_is_described(site):
    import typer

    from qdiff.cli.commands import app

    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    assert len(commands) > 5
    missing = [name for name in commands if f"qdiff {name} " not in page]
    assert not missing


def test_every_public_name_is_described(site):
    import qdiff

    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    missing = [name for name in qdiff.__all__ if f"qdiff.{name}" not in page]
    assert not missing
