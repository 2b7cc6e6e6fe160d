"""Recorded benchmarks: what a record holds, and when a fresh run is slower."""

from __future__ import annotations

import importlib.util
import json

import pytest

from bench import check

RECORDS = sorted(check.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_made_it_and_no_host(path):
    record = json.loads(path.read_text())
    assert record.keys() == {"command", "machine", "date", "note", "tolerance", "ratios"}
    python, option, module, *_, last = record["command"]
    assert (python, option, last) == ("python", "-m", "--json") and importlib.util.find_spec(module)
    assert record["machine"].keys() == check.machine().keys() and set(record["machine"]["features"]) <= set(
        check.FEATURES
    )
    assert len(record["ratios"]) > 3 and all(ratio > 0 for ratio in record["ratios"].values())
    assert 0 < record["tolerance"] < 1


def test_there_is_a_record():
    assert RECORDS


def test_features_are_read_and_nothing_else(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: secret\nflags\t\t: fpu avx2 avx512_vnni avx2_not\n")
    assert check.machine(info)["features"] == ["avx2", "avx512_vnni"]
    assert check.machine(tmp_path / "none")["features"] == []


@pytest.mark.parametrize(
    ("fresh", "slower"),
    [({"a": 2.0, "b": 1.0}, []), ({"a": 9.0, "b": 0.8}, []), ({"a": 1.3, "b": 1.0}, ["a"]), ({"a": 2.0}, ["b"])],
)
def test_slower_is_below_the_tolerance_or_missing(fresh, slower):
    assert check.slower({"a": 2.0, "b": 1.0}, fresh, 0.3) == slower


@pytest.mark.parametrize(("ratio", "features", "holds"), [(0.5, None, False), (2.0, None, True), (0.5, ["avx9"], True)])
def test_a_slower_run_fails_on_the_machine_of_the_record_alone(tmp_path, monkeypatch, capsys, ratio, features, holds):
    """The benchmark is a program that prints what bench.step prints."""
    (tmp_path / "fake_step.py").write_text(
        f'print(\'{{"rows": [{{"name": "base", "speedup": 1, "sqnr_db": null}}, '
        f'{{"name": "a", "speedup": {ratio}, "sqnr_db": 40}}]}}\')'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    machine = check.machine() | ({} if features is None else {"features": features})
    path = tmp_path / "record.json"
    record = {"command": ["python", "-m", "fake_step"], "machine": machine, "tolerance": 0.3, "ratios": {"a": 1.0}}
    path.write_text(json.dumps(record))
    assert check.check(path) == holds
    assert f"now  {ratio:.2f}" in capsys.readouterr().out


def test_a_benchmark_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fake_step.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match="fake_step ended with 3"):
        check.run(["python", "-m", "fake_step"])
