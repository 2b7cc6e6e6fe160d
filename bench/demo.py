"""The web page under load: many visitors at once, through the real server and ``gradio_client``.

    python -m bench.demo runs/pixart --clients 8 --seconds 120

Asserted, not only printed: every request that was admitted is served; who finds the queue full is told so; memory is flat after
the first quarter; a cancelled picture frees the compute slot within one step. Also the two times that a visitor feels: from
pressing the button to the first preview and to the picture.

The page runs in a process of its own, as ``qdiff demo`` does, so that its memory is its own.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

from gradio_client import Client
from gradio_client.exceptions import AppError

FLAT = 1.10  # memory at the end over memory after the first quarter


class Page:
    """A ``qdiff demo`` in a process of its own."""

    def __init__(self, run: Path, output: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "qdiff", "-q", "demo", str(run), "--port", str(self.port), "-o", str(output)]
        self.process = subprocess.Popen(command)
        self.url = f"http://127.0.0.1:{self.port}/"
        while True:
            try:
                self.metrics()
                return
            except OSError:
                if self.process.poll() is not None:
                    raise SystemExit("qdiff demo did not start") from None
                time.sleep(0.3)

    def metrics(self) -> dict[str, float]:
        """Return every sample of ``/metrics``."""
        with urllib.request.urlopen(f"{self.url}metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")}

    def client(self) -> Client:
        """Return a visitor of its own: each client is a session."""
        return Client(self.url, verbose=False, analytics_enabled=False)

    def close(self) -> int:
        """End the page's process as an operator does; return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def load(page: Page, clients: int, seconds: float, steps: int) -> dict[str, Any]:
    """Run ``clients`` visitors who ask again as soon as they are served."""
    lock, walls = threading.Lock(), []
    outcomes = {"served": 0, "refused": 0, "failed": 0}
    failures: list[str] = []
    end = time.monotonic() + seconds

    def visit(number: int) -> None:
        visitor, turn = page.client(), 0
        while time.monotonic() < end:
            turn += 1
            start = time.monotonic()
            try:
                visitor.predict(f"a rocket, visitor {number}", steps=steps, seed=turn, api_name="/generate")
                outcome = "served"
            except AppError as error:
                outcome = "refused" if "queue is full" in str(error) else "failed"
                if outcome == "failed":
                    failures.append(str(error)[:200])
            except Exception as error:
                outcome = "failed"
                failures.append(repr(error)[:200])
            with lock:
                outcomes[outcome] += 1
                if outcome == "served":
                    walls.append(time.monotonic() - start)
        visitor.close()

    threads = [threading.Thread(target=visit, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    memory: list[tuple[float, float]] = []
    start = time.monotonic()
    while any(thread.is_alive() for thread in threads):
        memory.append((time.monotonic() - start, page.metrics()["qdiff_resident_bytes"]))
        time.sleep(2)
    settled = [size for at, size in memory if at > seconds / 4]
    quarter = len(settled) // 3 or 1
    return {
        "clients": clients,
        "seconds": seconds,
        **outcomes,
        "failures": failures[:5],
        "wall_seconds_median": round(statistics.median(walls), 3),
        "wall_seconds_worst": round(max(walls), 3),
        "pictures_per_second": round(outcomes["served"] / seconds, 2),
        "memory_mb_after_a_quarter": round(statistics.mean(settled[:quarter]) / 1e6, 1),
        "memory_mb_at_the_end": round(statistics.mean(settled[-quarter:]) / 1e6, 1),
    }


def full_queue(page: Page, waiting: int = 16) -> dict[str, Any]:
    """Return one long picture and as many behind it as the queue holds; the next is told so, and those who were
    admitted are served.
    """
    visitors = [page.client() for _ in range(waiting + 2)]
    jobs = [visitors[0].submit("a cat", steps=100, width=256, height=256, engine="float", api_name="/generate")]
    _until(lambda: page.metrics()["qdiff_jobs_running"] == 1)
    for index in range(1, waiting + 1):
        jobs.append(visitors[index].submit("a cat", steps=1, api_name="/generate"))
    _until(lambda: page.metrics()["qdiff_queue_length"] == waiting)
    told = ""
    try:
        visitors[-1].predict("a cat", steps=1, api_name="/generate")
    except AppError as error:
        told = str(error)
    served = sum("settings" in job.result(timeout=300) for job in jobs)
    for visitor in visitors:
        visitor.close()
    return {"told": told, "admitted": len(jobs), "served": served}


def cancelling(page: Page, rounds: int = 5) -> dict[str, Any]:
    """Return seconds from the answer to a cancel until the slot is free, beside the seconds of one step; medians over
    the rounds.
    """
    visitor = page.client()
    settings = {"width": 256, "height": 256, "engine": "float", "api_name": "/generate"}
    step, free = [], []
    for _ in range(rounds):
        step.append(visitor.predict("a cat", steps=3, **settings)["seconds_per_step"])
        job = visitor.submit("a cat", steps=100, **settings)
        _until(lambda: page.metrics()["qdiff_jobs_running"] == 1)
        time.sleep(2 * step[-1])
        visitor.predict(api_name="/cancel")
        start = time.monotonic()
        _until(lambda: page.metrics()["qdiff_jobs_running"] == 0)
        free.append(time.monotonic() - start)
        if job.result(timeout=30) != {"cancelled": True}:
            raise SystemExit("a cancelled picture came nevertheless")
    visitor.close()
    return {"step_seconds": round(statistics.median(step), 3), "free_after_seconds": round(statistics.median(free), 3)}


def felt(page: Page, chromium: str) -> dict[str, Any] | None:
    """Return the seconds in a browser from the click on Generate to the first preview and to the picture. ``None``: no
    browser.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if not Path(chromium).exists():
        return None
    watch = """() => {
        const start = performance.now(), seen = {}, canvas = document.querySelector('#canvas');
        const wanted = {preview: '.qd-preview', picture: '.done img'};
        window.seen = seen;
        new MutationObserver(() => {
            for (const [name, what] of Object.entries(wanted))
                if (!(name in seen) && canvas.querySelector(what)) seen[name] = (performance.now() - start) / 1000;
        }).observe(canvas, {childList: true, subtree: true});
        document.querySelector('#generate').click();
    }"""
    rows = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(3):
            tab = browser.new_page()
            tab.goto(page.url)
            tab.fill("#prompt textarea", "a rocket on a blue background")
            tab.wait_for_timeout(3000)  # a visitor looks before clicking
            tab.evaluate(watch)
            tab.wait_for_function("'picture' in window.seen", timeout=60_000)
            rows.append(tab.evaluate("window.seen"))
            tab.close()
        browser.close()
    return {name: [round(row[name], 2) for row in rows if name in row] for name in ("preview", "picture")}


def _until(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit("the page did not get there in time")
        time.sleep(0.02)


def main() -> int:
    """Run all parts, print JSON, and say by the exit code whether everything held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        page = Page(options.run, Path(output))
        try:
            result: dict[str, Any] = {"felt": felt(page, options.chromium), "queue": full_queue(page)}
            result["cancel"] = cancelling(page)
            result["load"] = load(page, options.clients, options.seconds, options.steps)
            failed = [name for name in page.metrics() if re.match(r'qdiff_requests_total.*outcome="failed"', name)]
            result["failed_requests"] = failed
        finally:
            result["exit_code"] = page.close()
    queue, cancel, under = result["queue"], result["cancel"], result["load"]
    held = {
        "no admitted request failed": under["failed"] == 0 and not failed and queue["served"] == queue["admitted"],
        "the one too many was told so": "queue is full" in queue["told"],
        "memory is flat": under["memory_mb_at_the_end"] <= FLAT * under["memory_mb_after_a_quarter"],
        "a cancel frees the slot within one step": cancel["free_after_seconds"] <= cancel["step_seconds"] + 0.1,
        "it ended in order": result["exit_code"] == 0,
    }
    print(json.dumps({**result, "held": held}, indent=2))
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
