"""Which model is meant: a pipeline object, a diffusers folder, a Hub id, or the name of a bundled model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, UsageError, command, nearest, option
from qdiff.events import log
from qdiff.files import read_json, sha256_file, write_text
from qdiff.runs import manifest
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAVED = "pipeline"  # folder of a run that holds a pipeline which was given as an object
FINGERPRINT = "qdiff.sha256"  # file in that folder, written last: what was saved, whole


@dataclass(frozen=True)
class Source:
    """A model family and its weights, as :meth:`qdiff.models.base.Family.load` takes them."""

    model: str
    weights: str


def begin(
    source: DiffusionPipeline | Path | str,
    output: Path | str | None,
    *,
    revision: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
) -> tuple[Source, Run]:
    """Return family and weights of a model, and the run that its stages go into. Arguments and errors as of :func:`source_of`."""
    chosen = source_of(source, output, revision=revision, weights=weights, force=force)
    return chosen, Run(_run_folder(output, chosen.model))


def _run_folder(output: Path | str | None, model: str) -> Path:
    return Path("runs") / model if output is None else Path(output)


def source_of(
    source: DiffusionPipeline | Path | str,
    output: Path | str | None,
    *,
    revision: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
) -> Source:
    """Return the family and the weights of a model.

    A pipeline object is saved into the folder ``pipeline`` of the run, because later stages, and other processes, load the same
    weights again. It is not saved again while the folder holds the same.

    Args:
        source: a diffusers pipeline, a folder that ``save_pretrained`` wrote, a Hub id (``owner/name``), or the name of a family,
            which means its bundled weights.
        output: the run folder; ``None``: ``runs/MODEL``.
        revision: of a Hub id.
        weights: where the weights of a pipeline object are, as a folder or Hub id; it is not saved then.
        force: whether a pipeline that a run was calibrated with is replaced by another.

    Raises:
        UsageError: something else; ``weights`` are for a pipeline object or the name of a family.
        InputError: no family of qdiff loads this pipeline, it has a LoRA that is not fused, or the run is of another pipeline.
    """
    from qdiff.models import FAMILIES

    if not isinstance(source, str | Path):
        return _of_pipeline(source, output, weights, force)
    if weights is not None or str(source) in FAMILIES:
        FAMILIES[str(source)]  # refuses a name that is none, with the nearest ones
        return Source(str(source), "bundled" if weights is None else str(weights))
    return Source(_family_of_weights(str(source), revision), str(source))


def _of_pipeline(pipe: object, output: Path | str | None, weights: Path | str | None, force: bool) -> Source:
    from diffusers import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise UsageError(
            f"{type(pipe).__name__} is no diffusers pipeline, folder, Hub id or model name",
            "any other torch module is quantized by qdiff.quantize_module",
        )
    model = _family_of_class(type(pipe).__name__)
    if weights is not None:
        return Source(model, str(weights))
    from qdiff.models import FAMILIES

    backbone = getattr(pipe, FAMILIES[model].backbone_attribute)
    if any("lora" in name for name, _ in backbone.named_parameters()):
        raise InputError(
            "the pipeline's backbone has a LoRA that is not fused",
            "call pipe.fuse_lora(), then pipe.unload_lora_weights()",
        )
    folder = _run_folder(output, model) / SAVED
    _save(pipe, folder, force)
    return Source(model, str(folder.absolute()))


def _save(pipe: Any, folder: Path, force: bool) -> None:
    """Save a pipeline, unless it lies in the folder already, with the same weights, configurations and vocabularies.

    Raises:
        InputError: a run that was calibrated with another one is there, and ``force`` is not set.
    """
    wanted, note = _fingerprint(pipe), folder / FINGERPRINT
    if note.is_file() and note.read_text(encoding="utf-8") == wanted:
        log.info("the pipeline is in %s already (fingerprint %s): it is not saved again", folder, wanted[:12])
        return
    if note.is_file() and manifest.is_there(folder.parent) and not force:
        raise InputError(
            f"{folder.parent} was calibrated with another pipeline (other weights or settings)",
            f"choose another folder with {option('output')}, or calibrate anew with {option('force', True)}",
        )
    note.unlink(missing_ok=True)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    write_text(note, wanted)


def _fingerprint(pipe: Any) -> str:
    """Return sha256 over everything of a pipeline that its folder would hold, without writing its weights."""
    import torch

    digest = hashlib.sha256(_settings(pipe.config).encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__}".encode())
        if isinstance(part, torch.nn.Module):
            digest.update(_settings(getattr(part, "config", {})).encode())
            for key, tensor in sorted(part.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif hasattr(part, "save_pretrained"):
            with tempfile.TemporaryDirectory(prefix="qdiff-") as place:
                part.save_pretrained(place)
                for file in sorted(path for path in Path(place).rglob("*") if path.is_file()):
                    small = file.name.endswith("_config.json")
                    held = _settings(read_json(file, file.name)) if small else sha256_file(file)
                    digest.update(f"{file.relative_to(place)} {held}".encode())
    return digest.hexdigest()


def _settings(config: Mapping[str, object]) -> str:
    """Return a configuration as text, without what changes when it is saved or loaded (where it lay, which code wrote it)."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    passing = ("architectures", "dtype", "torch_dtype", "name_or_path", "is_local", "local_files_only")
    own = {name: value for name, value in values.items() if not name.startswith("_") and name not in passing}
    return json.dumps(own, sort_keys=True, default=str)


def _family_of_weights(weights: str, revision: str | None) -> str:
    from qdiff.files import path_of
    from qdiff.models import FAMILIES
    from qdiff.models.folders import read_index
    from qdiff.models.hub import download, is_id

    folder = path_of(weights)
    if not folder.is_dir():
        if not is_id(weights):
            close = nearest(weights, FAMILIES)
            raise UsageError(
                f"{weights!r} is no model name, folder or Hub id: there is no such folder",
                f"did you mean {' or '.join(close)}?"
                if close
                else f"{command('list_models')} lists the names of bundled models",
            )
        folder, _ = download(weights, revision)
    return _family_of_class(str(read_index(folder).get("_class_name")))


def _family_of_class(name: str) -> str:
    from qdiff.models import FAMILIES

    for family in FAMILIES:
        if name in FAMILIES[family].pipelines:
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in FAMILIES[family].pipelines)
    raise InputError(f"no family of qdiff loads a {name}", f"known pipeline classes: {known}")
