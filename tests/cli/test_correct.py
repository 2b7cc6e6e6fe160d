"""``qdiff correct``: methods are tried on pictures, one is kept or none, and the run's quantized engines follow it."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

PROMPT = ["--prompt", "a red apple", "--seed", 5]


def correct(cli, run, *options: object):
    return cli(
        "correct", run, "--method", "q_drift", "--method", "ptqd", "--engine", "eager", "--pictures", 2, *options
    )


def picture(cli, run, engine: str, path) -> bytes:
    assert cli("generate", run, *PROMPT, "--engine", engine, "-o", path).code == 0
    with Image.open(path) as image:
        return image.tobytes()


def test_what_gains_nothing_is_not_applied(cli, spoilt, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.stages.correct.MINIMUM_GAIN", {"float": math.inf})
    before = picture(cli, spoilt, "openvino", tmp_path / "before.png")
    result = correct(cli, spoilt, "--json").json
    assert [row["method"] for row in result["tried"]] == ["q_drift", "ptqd"] and result["method"] is None
    assert all(row["counts"] == row["gain"] for row in result["tried"]), "this goal has no control"
    assert "nothing is applied" in correct(cli, spoilt).out
    assert picture(cli, spoilt, "openvino", tmp_path / "after.png") == before


def test_what_is_kept_is_applied_to_quantized_engines_alone(cli, fails, spoilt, tmp_path, monkeypatch):
    monkeypatch.setattr("qdiff.stages.correct.MINIMUM_GAIN", {"float": -math.inf})
    before = {name: picture(cli, spoilt, name, tmp_path / f"{name}.png") for name in ("float", "eager", "openvino")}
    compared = json.loads((spoilt / "run.json").read_text())["stages"]
    assert "compare" in compared
    kept = correct(cli, spoilt, "--json").json["method"]
    stages = json.loads((spoilt / "run.json").read_text())["stages"]
    assert kept in ("q_drift", "ptqd") and "compare" not in stages and "build:openvino" in stages
    assert "is applied from now on" in correct(cli, spoilt).out, "done already"
    after = {name: picture(cli, spoilt, name, tmp_path / f"{name}-2.png") for name in before}
    assert after["float"] == before["float"]
    assert after["eager"] != before["eager"] and after["openvino"] != before["openvino"]
    row = cli("compare", spoilt, "--engine", "eager", "--pictures", 1, "--json").json["engines"][0]
    assert row["name"] == "eager"

    (spoilt / "correction.json").write_text((spoilt / "correction.json").read_text() + "\n")
    fails(5, "correction.json", "generate", spoilt, *PROMPT, "--engine", "eager", "-o", tmp_path / "x.png")
    assert cli("quantize", spoilt, "--recipe", "fp8", "--force").code == 0
    assert not any((spoilt / name).exists() for name in ("correction.json", "compare.json", "report.html"))
    picture(cli, spoilt, "eager", tmp_path / "y.png")  # another quantization: the correction is forgotten


def test_a_killed_search_does_not_make_pictures_again(cli, spoilt, monkeypatch):
    """Four steps: the search is tried unasked. It is cut off, and goes on to the same result."""
    from qdiff.stages.generate import Session

    monkeypatch.setattr("qdiff.correction.q_sched.REACH", (-1, 0, 1))
    monkeypatch.setattr("qdiff.stages.correct.SEARCH_PICTURES", 1)
    command = ("correct", spoilt, "--engine", "eager", "--pictures", 1, "--json")
    whole, made = Session.pictures, 0

    def counted(self, *arguments, **options):
        nonlocal made
        if made == limit:
            raise KeyboardInterrupt
        made += self.engine == "eager"
        return whole(self, *arguments, **options)

    monkeypatch.setattr(Session, "pictures", counted)
    limit = 9
    assert cli(*command).code == 130
    (spoilt / "correction" / "another").mkdir()  # an earlier try with other settings
    limit = -1
    resumed = cli(*command).json
    assert [row["method"] for row in resumed["tried"]] == ["ptqd", "q_drift", "q_sched"]
    assert not (spoilt / "correction").exists()
    together, made = made, 0
    anew = cli(*command, "--force").json
    assert anew["tried"] == resumed["tried"] and made == together


def test_bad_requests(fails, finished, spoilt):
    (spoilt / "correction.json").mkdir()
    fails(3, "is a folder", "correct", spoilt, "--pictures", 1)
    fails(3, "q_drift", "correct", finished.path, "--method", "q_drft")
    fails(2, "aims at", "correct", finished.path, "--engine", "float")
    fails(2, "bundled models alone", "correct", finished.path, "--goal", "prompt")
    fails(2, "pictures", "correct", finished.path, "--pictures", 0)
    fails(2, "between 1 and", "correct", finished.path, "--pictures", 1000)
    fails(3, "was not built", "correct", finished.path, "--engine", "tensorrt")
