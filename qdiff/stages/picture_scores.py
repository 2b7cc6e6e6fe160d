"""Pictures that decide: what a backbone that is being made draws, beside what the float model draws, same prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qdiff.errors import QualityGateError
from qdiff.events import log

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qdiff.allocation.mixed import PictureScore
    from qdiff.allocation.sensitivity import PictureErrors
    from qdiff.evaluation.metrics import PairedQuality
    from qdiff.stages.calibrated_model import CalibratedModel

PLAN_SEED = 20_000  # of the pictures that decide between plans: neither calibration's nor comparison's
LOOK_SEED = 25_000  # of the pictures that tell what a group does to them


def picture_score(calibrated: CalibratedModel, backbone: nn.Module, count: int) -> PictureScore:
    """Return the score of :func:`picture_score_of` with ``count`` of the calibration's prompts, on seeds of its own."""
    return picture_score_of(calibrated, backbone, calibrated.prompts(count), PLAN_SEED + calibrated.options.seed)


def picture_errors_of(calibrated: CalibratedModel, backbone: nn.Module, count: int) -> PictureErrors:
    """Return the squared error and the loss of structure of ``count`` pictures, of the calibration's prompts on seeds
    of their own.
    """
    compare = comparison(calibrated, backbone, calibrated.prompts(count), LOOK_SEED + calibrated.options.seed)

    def picture_errors() -> tuple[float, float]:
        found = compare()
        errors = [10 ** (-image.psnr_db / 10) for image in found.per_image]
        return sum(errors) / len(errors), 1.0 - found.ssim_mean

    return picture_errors


def picture_score_of(calibrated: CalibratedModel, candidate: nn.Module, prompts: list[str], seed: int) -> PictureScore:
    """Return the mean PSNR of the pictures that a backbone makes, as it then is. Arguments as of :func:`comparison`."""
    compare = comparison(calibrated, candidate, prompts, seed)
    return lambda: compare().psnr_db_mean


def comparison(
    calibrated: CalibratedModel, candidate: nn.Module, prompts: list[str], seed: int
) -> Callable[[], PairedQuality]:
    """Compare the pictures of a backbone, as it then is, with those of the float model, same prompts and seeds. A
    backbone that makes NaN is compared as what diffusers draws of NaN, black: it is the worst of those that are tried,
    not the end of trying.

    Args:
        calibrated: the float model.
        candidate: the backbone that is compared.
        prompts: one for each picture.
        seed: of the first picture.
    """
    import torch

    from qdiff.evaluation.images import to_pixels
    from qdiff.evaluation.metrics import paired
    from qdiff.models.model import Request
    from qdiff.stages.generate import simulate

    model, options = calibrated.model, calibrated.options
    seeds = [seed + index for index in range(len(prompts))]
    request = Request(prompts, seeds, steps=options.steps, guidance=options.guidance, scheduler=options.scheduler)

    def make(backbone: nn.Module) -> Tensor:
        return to_pixels(simulate(model, backbone, request, options.batch))

    expected = make(model.backbone)

    def compare() -> PairedQuality:
        try:
            return paired(expected, make(candidate))
        except QualityGateError as error:
            log.warning("%s", error.message)
            return paired(expected, torch.zeros_like(expected))

    return compare
