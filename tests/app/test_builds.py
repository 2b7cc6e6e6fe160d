"""Builds in their own process: choices, one at a time, cut off and gone on with, and a failure that is told."""

from __future__ import annotations

import pytest

from qdiff.app.builds import _expected
from qdiff.app.jobs import BusyError
from qdiff.app.sources import Sources, Weights
from qdiff.errors import InputError
from tests.waiting import wait_until

TINY = "pixart random:pixart-tiny"


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (("owner/name", "int8", "quick", ["openvino"]), "unknown model"),
        ((TINY, "../../recipe.yaml", "quick", ["openvino"]), "unknown recipe"),
        ((TINY, "int8", "10000", ["openvino"]), "unknown budget"),
        ((TINY, "int8", "quick", ["eager"]), "unknown engine"),
        ((TINY, "int8", "quick", []), "No engine"),
    ],
)
def test_only_what_is_on_the_lists_is_built(service, choices, words):
    with pytest.raises(InputError, match=words):
        service.start_build(*choices)
    assert service.builds.state() is None or service.builds.state().state != "running"


def wait(builds, until, seconds: float = 120):
    """Return the state of the builds once ``until`` is true of it."""

    def state():
        now = builds.state()
        return now if until(now) else None

    return wait_until(state, seconds, "the build")


@pytest.mark.slow
def test_one_at_a_time_stopped_and_gone_on_with(make_service):
    service = make_service()
    service.start_build(TINY, "fp8", "quick", ["openvino"])
    with pytest.raises(BusyError, match="running already"):
        service.start_build(TINY, "int8", "quick", ["openvino"])
    wait(service.builds, lambda state: ("calibrate", "done") in state.stages)
    service.builds.cancel()
    assert service.builds.state().state == "cancelled"
    service.builds._build.process.wait(10)
    service.start_build(TINY, "fp8", "quick", ["openvino"])
    running = wait(service.builds, lambda state: state.share > 0)
    assert "calibrate" not in dict(running.stages), "what was finished is not done again"
    done = wait(service.builds, lambda state: state.state != "running")
    assert done.state == "done", (done.error, done.log)
    source = service.sources[f"{done.run} · fp8"]
    assert {engine.name for engine in source.engines()} >= {"float", "eager", "openvino"}


@pytest.mark.slow
def test_a_build_that_fails_says_why(make_service):
    service = make_service()
    service.sources.workspace.joinpath("pixart-random-pixart-tiny-int8-quick").write_text("in the way")
    service.start_build(TINY, "int8", "quick", ["openvino"])
    state = wait(service.builds, lambda state: state.state != "running")
    assert state.state == "failed" and "is a file, not a run folder" in state.error
    assert str(service.sources.workspace) not in state.error


def test_the_time_comes_from_runs_of_the_same_model(finished, tmp_path):
    from qdiff.runs.run import Run

    sources = Sources([finished.path], tmp_path)
    expected = _expected(tmp_path, Weights("pixart", "random:pixart-tiny"), 32, ["openvino"], sources)
    assert list(expected) == [
        "start", "calibrate", "quantize", "export:onnxruntime", "build:openvino", "compare", "report",
    ]  # fmt: skip
    assert expected["quantize"] == max(0.5, Run(finished.path).entry("quantize")["seconds"])
