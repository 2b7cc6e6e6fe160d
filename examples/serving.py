"""Serving: start the server of the web page on a run, call it as a program does, and stop it."""

import subprocess
import sys
import time

import httpx
from gradio_client import Client

import qdiff

PORT = 7861
run = qdiff.quantize("pixart", prompts=["a rocket on a blue background", "a red apple"], output="runs/serving", batch=2)
qdiff.build(run, engine="openvino")

server = subprocess.Popen([sys.executable, "-m", "qdiff", "demo", str(run.path), "--port", str(PORT)])
try:
    for _ in range(240):  # it loads the first engine before it listens
        time.sleep(0.5)
        try:
            httpx.get(f"http://127.0.0.1:{PORT}", timeout=5)
            break
        except httpx.HTTPError:
            assert server.poll() is None, "the server has ended"
    page = Client(f"http://127.0.0.1:{PORT}", verbose=False)
    made = page.predict("a rocket on a blue background", seed=7, engine="openvino", api_name="/generate")
    print(made["pictures"], made["seconds_per_step"])
finally:
    server.terminate()
    server.wait(30)
