"""What random command lines are made from: values that are right, values that nobody meant, and run folders in every state."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

TINY = ("--weights", "random:pixart-tiny", "--samples", "2", "--steps", "2", "--pictures", "2")

TEXTS = (
    "", " ", "a", "-", "--", "-1", "0", "null", "true", "~", "*", "a=b", "=",
    "a.b=c", "a\x00b", "\udcff", "ä", "日本語", "😀", "\u202eabc",
    "\x1b[31m",
     "a\nb", "%s", "{0}", "$HOME", "../..", "x" * 300, "y" * 5000, "a,b,c",
    "[", "{", "&a *a", "!!python/object:os.system",
    "1e999", "nan", "inf", "0x10", "1_000", "٣",
)  # fmt: skip
INTEGERS = ("1", "2", "0", "-1", "-2147483649", "257", "1001", "10001", "2147483648", "4294967296", "9223372036854775808",
            str(2**70), "5000000", "1000000000", "1e3", "1.5", "", "nan", "٣", "0x10", "1_0", " 1", "9" * 400)  # fmt: skip
FLOATS = (
    "0",
    "1",
    "0.5",
    "4.5",
    "-1",
    "101",
    "1e308",
    "1e-300",
    "inf",
    "-inf",
    "nan",
    "",
    "1,5",
    "x",
    "1e999",
    "9" * 400,
)

# By a parameter's name: values that are right, and near misses.
WORDS = {
    "model": ("pixart", "stable-diffusion", "wan", "cogvideox", "PixArt", "pixar", "flux"),
    "weights": ("random:pixart-tiny", "random:", "random:none", "bundled", "owner/name", "a/b/c", "missing", "."),
    "revision": ("main", "0" * 40, "refs/pr/1"),
    "scheduler": ("dpmsolver++", "ddim", "euler", "EulerDiscreteScheduler", "none", "DDIM"),
    "timesteps": ("uniform", "normal", "all", "Uniform"),
    "recipe": ("int8", "nvfp4", "w4a8", "fp8", "mixed", "routed", "int9", "int8.yaml", "missing.yaml"),
    "budget": ("bits=5.5", "bits=0", "bits=", "bytes=1", "latency=-1", "bits=nan", "bytes=1e400", "5"),
    "set": ("methods.smooth.strengths=[0.5]", "scheme=1", "a.b.c=[", "storage_dtype=float8", "methods=null", "ignore=*", 
            "distil.iterations=-1",
            "sequential.tokens=1e9", "mixed.device=x", "scheme.weights=int8", "methods.smooth=3"),
    "engine": ("openvino", "onnxruntime", "eager", "float", "tensorrt_rtx", "tensorrt", "OpenVINO", "none"),
    "target": ("onnxruntime", "tensorrt", "openvino"),
    "compute_capability": ("8.9", "12.0", "7.5", "99.9", "sm_89", "-1"),
    "profile": ("128", "dyn-64-128", "128,batch=1-2-8", "batch=8-1", "batch=0", "dyn-128-64", "x,y",
                "batch=99999999999", "64x128"),
    "flag": ("precision=f32", "precision=x", "nothing=1", "shapes=dynamic", "x"),
    "method": ("q_drift", "ptqd", "q_sched", "none"),
    "goal": ("float", "prompt", "both"),
    "device": ("cpu", "cuda", "cuda:0", "cuda:99999999999999999999", "tpu", "cpu:0"),
    "prompt": ("a red apple", "cheese"),
    "negative_prompt": ("blurry",),
    "host": ("0.0.0.0", "::", "example.org"),
    "allow": ("pixart=random:pixart-tiny", "pixart=", "x=y", "pixart"),
}  # fmt: skip

Damage = Callable[[Path], object]


def _cut(name: str, share: float = 0.5) -> Damage:
    def cut(run: Path) -> None:
        data = (run / name).read_bytes()
        (run / name).write_bytes(data[: int(len(data) * share)])

    return cut


def _flip(name: str) -> Damage:
    def flip(run: Path) -> None:
        data = bytearray((run / name).read_bytes())
        data[len(data) // 2] ^= 0x10
        (run / name).write_bytes(bytes(data))

    return flip


def _become_folder(name: str) -> Damage:
    def become(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return become


def _deep(run: Path) -> None:
    (run / "run.json").write_text("[" * 100_000)
    (run / "run.copy.json").unlink()


DAMAGES: dict[str, Damage] = {
    "no-manifest": lambda run: [(run / name).unlink() for name in ("run.json", "run.copy.json")],
    "cut-manifest": _cut("run.json"),
    "flipped-manifest": _flip("run.json"),
    "deep-manifest": _deep,
    "cut-plan": _cut("plan.json"),
    "flipped-plan": _flip("plan.json"),
    "plan-is-folder": _become_folder("plan.json"),
    "cut-weights": _cut("model.safetensors"),
    "flipped-weights": _flip("model.safetensors"),
    "empty-weights": _cut("model.safetensors", 0),
    "no-calibration": lambda run: shutil.rmtree(run / "calibration"),
    "cut-statistics": _cut("calibration/statistics.safetensors"),
    "cut-shard": _cut("calibration/trajectory-00000.safetensors"),
    "cut-graph": _cut("onnx/onnxruntime/model.onnx"),
    "no-graph": lambda run: shutil.rmtree(run / "onnx"),
    "no-engines": lambda run: shutil.rmtree(run / "engines"),
    "cut-comparison": _cut("compare.json"),
    "images-is-file": lambda run: (shutil.rmtree(run / "images"), (run / "images").write_text("x")),
    "lock-is-folder": lambda run: ((run / ".lock").unlink(), (run / ".lock").mkdir()),
}


class Material:
    """Folders and files that paths of command lines name.

    Args:
        finished: a run with every stage done; it is copied, never written.
        folder: where everything is made; commands run in ``folder/a/b``.
    """

    def __init__(self, finished: Path, folder: Path) -> None:
        self.finished, self.folder, self.here = finished, folder, folder / "a" / "b"
        self.here.mkdir(parents=True)
        self.runs = {name: folder / "runs" / name for name in ("whole", *DAMAGES)}
        self._stamps: dict[str, float] = {}
        for name in self.runs:
            self.restore(name)
        files = folder / "files"
        files.mkdir()
        self.files: list[Path | str] = []
        for name, content in {
            "prompts.txt": b"a red apple\na rocket\n",
            "empty.txt": b"",
            "binary.txt": bytes(range(256)) * 10,
            "long-line.txt": b"x" * 100_000,
            "comments.txt": b"# a\n# b\n",
            "bad.yaml": b"a: [",
            "bomb.yaml": b"a: &a [x]\nb: [*a, *a]\n",
            "deep.yaml": b"[" * 20_000,
            "list.yaml": b"- 1\n- 2\n",
            "deep.json": b"[" * 100_000,
            "number.json": b"9" * 10_000,
            "null.json": b"null",
            "accounts": b"name:password\n",
        }.items():
            (files / name).write_bytes(content)
            self.files.append(files / name)
        with open(files / "sparse.txt", "wb") as file:
            file.truncate(10**9)
        os.mkfifo(files / "pipe")
        (files / "loop").symlink_to("loop")
        (files / "to-zero.yaml").symlink_to("/dev/zero")
        self.files += [files / name for name in ("sparse.txt", "pipe", "loop", "to-zero.yaml")]
        self.places: list[Path | str] = [
            "", ".", "..", "/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", "/proc/self", "/sys",
            "/dev/stdin",
            "x" * 300, "/".join(["d"] * 2500),
            "a\x00b", "\udcff", "new", "new/er", "日本語", "with space", "-dash", "new.png", "new.mp4",
            "x" * 250 + ".png", "/etc/passwd", "~", "*", "http://127.0.0.1:1/x", *self.files,
        ]  # fmt: skip

    def restore(self, name: str) -> None:
        """Restore a run to the state in which it was made, where a command changed it."""
        path = self.runs[name]
        if name in self._stamps and _stamp(path) == self._stamps[name]:
            return
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.finished, path, symlinks=True)
        if name != "whole":
            DAMAGES[name](path)
        self._stamps[name] = _stamp(path)

    def clean(self) -> None:
        """Empty the folder that commands run in."""
        shutil.rmtree(self.here)
        self.here.mkdir()

    def path(self, rng: random.Random) -> str:
        """Return a path: three of ten times a whole run, three a damaged one, else something else."""
        kind = rng.random()
        if kind < 0.3:
            return str(self.runs["whole"])
        if kind < 0.6:
            return str(self.runs[rng.choice(sorted(DAMAGES))])
        return str(rng.choice(self.places))


def _stamp(path: Path) -> float:
    """Return when something in a run was changed last."""
    if not path.is_dir():
        return 0.0
    return sum(one.lstat().st_mtime for one in path.rglob("*") if one.name != ".lock")
