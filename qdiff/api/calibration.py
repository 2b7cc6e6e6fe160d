"""The first stage: a model is run on prompts, and what its backbone is given is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from qdiff.api.arguments import checked, unknown_argument
from qdiff.api.progress import Progress
from qdiff.api.run import working
from qdiff.api.source import begin
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from qdiff.stages.calibrate import CalibrateOptions


class Calibration(TypedDict, total=False):
    """Options of a calibration; what is left out is the model's own default.

    Keys:
        revision: commit, tag or branch of a Hub id.
        samples: how many prompts are taken.
        steps: denoising steps.
        guidance: guidance scale, or several that batches of prompts take turns at.
        scheduler: ``"dpmsolver++"`` … or a diffusers class name.
        height, width: in pixels.
        frames: of a clip.
        timesteps: which steps are recorded: ``"uniform"``, ``"normal"`` or ``"all"``.
        keep: how many steps of a trajectory are recorded.
        batch: prompts that are denoised together.
        seed: picture i starts from the noise of ``seed + i``.
    """

    revision: str | None
    samples: int | None
    steps: int | None
    guidance: float | Sequence[float] | None
    scheduler: str | None
    height: int | None
    width: int | None
    frames: int | None
    timesteps: str
    keep: int
    batch: int
    seed: int


@checked
def calibrate(
    source: DiffusionPipeline | Path | str = "pixart",
    *,
    output: Path | str | None = None,
    prompts: Sequence[str] | Path | None = None,
    weights: Path | str | None = None,
    attention: bool = False,
    force: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    progress: Progress = None,
    **options: Unpack[Calibration],
) -> Run:
    """Run the float model on prompts; record its trajectory and the statistics of its layers.

    Args:
        source: a diffusers pipeline, a folder, a Hub id, or the name of a bundled model.
        output: the run folder; ``None``: ``runs/MODEL``.
        prompts: texts, or a UTF-8 file with one a line; ``None``: those of the kind that the bundled models know.
        weights: for a pipeline object, where its weights are (it is saved into the run folder otherwise); for a family's name,
            the weights in the place of the bundled ones.
        attention: whether self-attentions are looked at too, for :func:`quantize` with a density.
        force: whether a finished calibration is made anew.
        dry_run: whether only an estimate is made.
        device: where torch computes.
        progress: see :data:`qdiff.api.progress.Progress`.
        options: see :class:`Calibration`.

    Returns:
        the run, with ``run.results["calibrate"]``.

    Raises:
        UsageError: an option out of range.
        InputError: a model that cannot be loaded, or a folder that another model was calibrated in.
    """
    from qdiff.stages import calibrate as stage

    with working(device, progress):
        chosen, run = begin(source, output, revision=options.get("revision"), weights=weights, force=force)
        if attention:
            from qdiff.stages.attention import require_sparse

            require_sparse(chosen.model)
        settings = calibration_options(chosen.model, chosen.weights, prompts, options)
        result = stage.calibrate(run, settings, force=force, dry_run=dry_run)
        if attention and not dry_run:
            from qdiff.stages.attention import calibrate_attention

            result["attention"] = calibrate_attention(run, force=force)
    run.results["calibrate"] = result
    return run


def calibration_options(
    model: str, weights: str, prompts: Sequence[str] | Path | None, options: Calibration
) -> CalibrateOptions:
    """Return the options of the stage. Of several guidance scales the first is the calibration's own.

    Raises:
        UsageError: an option that there is not.
    """
    from dataclasses import fields

    from qdiff.calib.prompts import check_prompts
    from qdiff.stages.calibrate import CalibrateOptions

    unknown = set(options) - {field.name for field in fields(CalibrateOptions)}
    if unknown:
        raise unknown_argument("a calibration", min(unknown), Calibration.__annotations__)
    guidance = options.get("guidance")
    first, *others = guidance if isinstance(guidance, Sequence) else [guidance]
    settings: dict[str, Any] = {**options, "guidance": first, "other_guidance": tuple(others)}
    texts = prompts if isinstance(prompts, Path) or prompts is None else tuple(check_prompts(prompts))
    return CalibrateOptions(model=model, weights=weights, prompts=texts, **settings)
