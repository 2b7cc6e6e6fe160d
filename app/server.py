"""The web server around the page: who may connect, what they may reach, and how it ends.

Gradio is a toolbox for other trust models too: it has routes that take uploads, fetch addresses for the caller, watch the
server or edit its code. The page needs none of them, so what may be reached is a list (:data:`OPEN`), not what is left after
forbidding some: a route that a new Gradio brings is closed until somebody opens it here.

The server ends by itself on SIGINT and SIGTERM: it takes no new requests, stops the running picture at its next step, stops
the build (whose finished stages are kept), and removes its temporary files.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import logging
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from urllib.parse import unquote

from qdiff import device
from qdiff.app.limits import Limits
from qdiff.errors import InputError, MissingDependencyError, UsageError
from qdiff.files import read_user_text

if TYPE_CHECKING:
    import fastapi
    import gradio as gr
    import uvicorn
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from qdiff.app.service import Service

log = logging.getLogger("qdiff.app")
P = ParamSpec("P")
T = TypeVar("T")

# Path prefixes that end in / or = open what is below them; all others are exact.
OPEN = {
    "GET": (
        "/", "/config", "/theme.css", "/assets/", "/static/", "/svelte/", "/favicon.ico", "/robots.txt", "/manifest.json",
        "/logout", "/metrics", "/gradio_api/info", "/gradio_api/openapi.json", "/gradio_api/queue/data", "/gradio_api/heartbeat/",
        "/gradio_api/file=", "/gradio_api/startup-events", "/gradio_api/app_id", "/gradio_api/user", "/gradio_api/login_check",
        "/gradio_api/theme.css", "/gradio_api/call/",
    ),
    "POST": (
        "/login", "/gradio_api/run/predict", "/gradio_api/queue/join", "/gradio_api/cancel", "/gradio_api/reset",
        "/gradio_api/call/",
    ),
}  # fmt: skip
_BODY_BYTES = 128 * 1024  # the largest request is a page's settings and its history
_HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
        "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_accounts(path: Path) -> dict[str, str]:
    """Return the ``name:password`` lines of a file that only its owner may read.

    Raises:
        InputError: no such file, readable by others, no account in it, or a password under eight characters.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}", "write one line name:password for each account into it")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(f"{path} can be read by others", f"run: chmod 600 {path}")
    accounts = {}
    for number, line in enumerate(read_user_text(path, "the accounts file", 1_000_000).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, colon, password = line.partition(":")
        if not (name and colon and len(password) >= 8):
            raise InputError(f"line {number} of {path} is not name:password", "passwords have at least 8 characters")
        accounts[name] = password
    if not accounts:
        raise InputError(f"{path} holds no account", "write one line name:password for each")
    return accounts


def require_accounts(host: str, accounts: Mapping[str, str] | None) -> None:
    """Refuse to serve other machines without accounts.

    Raises:
        UsageError: ``host`` is not loopback and there are no accounts.
    """
    if not is_loopback(host) and not accounts:
        raise UsageError(
            f"--host {host} can be reached from other machines, and there are no accounts",
            "add --auth FILE (lines name:password), or leave --host out",
        )


class Guard:
    """ASGI middleware: the list of open paths, the size of bodies, and headers that keep the browser from reaching out."""

    def __init__(self, app: ASGIApp, files: Path) -> None:
        self.app, self.files = app, files.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is not None:
            status, words = refused
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": words.encode()})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value) for name, value in message.get("headers", []) if name.lower().decode() not in _HEADERS
                ]
                message["headers"] = kept + [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        try:
            await self.app(scope, receive, guarded)
        except RuntimeError as error:  # Gradio refuses streams of calls that it does not know after they began
            if "response already started" not in str(error):
                raise
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        path, method = str(scope["path"]), str(scope["method"])
        allowed = OPEN.get("GET" if method == "HEAD" else method, ())
        if method == "GET" and path.rstrip("/") == "/login":
            allowed = (path,)
        if not any(
            path.startswith(one) if one != "/" and one[-1] in "/=" else path in (one, f"{one}/") for one in allowed
        ):
            return 404, "There is nothing here."
        if "/file=" in path and not self._is_ours(path.partition("/file=")[2]):
            return 403, "This file is not to be had."
        if method == "POST":
            headers = dict(scope["headers"])
            origin = headers.get(b"origin")
            if origin is not None and origin.partition(b"://")[2] != headers.get(b"host"):
                return (
                    403,
                    "This was asked by another site's page.",
                )  # it may not read the answer, but it must not build either
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                return 411, "Say how long the request is."
            if int(length) > _BODY_BYTES:
                return 413, "The request is too large."
        return None

    def _is_ours(self, name: str) -> bool:
        """Return whether Gradio keeps the file for this page: only such files are served, whatever Gradio would serve
        besides.
        """
        name = unquote(name)
        if "\x00" in name or re.match(r"[a-z][a-z0-9+.-]*:", name, re.I):
            return False
        return (Path("/") / name).resolve().is_relative_to(self.files)


def build_app(service: Service, host: str, accounts: Mapping[str, str] | None = None) -> fastapi.FastAPI:
    """Return the FastAPI application: page, API and ``/metrics`` behind the guard.

    Raises:
        UsageError: ``host`` is not loopback and there are no accounts.
    """
    require_accounts(host, accounts)
    files = service.folder / "page"
    files.mkdir(exist_ok=True)
    os.environ |= {"GRADIO_TEMP_DIR": str(files), "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    import fastapi
    import gradio as gr
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from qdiff.app.page import STYLE, build_page
    from qdiff.app.theme import theme

    def may_enter(name: str, password: str) -> bool:
        known = (accounts or {}).get(name, "")
        right = hmac.compare_digest(known.encode(), password.encode()) and bool(known)
        if not right:
            time.sleep(0.5)
        return right

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    def metrics(request: Request) -> fastapi.Response:
        if accounts and not _basic(request.headers.get("authorization", ""), may_enter):
            return fastapi.Response("", 401, {"www-authenticate": 'Basic realm="qdiff"'})
        return fastapi.Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.add_route("/metrics", metrics)
    page = build_page(service)
    _refuse_quietly(page)
    gr.mount_gradio_app(
        app, page, path="/", server_name=host, auth=may_enter if accounts else None, show_error=False, ssr_mode=False,
        allowed_paths=[], max_file_size=1, enable_monitoring=False, run_history=False, mcp_server=False, pwa=False,
        footer_links=["api", "settings"], theme=theme(), head=f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
    )  # fmt: skip
    _answer_unknown_events(app)
    app.add_middleware(Guard, files=files)
    if is_loopback(host):  # a page of another site that points its name at this machine is refused (DNS rebinding)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "::1", host])
    return app


def _answer_unknown_events(app: fastapi.FastAPI) -> None:
    """Answer a request that names no event of the page with an error of the caller; Gradio would call it one of the
    server.
    """
    import fastapi
    from gradio.route_utils import FnIndexInferError
    from starlette.routing import Mount

    async def answer(request: Request, error: Exception) -> fastapi.Response:
        return fastapi.Response("There is no such event.", 404, media_type="text/plain")

    for route in app.routes:
        if isinstance(route, Mount) and hasattr(route.app, "add_exception_handler"):
            route.app.add_exception_handler(FnIndexInferError, answer)


def _refuse_quietly(page: gr.Blocks) -> None:
    """Tell the caller when values do not fit an event's components, without a traceback of Gradio's in the log."""
    vars(page)["preprocess_data"] = _with_our_words(page.preprocess_data)


def _with_our_words(preprocess: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Return Gradio's check of values with an error of ours."""
    import gradio as gr

    async def checked(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return await preprocess(*arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except Exception as error:
            log.info("values that do not fit: %s", str(error)[:200])
            message = (
                "These values do not fit: give all that the API's description (/gradio_api/info) names, in its order."
            )
            raise gr.Error(message, print_exception=False) from None

    return checked


def _basic(header: str, may_enter: Callable[[str, str], bool]) -> bool:
    import base64
    import binascii

    kind, _, value = header.partition(" ")
    try:
        name, _, password = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return False
    return kind.lower() == "basic" and may_enter(name, password)


def serve(service: Service, host: str, port: int, accounts: Mapping[str, str] | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises:
        UsageError: the port is taken.
    """
    import uvicorn

    app = build_app(service, host, accounts)
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3, server_header=False
    )
    server = make_server(config, service)
    server.run()
    if not server.started:
        raise UsageError(f"cannot listen on {host}:{port}", "another program is there: choose another --port")


def _not_about_the_end(record: logging.LogRecord) -> bool:
    """Return whether a record is worth printing: streams to open pages are cut off when the server ends, and uvicorn would print
    each as an error.
    """
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and "timeout graceful shutdown exceeded" not in record.getMessage()


def make_server(config: uvicorn.Config, service: Service) -> uvicorn.Server:
    """Return a uvicorn server that stops the service's work when it is told to end, not when the last connection has
    gone.
    """
    import uvicorn

    logging.getLogger("uvicorn.error").addFilter(_not_about_the_end)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            threading.Thread(target=service.stop, daemon=True).start()
            super().handle_exit(sig, frame)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Leave signals to the caller: uvicorn would raise the signal anew when it is done, which would skip what
            comes after it here.
            """
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    return Server(config)


def demo(
    runs: Sequence[Path],
    host: str,
    port: int,
    auth: Path | None,
    output: Path,
    allow: Sequence[str],
    memory: float | None,
) -> None:
    """Check the arguments, load the first model, and serve the page of ``qdiff demo``.

    Raises:
        UsageError: a host that needs accounts, a port that is taken.
        InputError: a folder that is no run, an unusable file of accounts.
        MissingDependencyError: the extra ``app`` is not installed.
    """
    import importlib.util

    for package in ("gradio", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            fix = "pip install 'qdiff-deploy[app]'"
            raise MissingDependencyError(f"the web page needs the package {package}, which is not installed", fix)
    if auth is None:
        require_accounts(host, None)
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file, not a folder", "choose another one with --output")
    accounts = read_accounts(auth) if auth is not None else None
    from qdiff.app.service import Service
    from qdiff.app.sources import Sources, Weights

    # Its float pictures are timed beside engines of the host, and its budget of memory is the host's.
    device.set_device(device.HOST)
    sources = Sources(runs, output, [Weights.parse(text) for text in allow])
    service = Service(sources, Limits(), None if memory is None else int(memory * 1e9))
    before = signal.signal(signal.SIGTERM, _end)  # also while the model loads, so that what is below runs
    try:
        log.info("loading %s", sources[""].title)
        update = service.warm().wait()
        if update.error is not None:
            raise update.error
        log.info("http://%s:%d  (Ctrl-C ends it)", f"[{host}]" if ":" in host else host, port)
        serve(service, host, port, accounts)
    finally:
        service.close()
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
