"""Which model is meant: a pipeline object, a diffusers folder, a Hub id, or the name of a bundled model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, UsageError
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAVED = "pipeline"  # folder of a run that holds a pipeline which was given as an object


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
) -> tuple[Source, Run]:
    """Return family and weights of a model, and the run that its stages go into. Arguments and errors as of :func:`source_of`."""
    chosen = source_of(source, output, revision=revision, weights=weights)
    return chosen, Run(_run_folder(output, chosen.model))


def _run_folder(output: Path | str | None, model: str) -> Path:
    return Path("runs") / model if output is None else Path(output)


def source_of(
    source: DiffusionPipeline | Path | str,
    output: Path | str | None,
    *,
    revision: str | None = None,
    weights: Path | str | None = None,
) -> Source:
    """Return the family and the weights of a model.

    A pipeline object is saved into the folder ``pipeline`` of the run, because later stages, and other processes, load the same
    weights again.

    Args:
        source: a diffusers pipeline, a folder that ``save_pretrained`` wrote, a Hub id (``owner/name``), or the name of a family,
            which means its bundled weights.
        output: the run folder; ``None``: ``runs/MODEL``.
        revision: of a Hub id.
        weights: where the weights of a pipeline object are, as a folder or Hub id; it is not saved then.

    Raises:
        UsageError: something else; ``weights`` are for a pipeline object or the name of a family.
        InputError: no family of qdiff loads this pipeline, or it has a LoRA that is not fused.
    """
    from qdiff.models import FAMILIES

    if not isinstance(source, str | Path):
        return _of_pipeline(source, output, weights)
    if weights is not None or str(source) in FAMILIES:
        FAMILIES[str(source)]  # refuses a name that is none, with the nearest ones
        return Source(str(source), "bundled" if weights is None else str(weights))
    return Source(_family_of_weights(str(source), revision), str(source))


def _of_pipeline(pipe: Any, output: Path | str | None, weights: Path | str | None) -> Source:
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
    pipe.save_pretrained(str(folder), safe_serialization=True)  # type: ignore[attr-defined]
    return Source(model, str(folder.absolute()))


def _family_of_weights(weights: str, revision: str | None) -> str:
    from qdiff.files import path_of
    from qdiff.models.folders import read_index
    from qdiff.models.hub import download, is_id

    folder = path_of(weights)
    if not folder.is_dir():
        if not is_id(weights):
            raise UsageError(
                f"{weights!r} is no model name, folder or Hub id",
                "qdiff.list_models() lists the names of bundled models",
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
