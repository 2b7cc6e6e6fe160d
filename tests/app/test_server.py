"""Who may connect and what they may reach, asked over HTTP; accounts; metrics; the end by a signal."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest

from qdiff.app.server import Guard, is_loopback, read_accounts
from qdiff.errors import InputError
from tests.waiting import wait_until


def ask(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, str]:
    """Status and text of an answer."""
    request = urllib.request.Request(url, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


ATTACKS = [
    "gradio_api/file=/etc/passwd",
    "gradio_api/file=../../etc/passwd",
    "gradio_api/file=" + quote("/etc/passwd", safe=""),
    "gradio_api/file=" + quote(quote("/etc/passwd", safe=""), safe=""),
    "gradio_api/file=http://127.0.0.1:1/x",
    "gradio_api/file=file:///etc/passwd",
    "gradio_api/file=pyproject.toml",
    "gradio_api/file=%00",
    "gradio_api/file/etc/passwd",
    "gradio_api/proxy=http://127.0.0.1:1/x",
    "gradio_api/upload_progress?upload_id=x",
    "gradio_api/stream/x/y/z/playlist.m3u8",
    "gradio_api/custom_component/x/y/z/w",
    "gradio_api/vibe-code",
    "gradio_api/deep_link",
    "gradio_api/run-history/buckets",
    "gradio_api/runs",
    "gradio_api/dev/reload",
    "monitoring",
    "docs",
    "openapi.json",
    "static/../../../etc/passwd",
    "assets/" + quote("../../../../etc/passwd", safe=""),
]


@pytest.mark.parametrize("path", ATTACKS)
def test_what_the_page_does_not_need_is_closed(site, path):
    status, text = ask(site.url + path)
    assert status in (403, 404) and "root:" not in text and "Traceback" not in text


def test_the_runs_files_are_not_to_be_had(site, finished):
    for name in ("run.json", "plan.json", "images/float/000.png"):
        assert ask(f"{site.url}gradio_api/file={finished.path / name}")[0] == 403


@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/component_server", "gradio_api/process_recording"])
def test_uploads_are_closed(site, path):
    assert ask(site.url + path, "POST", b"x" * 10)[0] == 404


def test_large_bodies_are_refused(site):
    assert ask(f"{site.url}gradio_api/queue/join", "POST", b"x" * 200_000)[0] == 413


def test_other_names_for_this_machine_are_refused(site):
    assert ask(site.url, Host="attacker.example")[0] == 400


def test_other_origins_get_no_answer_that_a_browser_gives_them(site):
    request = urllib.request.Request(f"{site.url}config", headers={"Origin": "https://attacker.example"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert "access-control-allow-origin" not in {name.lower() for name in answer.headers}
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


def test_other_sites_cannot_make_it_work(site):
    """A form of another site needs no permission to be sent; only its answer is kept from the sender."""
    body = b'{"data": ["pixart", "int8", "quick", null]}'
    for origin in ("https://attacker.example", "null", site.url.replace("127.0.0.1", "localhost").rstrip("/")):
        assert ask(f"{site.url}gradio_api/call/build", "POST", body, Origin=origin)[0] == 403
    assert not site.service.builds.running


def test_the_config_tells_nothing_about_the_machine(site, finished):
    text = ask(f"{site.url}config")[1]
    assert str(finished.path) not in text and str(finished.path.parent) not in text


def test_metrics_are_prometheus_text(site):
    from prometheus_client.parser import text_string_to_metric_families

    status, text = ask(f"{site.url}metrics")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert status == 200 and {
        "qdiff_requests", "qdiff_queue_seconds", "qdiff_compute_seconds", "qdiff_queue_length", "qdiff_resident_bytes",
    } <= names  # fmt: skip


def test_only_files_of_the_page_are_ours(tmp_path):
    files = tmp_path / "page"
    files.mkdir()
    (tmp_path / "secret").write_text("x")
    (files / "link").symlink_to(tmp_path / "secret")
    guard = Guard(None, files)
    assert guard._is_ours(f"{files}/a.png")
    for name in ("link", f"{files}/link", f"{files}/../secret", f"{tmp_path}/page2/a", "a\x00b", "HTTP://x", "data:x"):
        assert not guard._is_ours(name)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.0.3", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host, loopback):
    assert is_loopback(host) is loopback


def test_accounts_come_from_a_private_file(tmp_path):
    file = tmp_path / "accounts"
    with pytest.raises(InputError, match="no file"):
        read_accounts(file)
    file.write_text("# mine\nann:correct horse\nbob:battery:staple\n")
    file.chmod(0o644)
    with pytest.raises(InputError, match="read by others"):
        read_accounts(file)
    file.chmod(0o600)
    assert read_accounts(file) == {"ann": "correct horse", "bob": "battery:staple"}
    for text in ("", "ann", "ann:short", ":12345678"):
        file.write_text(text)
        with pytest.raises(InputError):
            read_accounts(file)


def test_off_loopback_needs_accounts(fails):
    fails(2, ["--host 0.0.0.0 can be reached from other machines", "--auth"], "demo", "--host", "0.0.0.0")


def test_what_was_named_and_cannot_be_used_is_an_error(fails, tmp_path):
    fails(3, "is not a run folder", "demo", tmp_path)
    fails(2, "unknown model", "demo", "--allow", "nothing", "-o", tmp_path / "runs")
    (tmp_path / "file").write_text("")
    fails(2, "is a file", "demo", "-o", tmp_path / "file")


def test_with_accounts_nothing_is_open_without_one(make_service):
    """The application itself, without a network."""
    from starlette.testclient import TestClient

    from qdiff.app.server import build_app

    app = build_app(make_service(), "0.0.0.0", {"ann": "correct horse"})
    client = TestClient(app, base_url="http://demo.example")
    assert client.get("/config").status_code == 401
    assert client.get("/metrics").status_code == 401
    assert client.post("/gradio_api/queue/join", json={"data": [], "session_hash": "x"}).status_code == 401
    basic = {
        name: f"Basic {base64.b64encode(name.encode()).decode()}" for name in ("ann:correct horse", "ann:wrong", "x:")
    }
    assert client.get("/metrics", headers={"Authorization": basic["ann:wrong"]}).status_code == 401
    assert client.get("/metrics", headers={"Authorization": basic["x:"]}).status_code == 401
    assert client.get("/metrics", headers={"Authorization": basic["ann:correct horse"]}).status_code == 200
    assert client.post("/login", data={"username": "ann", "password": "wrong"}).status_code == 400
    assert client.post("/login", data={"username": "ann", "password": "correct horse"}).status_code == 200
    assert client.get("/config").status_code == 200


@pytest.mark.slow
def test_a_signal_ends_the_server_in_order(finished, tmp_path, free_port):
    """``python -m qdiff.app``, ended while a picture is drawn: exit code 0, and nothing is left in the temporary folder."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "qdiff.app",
        str(finished.path),
        "--port",
        str(free_port),
        "-o",
        str(tmp_path / "runs"),
    ]
    server = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)}, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{free_port}/"

    def answers() -> bool:
        assert server.poll() is None, server.communicate()[1]
        try:
            return ask(f"{url}metrics")[0] == 200
        except OSError:
            return False

    wait_until(answers, 120, "the server answers")
    from gradio_client import Client

    client = Client(url, verbose=False, analytics_enabled=False)
    client.submit("a cat", steps=100, width=512, height=512, engine="float", api_name="/generate")
    wait_until(lambda: client.predict(api_name="/status")["busy"])
    server.send_signal(signal.SIGTERM)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 0 and "Traceback" not in errors, errors
    assert list(temporary.glob("qdiff*")) == []
