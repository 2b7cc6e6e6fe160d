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

__all__ = [
    "ENGINES",
    "BuildOptions",
    "Engine",
    "ModuleRunner",
    "Profile",
    "Row",
    "Runner",
    "choose_engine",
    "describe",
    "ranked",
]


@dataclass(frozen=True)
class Row:
    """One engine in ``qdiff doctor``. ``why_not`` is why it cannot run here, ``why_not_build`` why it cannot be built here,
    ``integers`` how it multiplies INT8 on this processor (:meth:`Engine.integer_arithmetic`).
    """

    name: str
    title: str
    available: bool
    can_build: bool
    version: str | None
    why_not: str | None
    why_not_build: str | None
    integers: str | None


def ranked() -> list[Engine]:
    """Return all engines, the one that is fastest on this machine first, whether or not they can run here."""
    return sorted((ENGINES[name]() for name in ENGINES), key=lambda engine: -engine.rank)


def choose_engine(name: str | None = None) -> Engine:
    """Return the engine of that name, whether or not it can run here; without a name the best that can.

    Raises:
        UsageError: no engine has that name.
    """
    if name is not None:
        return ENGINES[name]()
    return next(engine for engine in ranked() if engine.missing() is None)  # torch itself is always there


def describe() -> list[Row]:
    """Return all engines, best first."""
    rows = []
    for engine in ranked():
        why, why_build = engine.missing(), engine.missing_for_build()
        version = engine.version() if why_build is None else None
        integers = engine.integer_arithmetic()
        rows.append(Row(engine.name, engine.title, why is None, why_build is None, version, why, why_build, integers))
    return rows
