"""Random requests to the page's API, over HTTP, to a real server on a finished run: endpoints with right and wrong values, bodies
that are no JSON, paths, methods and headers that nobody sends. No answer is of the kind 5xx, none shows a traceback, and the
server writes none.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.fuzz.material import TEXTS

PARAMETERS = {
    "generate": (
        "prompt",
        "text",
        "model",
        "engine",
        "steps",
        "guidance",
        "seed",
        "side",
        "side",
        "pictures",
        "frames",
    ),
    "compare": ("prompt", "model", "engines", "steps", "seed"),
    "models": (),
    "cancel": (),
    "build": ("model", "recipe", "budget", "engines"),
    "build_state": (),
    "stop_build": (),
    "status": (),
}
RIGHT: dict[str, tuple[Any, ...]] = {
    "prompt": ("a red apple", "cheese"),
    "text": ("", "blurry"),
    "model": ("", "pixart"),
    "engine": ("", "float", "openvino", "onnxruntime"),
    "engines": (None, ["openvino"], ["onnxruntime", "openvino"]),
    "steps": (1, 2, None),
    "guidance": (None, 1, 4.5),
    "seed": (None, 0, 7),
    "side": (None, 64, 128),
    "pictures": (1, 2),
    "frames": (None,),
    "recipe": ("int8",),
    "budget": ("none",),
}
WRONG: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 257, 2**31, 2**63, 2**70, 1e308, -0.0, "", [], {}, [[]], [None], {"a": 1}, "1", "nan",
    *(text for text in TEXTS if "\udcff" not in text),
)  # fmt: skip
BODIES = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b'{"data": null}', b'{"data": {}}', b'{"data": 1}',
    b'{"data": [[[[]]]]}',
    b'{"data": [NaN]}', b'{"data": [Infinity]}', b"[" * 20_000, b'{"data": [' + b"9" * 6_000 + b"]}", b'{"data": ["\\ud800"]}',
    b'{"data": ["\\u0000"]}', b"x" * 200_000, b'{"fn_index": -1, "data": []}', b'{"fn_index": 99999, "data": []}',
    b'{"fn_index": "x", "data": []}', b'{"fn_index": 0, "data": [], "session_hash": 1}', b'{"event_id": "x"}',
    b'{"session_hash": "x", "fn_index": 0, "event_id": null}',
)  # fmt: skip
PATHS = (
    "", "config", "metrics", "gradio_api/info", "gradio_api/openapi.json", "gradio_api/queue/data", 
    "gradio_api/queue/data?session_hash=x",
    "gradio_api/file=", "gradio_api/file=/etc/passwd", "gradio_api/file=%00", "gradio_api/file=a%0ab", "gradio_api/call/none/x",
    "gradio_api/call/generate/" + "0" * 32, "gradio_api/heartbeat/", "gradio_api/startup-events", "gradio_api/app_id", "assets/",
    "static/..", "theme.css", "login", "logout", "gradio_api/upload", "gradio_api/run/predict", "gradio_api/queue/join",
    "gradio_api/cancel", "gradio_api/reset", "gradio_api/call/generate", "gradio_api/call/", "svelte/x", "favicon.ico",
    "%", "%zz", "a" * 3_000,
)  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "X")
HEADERS = (
    {}, {"content-type": "application/json"}, {"content-type": "text/plain"}, {"content-type": "multipart/form-data; boundary=x"},
    {"origin": "null"}, {"origin": "http://a.example"}, {"host": "a.example"}, {"accept": "x" * 3_000}, {"cookie": "a=b; =;;;"},
    {"authorization": "Basic !"}, {"range": "bytes=9-1"}, {"accept-encoding": "none"}, {"x-forwarded-for": "\x80"},
)  # fmt: skip


def check_requests(finished: Path, folder: Path, count: int, seed: int, limit: float) -> tuple[list[str], Counter[int]]:
    """Send ``count`` requests.

    Args:
        finished: a run with every stage done.
        folder: an empty one, for what is built.
        count: how many requests.
        seed: of the random choices.
        limit: seconds for one answer.

    Returns:
        what is wrong, a line for each; how often each status came.
    """
    rng = random.Random(seed)
    faults: list[str] = []
    statuses: Counter[int] = Counter()
    with running(finished, folder) as (port, written):
        for number in range(1, count + 1):
            method, path, headers, body = request(rng)
            start, before = time.monotonic(), written.tell()
            try:
                status, text = ask(port, method, path, headers, body, limit)
            except (OSError, http.client.HTTPException) as error:
                status, text = 0, f"{type(error).__name__}: {error}"
            statuses[status] += 1
            said = text + written.getvalue()[before:]
            wrong = ""
            if status == 0 or status >= 500:
                wrong = f"status {status}: {said[-300:]!r}"
            elif "Traceback (most recent call last)" in said:
                wrong = f"traceback: {said[-300:]!r}"
            elif time.monotonic() - start > limit:
                wrong = f"{time.monotonic() - start:.0f} s"
            if wrong:
                faults.append(f"request {number}, {wrong}: {method} /{path[:100]} {headers} {body[:200]!r}")
                print(faults[-1], flush=True)
            if number % 250 == 0:
                print(f"{number} of {count}, {len(faults)} faults", file=sys.stderr, flush=True)
    return faults, statuses


def request(rng: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Return method, path without its slash, headers and body: seven of ten times a call of an endpoint."""
    plain = {"content-type": "application/json"}
    if rng.random() < 0.7:
        name = rng.choice(sorted(PARAMETERS))
        values: list[Any] = []
        hostile = rng.random() < 0.9
        for kind in PARAMETERS[name]:
            wrong = hostile and rng.random() < 0.4
            values.append(rng.choice(WRONG) if wrong else rng.choice(RIGHT[kind]))
        if name == "build":
            values[1:2] = ["none"]  # no build begins
        if rng.random() < 0.1:
            values = values[: rng.randrange(len(values) + 1)] + [rng.choice(WRONG)] * rng.randrange(3)
        return "POST", f"gradio_api/call/{name}", plain, json.dumps({"data": values}).encode()
    if rng.random() < 0.5:
        return (
            "POST",
            str(rng.choice([path for path in PATHS if path.startswith("gradio_api")])),
            plain,
            rng.choice(BODIES),
        )
    return rng.choice(METHODS), str(rng.choice(PATHS)), dict(rng.choice(HEADERS)), rng.choice((b"", *BODIES))


