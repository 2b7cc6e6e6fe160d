"""What a library's INT8 products are on this processor is tried, and each answer has its consequences on every machine."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from qdiff.engines import choose_engine, integer_products, ranked

LIBRARIES = ("onnxruntime", "openvino")


def overflowing(model, inputs):
    """What kernels give that add two products of bytes in 16 bits, as an AVX2 processor's do."""
    return [np.sign(value) * 2.0 for value in integer_products.expected_outputs()]


def inexact_convolution(model, inputs):
    product, convolution = integer_products.expected_outputs()
    return [product, convolution - 2.0**-14]


@pytest.fixture
def library(monkeypatch):
    """Puts a function in the place of a library: ``library("openvino", overflowing)``."""

    def replace(name, run):
        monkeypatch.setitem(integer_products._LIBRARIES, name, run)
        integer_products._exact.cache_clear()

    yield replace
    integer_products._exact.cache_clear()


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_answer_is_what_the_library_computes(library, name):
    library(name, lambda model, inputs: integer_products.expected_outputs())
    assert integer_products.exact(name)
    for run in (overflowing, inexact_convolution):
        library(name, run)
        assert not integer_products.exact(name)


def test_the_probe_is_an_integer_product_in_both_libraries():
    """A library that computes the probe in float says "exact" on every processor."""
    import onnx
    import openvino

    model, inputs = integer_products.probe()
    onnx.checker.check_model(onnx.load_from_string(model), full_check=True)
    compiled = openvino.Core().compile_model(openvino.Core().read_model(model), "CPU", {})
    executed = {
        op.get_friendly_name(): str(op.get_rt_info()["runtimePrecision"].astype(str))
        for op in compiled.get_runtime_model().get_ordered_ops()
        if op.get_rt_info()["layerType"].astype(str) in ("MatMul", "FullyConnected", "Convolution")
    }
    assert len(executed) == 2 and set(executed.values()) <= {"i8", "u8"}, executed
    found = integer_products._in_onnxruntime(model, inputs)
    assert [value.shape for value in found] == [value.shape for value in integer_products.expected_outputs()]


@pytest.mark.parametrize("exact", [True, False])
def test_consequences(monkeypatch, exact):
    monkeypatch.setattr(integer_products, "exact", lambda library: exact)
    openvino, onnxruntime = choose_engine("openvino"), choose_engine("onnxruntime")
    order = [engine.name for engine in ranked() if engine.name in LIBRARIES]
    assert order == (["openvino", "onnxruntime"] if exact else ["onnxruntime", "openvino"])
    for engine in (openvino, onnxruntime):
        assert ("exact" in engine.integer_arithmetic()) == exact


@pytest.mark.parametrize("exact", [True, False])
def test_doctor_says_what_was_decided(cli, monkeypatch, exact):
    monkeypatch.setattr(integer_products, "exact", lambda library: exact)
    rows = {row["name"]: row["integers"] for row in cli("doctor", "--json").json["engines"]}
    assert all(("exact" in rows[name]) == exact for name in LIBRARIES) and rows["eager"] is None
    text = cli("doctor").out
    assert all(f"{name}: {rows[name]}" in text for name in LIBRARIES)


def test_nothing_else_asks_for_the_processor():
    """One function decides; what looks for the processor's instructions would be a second opinion."""
    root = Path(__file__).parents[2]
    sources = [
        path for folder in ("qdiff", "calib", "export", "engines", "app") for path in (root / folder).rglob("*.py")
    ]
    assert len(sources) > 100
    looks = re.compile(r"""["'](avx\w*|amx\w*|\w*vnni)["']""")
    assert [path for path in sources if looks.search(path.read_text(encoding="utf-8"))] == []
