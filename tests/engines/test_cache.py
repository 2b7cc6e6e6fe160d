"""The engine cache: what is in the key, what a hit is, and everything that must never be loaded."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from qdiff.engines import BuildOptions, Profile, choose_engine
from qdiff.engines.cache import build_cached, folder_name, key_parts, list_engines, load_trusted, trusted
from qdiff.engines.graph import graph_bytes
from qdiff.errors import IntegrityError

engine = choose_engine("openvino")
pytestmark = pytest.mark.skipif(engine.missing() is not None, reason=f"needs {engine.name}: {engine.missing()}")


@pytest.fixture
def options(profile):
    return BuildOptions(profiles=(profile,), threads=1)


@pytest.fixture
def folder(graph, root, options) -> Path:
    return build_cached(engine, graph.path, root, options).folder


def test_hit_miss_and_force(graph, root, options, inputs):
    folder, facts, was_cached = build_cached(engine, graph.path, root, options)
    assert not was_cached and facts["seconds"] > 0
    assert folder.stat().st_mode & 0o777 == 0o700 and root.stat().st_mode & 0o777 == 0o700
    made = (folder / "model.bin").stat().st_ino
    again = build_cached(engine, graph.path, root, BuildOptions(options.profiles, threads=2))  # threads are no part
    assert again == (folder, facts, True)
    assert (folder / "model.bin").stat().st_ino == made
    assert not build_cached(engine, graph.path, root, options, force=True).was_cached
    assert (folder / "model.bin").stat().st_ino != made
    assert sorted(path.name for path in root.iterdir()) == [folder.name]  # nothing left over
    assert load_trusted(engine, folder, threads=1)(inputs(2)).shape == (2, 64)


def test_every_part_is_in_the_key(graph, options, profile, tmp_path, monkeypatch, write_graph):
    def name(with_engine=engine, onnx=graph.path, how=options):
        return folder_name(key_parts(with_engine, onnx, how))

    names = {"as it is": name()}
    names["weights"] = name(onnx=write_graph(tmp_path / "other", seed=1).path)
    names["other profile"] = name(
        how=BuildOptions((Profile("mlp", {**profile.ranges, "timestep": ((1,), (2,), (8,))}),))
    )
    names["one more profile"] = name(how=BuildOptions((profile, profile)))
    names["flag"] = name(how=BuildOptions((profile,), flags={"shapes": "dynamic"}))
    names["engine"] = name(with_engine=choose_engine("onnxruntime"))
    monkeypatch.setattr(type(engine), "version", lambda self: "2099.1")
    names["version"] = name()
    monkeypatch.undo()
    monkeypatch.setattr(type(engine), "device", lambda self, options: "another")
    names["device"] = name()
    monkeypatch.undo()
    data = graph.path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
    names["one byte of the external data"] = name()
    assert len(set(names.values())) == len(names)


def test_a_failed_build_leaves_nothing(graph, root, options, monkeypatch):
    def fail(self, onnx, folder, options):
        (folder / "half").write_text("written")
        raise RuntimeError("power cut")

    monkeypatch.setattr(type(engine), "build", fail)
    with pytest.raises(RuntimeError):
        build_cached(engine, graph.path, root, options)
    assert list(root.iterdir()) == []


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def _link(path: Path) -> None:
    moved = path.parent.parent.parent / path.name
    shutil.copy(path, moved)
    path.unlink()
    path.symlink_to(moved)


ATTACKS = {
    "flipped weights": lambda folder: _flip(folder / "model.bin"),
    "flipped graph": lambda folder: _flip(folder / "model.xml"),
    "edited facts": lambda folder: _edit(folder, lambda manifest: manifest["facts"].update(bytes=1)),
    "edited hash": lambda folder: _edit(folder, lambda manifest: manifest["files"].update({"model.bin": "0" * 64})),
    "wrong signature": lambda folder: _edit(folder, lambda manifest: manifest.update(hmac="0" * 64)),
    "no signature": lambda folder: _edit(folder, lambda manifest: manifest.pop("hmac")),
    "signature of another type": lambda folder: _edit(folder, lambda manifest: manifest.update(hmac=7)),
    "manifest cut off": lambda folder: (folder / "manifest.json").write_text('{"parts": {'),
    "manifest is a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "file missing": lambda folder: (folder / "model.bin").unlink(),
    "file added": lambda folder: (folder / "plugin.so").write_bytes(b"\x7fELF"),
    "file is a link": lambda folder: _link(folder / "model.bin"),
    "manifest is a link": lambda folder: _link(folder / "manifest.json"),
    "folder writable by all": lambda folder: folder.chmod(0o777),
    "root writable by all": lambda folder: folder.parent.chmod(0o777),
    "file writable by group": lambda folder: (folder / "model.bin").chmod(0o620),
    "manifest writable by all": lambda folder: (folder / "manifest.json").chmod(0o606),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_tampering_is_refused_and_force_is_the_way_out(attack, folder, graph, root, options):
    ATTACKS[attack](folder)
    root_is_wrong = attack == "root writable by all"
    for read in [trusted, lambda it: load_trusted(engine, it)]:
        with pytest.raises(IntegrityError) as caught:
            read(folder)
        assert caught.value.exit_code == 5 and caught.value.fix
    assert list_engines(root)[0].problem
    if not root_is_wrong:  # a build makes its root private again
        with pytest.raises(IntegrityError):
            build_cached(engine, graph.path, root, options)
    build_cached(engine, graph.path, root, options, force=True)
    assert trusted(folder, engine) and list_engines(root)[0].problem is None


def test_the_fix_is_a_command(folder, root):
    _flip(folder / "model.bin")
    with pytest.raises(
        IntegrityError, match=rf'rebuild: qdiff.build\("{root.parent}", engine="openvino", force=True\)'
    ):
        trusted(folder)


def test_another_engines_manifest_or_name_is_refused(folder, graph, root, profile):
    other = build_cached(engine, graph.path, root, BuildOptions((profile,), flags={"shapes": "dynamic"})).folder
    shutil.copy(other / "manifest.json", folder / "manifest.json")
    with pytest.raises(IntegrityError, match="holds the engine"):
        trusted(folder)
    shutil.rmtree(folder)
    os.rename(other, folder)
    with pytest.raises(IntegrityError, match="holds the engine"):
        trusted(folder)


def test_an_engine_from_elsewhere_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("QDIFF_HOME", str(tmp_path / "someone else"))
    with pytest.raises(IntegrityError, match="signature"):
        trusted(folder)


def test_another_backend_version_is_refused(folder, monkeypatch):
    monkeypatch.setattr(type(engine), "version", lambda self: "2099.1")
    with pytest.raises(IntegrityError, match="installed is 2099.1"):
        trusted(folder, engine)
    with pytest.raises(IntegrityError, match="was built by engine 'openvino'"):
        trusted(folder, choose_engine("onnxruntime"))


@pytest.mark.parametrize("part", ["root", "folder", "file"])
def test_a_foreign_owner_is_refused(part, folder, monkeypatch):
    path = {"root": folder.parent, "folder": folder, "file": folder / "model.bin"}[part]
    real = Path.lstat

    def lstat(self):
        status = real(self)
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]]) if self == path else status

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(IntegrityError, match="belongs to another user"):
        trusted(folder)


def test_list_engines(folder, graph, root, profile):
    assert list_engines(root / "nothing") == []
    build_cached(choose_engine("onnxruntime"), graph.path, root, BuildOptions((profile,)))
    entries = list_engines(root)
    assert [entry.engine for entry in entries] == ["onnxruntime", "openvino"]
    assert all(entry.problem is None and entry.bytes > 0 and entry.device == "cpu" for entry in entries)
    assert entries[0].bytes > graph_bytes(graph.path), "the graph that it reads counts too"


def test_an_onnxruntime_engine_follows_its_graph(graph, root, profile, tmp_path, inputs, write_graph):
    ort = choose_engine("onnxruntime")
    folder = build_cached(ort, graph.path, root, BuildOptions((profile,))).folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000  # the weights are not copied
    moved = tmp_path / "moved"
    os.rename(root.parent, moved)  # the run folder may move as a whole
    folder = moved / "engines" / folder.name
    assert load_trusted(ort, folder)(inputs(1)).shape == (1, 64)
    write_graph(moved / "onnx" / "onnxruntime", seed=5)
    with pytest.raises(IntegrityError, match="not the graph that this engine was built from"):
        load_trusted(ort, folder)