def ask(port: int, method: str, path: str, headers: dict[str, str], body: bytes, limit: float) -> tuple[int, str]:
    """Return status and text of the answer; of a call of an endpoint its events too, until they end."""
    status, text = _send(port, method, path, headers, body, limit)
    if status == 200 and path.startswith("gradio_api/call/") and method == "POST":
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(text)["event_id"]
            later, more = _send(port, "GET", f"{path}/{event}", {}, b"", limit)
            return max(status, later), text + more
    return status, text


def _send(port: int, method: str, path: str, headers: dict[str, str], body: bytes, limit: float) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    try:
        address = "/" + (path if "%" in path or "?" in path else quote(path, safe="/=?&"))
        connection.request(method, address, body, headers)
        answer = connection.getresponse()
        if "queue/data" in path or "heartbeat" in path:  # streams that last as long as a page is open
            return answer.status, ""
        return answer.status, answer.read(2_000_000).decode(errors="replace")
    finally:
        connection.close()


@contextlib.contextmanager
def running(finished: Path, folder: Path) -> Iterator[tuple[int, io.StringIO]]:
    """Run a server in a thread; yield its port, and what it and its libraries write to stderr."""
    import uvicorn

    from qdiff.app.limits import Limits
    from qdiff.app.server import build_app, make_server
    from qdiff.app.service import Service
    from qdiff.app.sources import Sources, Weights

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    service = Service(Sources([finished], folder, [Weights("pixart", "random:pixart-tiny")]), Limits(steps=4))
    written = _Both()
    with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
        app = build_app(service, "127.0.0.1")
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
        server = make_server(config, service)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            end = time.monotonic() + 120
            while not server.started:
                if not thread.is_alive() or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start:\n{written.getvalue()}")
                time.sleep(0.05)
            yield port, written
        finally:
            server.should_exit = True
            thread.join(10)
            service.close()


class _Both(io.StringIO):
    """Keeps what is written. Progress of the fuzzer itself goes to the real streams."""

    def write(self, text: str) -> int:
        if text.startswith(("request ", *"0123456789")) and (" faults" in text or text.startswith("request ")):
            os.write(1, f"{text.rstrip()}\n".encode())
            return len(text)
        return super().write(text)
