"""A model of the Hub is loaded at one commit, which is recorded and asked for again; folders are never looked for there."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from qdiff.errors import InputError
from qdiff.models import FAMILIES
from qdiff.models.hub import is_id
from tests.published_folders import edit_weights

ID = "somebody/pixart-tiny"
FIRST, SECOND = "1" * 40, "2" * 40


class Hub:
    """A Hub of one repository with two commits, and this machine's cache of it, with huggingface_hub's own functions."""

    def __init__(self, home: Path, model: Path) -> None:
        self.home, self.head, self.online = home, FIRST, True
        self.asked: list[str | None] = []
        for commit in (FIRST, SECOND):
            shutil.copytree(model, home / "far" / commit)
        (home / "far" / FIRST / "big.safetensors").write_bytes(b"the same once more")
        edit_weights(home / "far" / SECOND / "transformer", lambda tensors: next(iter(tensors.values())).mul_(2))

    def model_info(self, repository: str, revision: str | None = None) -> SimpleNamespace:
        self.asked.append(revision)
        if not self.online:
            raise ConnectionError("no network")
        commit = self.head if revision in (None, "main") else revision
        if repository != ID or commit not in (FIRST, SECOND):
            raise ValueError(f"404: no {repository} at {revision}")
        folder = self.home / "far" / commit
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(self, repository, *, revision=None, allow_patterns=None, local_files_only=False) -> str:
        refs = self.home / "near" / "main"
        commit = refs.read_text() if revision in (None, "main") and refs.exists() else revision
        near = self.home / "near" / str(commit)
        if local_files_only or not self.online:
            if not near.is_dir():
                raise FileNotFoundError("not in the cache")
            return str(near)
        far = self.home / "far" / commit
        for path in far.rglob("*"):
            name = path.relative_to(far).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns or ["*"]):
                (near / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, near / name)
        refs.write_text(commit)
        return str(near)


@pytest.fixture
def hub(monkeypatch, tmp_path, published):
    made = Hub(tmp_path / "hub", published("plain"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    return made


def manifest(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["stages"]["calibrate"]["inputs"]


CALIBRATE = ("calibrate", "--model", "pixart", "--samples", 1, "--steps", 2)


@pytest.mark.slow
def test_a_commit_is_recorded_and_every_later_stage_asks_for_it(cli, hub, tmp_path):
    """The Hub's head moves between the stages, and the network goes away."""
    run = tmp_path / "run"
    assert cli(*CALIBRATE, "--weights", ID, "-o", run).code == 0
    assert manifest(run)["revision"] == FIRST and manifest(run)["weights"] == ID
    assert not (hub.home / "near" / FIRST / "big.safetensors").exists(), "only what is loaded is fetched"
    hub.head = SECOND
    result = cli("quantize", run, "--recipe", "int8", "--json")
    assert result.code == 0 and hub.asked[-1] == FIRST, result.err
    assert cli("generate", run, "--prompt", "x", "--engine", "float", "-o", tmp_path / "a.png").code == 0
    hub.online = False
    assert cli("generate", run, "--prompt", "x", "--engine", "float", "-o", tmp_path / "b.png").code == 0
    assert cli(*CALIBRATE, "--weights", ID, "-o", run).code == 0, "done already, at the commit that was recorded"


def test_a_revision_by_name_is_resolved_once(cli, fails, hub, tmp_path):
    run = tmp_path / "run"
    assert cli(*CALIBRATE, "--weights", ID, "--revision", "main", "-o", run).code == 0
    assert manifest(run)["revision"] == FIRST
    hub.head = SECOND
    fails(3, "revision", *CALIBRATE, "--weights", ID, "--revision", "main", "-o", run)
    assert cli(*CALIBRATE, "--weights", ID, "--force", "-o", run).code == 0, "begun anew, the present head counts"
    assert manifest(run)["revision"] == SECOND


def test_a_folder_of_the_ids_name_does_not_come_between(cli, hub, tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert cli(*CALIBRATE, "--weights", ID, "-o", run).code == 0
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / ID).mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    result = cli("generate", run, "--prompt", "x", "--engine", "float", "-o", tmp_path / "a.png")
    assert result.code == 0, result.err


def test_no_revision_of_that_name(hub):
    with pytest.raises(InputError, match=f"cannot load {ID} at v9 from the Hub"):
        FAMILIES["pixart"].load(ID, revision="v9")


def test_a_folder_that_is_gone_is_not_looked_for_on_the_hub(cli, fails, hub, tmp_path, published, monkeypatch):
    """Calibrated by a relative path in one folder, used in another, and then the folder is moved away."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    shutil.copytree(published("plain"), home / "models" / "x")
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    run = tmp_path / "run"
    assert cli(*CALIBRATE, "--weights", "models/x", "-o", run).code == 0
    assert manifest(run)["weights"] == str(home / "models" / "x")
    monkeypatch.chdir(elsewhere)
    generate = ("generate", run, "--prompt", "x", "--engine", "float", "-o", tmp_path / "a.png")
    result = cli(*generate)
    assert result.code == 0, result.err
    shutil.move(home / "models" / "x", home / "models" / "y")
    fails(3, ["no such folder", str(home / "models" / "x")], *generate)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "known"), [("a/b", True), ("./b", False), ("../b", False), ("/a/b", False), ("a", False)]
)
def test_what_can_be_an_id(name, known):
    assert is_id(name) == known
