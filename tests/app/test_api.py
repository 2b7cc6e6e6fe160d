"""The named endpoints, through gradio_client and a real server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from qdiff.evaluation.images import read_metadata

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def client(site):
    from gradio_client import Client

    client = Client(site.url, verbose=False, analytics_enabled=False)
    yield client
    client.close()


def test_the_endpoints_are_the_documented_ones(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert set(named) == {
        "/generate", "/compare", "/models", "/cancel", "/build", "/build_state", "/stop_build", "/status",
    }  # fmt: skip
    parameters = [parameter["parameter_name"] for parameter in named["/generate"]["parameters"]]
    assert parameters == [
        "prompt", "negative_prompt", "model", "engine", "steps", "guidance", "seed", "width", "height", "pictures", "frames",
    ]  # fmt: skip


def test_generate_gives_files_and_facts(client):
    told = client.predict("a red <b>apple</b>", steps=2, seed=9, engine="openvino", pictures=2, api_name="/generate")
    assert told["settings"]["seed"] == 9 and told["engine"] == "openvino" and told["seconds_per_step"] > 0
    infos = [read_metadata(Path(str(file))) for file in told["pictures"]]
    assert [(info.prompt, info.seed) for info in infos] == [("a red <b>apple</b>", 9), ("a red <b>apple</b>", 10)]


def test_compare_gives_float_and_engines(client):
    told = client.predict("a cat", engines=["openvino"], steps=2, seed=3, api_name="/compare")
    assert [row["engine"] for row in told["engines"]] == ["float", "openvino"]
    assert told["engines"][1]["psnr_db"] > 10


def test_models_say_what_runs(client):
    (run, *_) = client.predict(api_name="/models")
    engines = {engine["name"]: engine["why_not"] for engine in run["engines"]}
    assert engines["float"] == engines["openvino"] == "" and "GPU" in engines["tensorrt_rtx"]


def test_status_and_cancel(client):
    assert client.predict(api_name="/status") == {"waiting": 0, "busy": False, "building": False}
    assert client.predict(api_name="/cancel") == 0
    assert client.predict(api_name="/build_state") == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "<script>" * 100}, "800 characters"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "steps": 10**9}, "out of range"),
        ({"prompt": "a", "steps": "many"}, "steps"),
        ({"prompt": "a", "model": "<img src=x>"}, "&lt;img"),
    ],
)
def test_errors_are_words_of_ours(client, arguments, words):
    with pytest.raises(Exception) as caught:
        client.predict(**arguments, api_name="/generate")
    text = str(caught.value)
    assert words in text and "Traceback" not in text and ".py" not in text


def test_the_pages_own_events_are_not_for_programs(client):
    from gradio_client.exceptions import AppError

    private = [index for index, endpoint in client.endpoints.items() if endpoint.api_name in (None, False)]
    assert private == [] or all(not client.endpoints[index].is_valid for index in private)
    with pytest.raises((ValueError, AppError)):
        client.predict(api_name="/begin")


@pytest.mark.parametrize("address", [{"path": "/etc/hostname"}, {"path": "x", "url": "http://127.0.0.1:1/x"}])
def test_a_file_in_place_of_a_prompt_is_not_read(site, address):
    """As a program without gradio_client could send it."""
    prompt = {**address, "meta": {"_type": "gradio.FileData"}}
    body = json.dumps({"data": [prompt, "", "", "", 1, None, 1, None, None, 1]}).encode()
    asked = urllib.request.Request(f"{site.url}gradio_api/call/generate", body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{site.url}gradio_api/call/generate/{event}", timeout=60) as answer:
        told = answer.read().decode()
    assert "event: error" in told and "hostname" not in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("build", ["pixart", "int8", "quick", 1.5]), "not a list of names"),
        (("build", [[], "int8", "quick", None]), "unknown model"),
        (("build", [{"a": 1}, "none", "quick", None]), "unknown model"),
        (("compare", ["a cat", "", {"a": 1}, 1, 1]), "not a list of names"),
        (("generate", ["a cat", "", "", "", 1, ["x"], 1, 64, 64, 1, None]), "guidance"),
        (("generate", ["a cat", "", "", "", 1, 10**400, 1, 64, 64, 1, None]), "guidance"),
        (("generate", ["a cat"]), "do not fit"),
    ],
)
def test_values_of_the_wrong_shape_are_refused_in_words(site, capfd, caplog, call, words):
    """Nothing of it is a bug of the page: no incident, and no traceback in the log."""
    name, data = call
    body = json.dumps({"data": data}).encode()
    url = f"{site.url}gradio_api/call/{name}"
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/{event}", timeout=60) as answer:
        text = answer.read().decode()
    assert "event: error" in text and words in text, text
    assert "incident" not in caplog.text and "Traceback" not in capfd.readouterr().err


def test_a_call_that_nobody_made_has_no_events(site, capfd):
    with urllib.request.urlopen(f"{site.url}gradio_api/call/none/x", timeout=60) as answer:
        answer.read()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["run/predict", "call/none", "queue/join"])
def test_an_event_that_the_page_does_not_have_is_no_error_of_the_server(site, capfd, path):
    asked = urllib.request.Request(
        f"{site.url}gradio_api/{path}", b'{"data": [], "session_hash": "x"}', {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(asked, timeout=60)
    assert 400 <= caught.value.code < 500 and "Traceback" not in capfd.readouterr().err
