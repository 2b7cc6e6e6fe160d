"""ONNX -> engine -> callable: the backends behind one interface, their cache, and the pipeline with an engine inside.

Importing this package registers all engines and loads none of their libraries. :mod:`.pipeline` (which is a torch module)
is imported by whoever runs pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.engines import eager, openvino_cpu, ort, rtx, tensorrt_dc
from qdiff.engines.base import ENGINES, BuildOptions, Engine, Profile, Runner
from qdiff.engines.eager import ModuleRunner

_REGISTERED = (eager, openvino_cpu, ort, rtx, tensorrt_dc)  # imported for their @ENGINES.register

__all__ = ["ENGINES", "BuildOptions", "Engine", "ModuleRunner", "Profile", "Row", "Runner", "choose", "describe"]


@dataclass(frozen=True)
class Row:
    """One engine in ``qdiff doctor``. ``why_not`` is why it cannot run here, ``why_not_build`` why it cannot be built here."""

    name: str
    title: str
    available: bool
    can_build: bool
    version: str | None
    why_not: str | None
    why_not_build: str | None


def choose(name: str | None = None) -> Engine:
    """The engine of that name, whether or not it can run here; without a name the best that can.

    Raises:
        UsageError: no engine has that name.
    """
    if name is not None:
        return ENGINES[name]()
    engines = sorted((ENGINES[known]() for known in ENGINES), key=lambda engine: -engine.rank)
    return next(engine for engine in engines if engine.missing() is None)  # torch itself is always there


def describe() -> list[Row]:
    """All engines, best first."""
    rows = []
    for engine in sorted((ENGINES[name]() for name in ENGINES), key=lambda engine: -engine.rank):
        why, why_build = engine.missing(), engine.missing_for_build()
        version = engine.version() if why_build is None else None
        rows.append(Row(engine.name, engine.title, why is None, why_build is None, version, why, why_build))
    return rows
