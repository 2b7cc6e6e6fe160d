"""What tests of the core share: a recorded trajectory."""

from __future__ import annotations

import pytest

from qdiff.statistics import Statistics
from qdiff.trajectory import Trajectory

PROMPTS = ["a red apple", "a rocket on a blue background", "cheese", "two cats, asleep", "a green tree"]
TINY = ("--model", "pixart", "--weights", "random:pixart-tiny", "--steps", "4", "--batch", "3")


@pytest.fixture(scope="session")
def recorded(cli, tmp_path_factory):
    """Five prompts in two shards, four steps."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    cli("calibrate", *TINY, "--prompts", folder / "prompts.txt", "-o", folder / "run", "--json").json  # noqa: B018
    folder = folder / "run" / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")
