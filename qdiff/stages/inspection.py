"""What is in a run folder, and what is on this machine: ``qdiff inspect`` and ``qdiff doctor``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from qdiff.errors import QdiffError
from qdiff.events import log
from qdiff.runs import manifest
from qdiff.runs.run import Run
from qdiff.runs.stages import OPTIONAL, UPSTREAM
from qdiff.runs.versions import versions
from qdiff.stages.build import built_parts


def inspect(run: Run, *, layers: bool = False, verify: bool = True) -> dict[str, Any]:
    """Return stages with their state, whether their files are unchanged, and the plan in numbers (or layer by
    layer).
    """
    from qdiff.engines.cache import list_engines
    from qdiff.plan.plan import Plan

    stages = {}
    for name, entry in run.manifest["stages"].items():
        row: dict[str, object] = {
            key: entry.get(key) for key in ("status", "seconds", "peak_memory_bytes", "command") if key in entry
        }
        if verify and entry.get("status") == "done":
            try:
                run.verify(name)
                row["files"] = "unchanged"
            except QdiffError as error:
                row |= {"files": error.message, "fix": error.fix}
        stages[name] = row
    result: dict[str, Any] = {"run": str(run.path), "id": run.id, "stages": stages, "missing": _missing(run)}
    if run.done("calibrate"):
        result["model"] = {
            key: run.entry("calibrate")["inputs"][key] for key in ("model", "weights", "note", "fingerprint")
        }
    if verify and not manifest.has_copy(run.path):
        log.warning("%s does not equal %s: the next stage writes it again", run.file(manifest.COPY), manifest.NAME)
    problems = [row for row in stages.values() if row.get("fix")]
    result["changed"], result["fixes"] = [row["files"] for row in problems], [row["fix"] for row in problems]
    plan = None
    if run.done("quantize"):
        try:
            plan = Plan.load(run.file("plan.json"))
        except QdiffError as error:  # the table is what tells of it
            if not verify:
                raise
            log.warning("the plan is not shown: %s", error.message)
    if plan is not None:
        result["plan"] = {
            "recipe": plan.recipe,
            "quantized": len(plan.quantized),
            "kept": len(plan.layers) - len(plan.quantized),
            "smoothed": sum(layer.smoothing is not None for layer in plan.layers),
            "timestep_scales": sum(layer.timestep_scales for layer in plan.layers),
            "attention": plan.attention
            and {
                "numerics": plan.attention.numerics,
                "density": plan.attention.density,
                "overall": plan.attention.overall,
                "tokens": plan.attention.tokens,
                "layers": len(plan.attention.layers),
            },
        }
        if layers:
            result["layers"] = [layer.model_dump(mode="json") for layer in plan.layers]
    roles = _roles(run)
    if run.file("engines").is_dir():
        result["engines"] = [
            {
                "folder": entry.folder.name,
                "role": roles.get(f"engines/{entry.folder.name}"),
                "device": entry.device,
                "version": entry.version,
                "bytes": entry.bytes,
                "problem": entry.problem,
            }
            for entry in list_engines(run.file("engines"))
        ]
    return result


def _roles(run: Run) -> dict[str, str]:
    """Return what each engine folder that is in use computes: everything, a step, or one of the parts that are computed
    once.
    """
    roles: dict[str, str] = {}
    for stage, entry in run.manifest["stages"].items():
        if stage.startswith("build:") and entry.get("status") == "done":
            parts = built_parts(entry)
            roles[entry["folder"]] = "step" if parts else "whole"
            roles |= {part["folder"]: part["name"] for part in parts}
    return roles


def _missing(run: Run) -> list[str]:
    begun = {name.partition(":")[0] for name, entry in run.manifest["stages"].items() if entry.get("status") == "done"}
    return [stage for stage in UPSTREAM if stage not in begun and stage not in OPTIONAL]


def doctor() -> dict[str, Any]:
    """Return versions, engines (and why one cannot run), how they multiply INT8 on this processor, memory and disk."""
    import psutil
    import torch

    from qdiff.engines import describe
    from qdiff.models import FAMILIES
    from qdiff.models.loading import bundled_folder

    return {
        "versions": versions(),
        "cpu": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "memory_bytes": {"total": psutil.virtual_memory().total, "available": psutil.virtual_memory().available},
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "engines": [
            {
                "name": row.name,
                "title": row.title,
                "runs": row.available,
                "builds": row.can_build,
                "version": row.version,
                "why_not": row.why_not,
                "why_not_build": row.why_not_build,
                "integers": row.integers,
            }
            for row in describe()
        ],
        "models": [
            {"name": name, "title": FAMILIES[name].title, "bundled": bundled_folder(name).is_dir()} for name in FAMILIES
        ],
    }


def models() -> list[dict[str, Any]]:
    """Return the families, what their bundled weights are, and the configurations for random weights."""
    from qdiff.models import FAMILIES
    from qdiff.models.loading import bundled_folder

    rows = []
    for name in FAMILIES:
        family, folder = FAMILIES[name], bundled_folder(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else None
        rows.append(
            {
                "name": name,
                "title": family.title,
                "pipelines": list(family.pipelines),
                "bundled_bytes": size,
                "random_configurations": [f"random:{configuration}" for configuration in family.configurations],
            }
        )
    return rows
