"""A service and a real web server on the finished run of the smallest model, and a browser that drives the page."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdiff.app.limits import Limits
from qdiff.app.service import Service
from qdiff.app.settings import Settings
from qdiff.app.sources import Sources, Weights
from tests.waiting import wait_until

TINY = Weights("pixart", "random:pixart-tiny")


@pytest.fixture(scope="session")
def make_service(finished, tmp_path_factory) -> Iterator[Callable[..., Service]]:
    """Services on the finished run: ``make_service(Limits(waiting=2), memory_bytes=…)``."""
    made: list[Service] = []

    def make(limits: Limits | None = None, runs: list[Path] | None = None, **options: Any) -> Service:
        sources = Sources([finished.path] if runs is None else runs, tmp_path_factory.mktemp("built"), [TINY])
        made.append(Service(sources, limits or Limits(), **options))
        return made[-1]

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope="session")
def service(make_service) -> Service:
    """One service for all tests that leave nothing behind in it."""
    return make_service()


@pytest.fixture
def draw(service) -> Callable[..., Any]:
    """Draws with few steps and waits: ``draw(prompt="a cat", engine="float")`` gives the final update."""

    def one(client: str = "test", **settings: Any) -> Any:
        wanted = {"prompt": "a red apple", "steps": 2, "seed": 1, **settings}
        return service.generate(Settings.make(**wanted), client).wait(120)

    return one


@dataclass(frozen=True)
class Site:
    """A running server: its address, the service behind it, and the folder of its files."""

    url: str
    service: Service
    files: str


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """A port that nobody listens on."""
    return _port()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[[Service], Site]]:
    """The page of a service on a real server in a thread."""
    import uvicorn

    from qdiff.app.server import build_app, make_server

    running = []

    def start(service: Service) -> Site:
        port = _port()
        config = uvicorn.Config(
            build_app(service, "127.0.0.1"), host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1
        )
        server = make_server(config, service)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started or not thread.is_alive(), 60, "the server starts")
        assert thread.is_alive(), "the server did not start"
        return Site(f"http://127.0.0.1:{port}/", service, os.environ["GRADIO_TEMP_DIR"])

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="session")
def site(service, serve) -> Site:
    """The page on the service that all tests share."""
    return serve(service)


@pytest.fixture
def page(browser, site, monkeypatch) -> Iterator[Any]:
    """The page, opened; the test fails if the browser reports an error or asks another host for anything."""
    monkeypatch.setenv(
        "GRADIO_TEMP_DIR", site.files
    )  # a server has a process of its own, but here there may be another
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, trouble = context.new_page(), []
    page.on("pageerror", lambda error: trouble.append(f"script: {error}"))
    page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((site.url, "data:", "blob:")) else trouble.append(asked.url),
    )
    page.goto(site.url)
    page.wait_for_selector("#prompt textarea")
    yield page
    context.close()
    assert not trouble
