"""Stage 1b: what self-attentions look at. Only where attention is to be sparse."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qdiff.errors import InputError, command, option
from qdiff.events import log
from qdiff.runs.run import Run
from qdiff.stages.calibrated_model import ATTENTION_STATISTICS, CalibratedModel, calibrated_model, options_of

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.plan.attention_plan import AttentionPlan
    from qdiff.plan.recipe import Attention

STAGE = "attention"
SCRATCH = "attention/passes"  # finished passes, until the stage is done


def calibrate_attention(run: Run, *, force: bool = False) -> dict[str, Any]:
    """Write ``attention/statistics.safetensors``: orders of tokens, masses of blocks, errors.

    Raises:
        InputError: a family whose self-attentions are not known, or a trajectory that is too short.
    """
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions

    options = AttentionOptions()
    inputs = {"calibrate": run.outputs_hash("calibrate"), **asdict(options)}
    with run.stage(STAGE, inputs, force=force, leftovers=["attention"], needs=["calibrate"]) as work:
        if work is not None:
            scratch, calibrated = work.scratch(SCRATCH), calibrated_model(run)
            statistics = AttentionCalibration(calibrated.model, calibrated.trajectory, options, scratch).run()
            statistics.save(work.file(ATTENTION_STATISTICS))
            work.fact(
                layers=len(statistics.layers),
                heads=sum(len(heads) for heads in statistics.orders),
                tokens=statistics.tiling.tokens,
                edges=statistics.edges,
                device=str(calibrated.model.device),
            )
            scratch.clear()
    return {"run": str(run.path), **{name: run.entry(STAGE)[name] for name in ("layers", "heads", "tokens", "seconds")}}


def require_sparse(model: str) -> None:
    """Refuse sparse attention for a family that has none, before any work.

    Raises:
        InputError: its self-attentions are not known.
    """
    from qdiff.models import FAMILIES

    family = FAMILIES[model]
    if not family.can_be_sparse:
        raise InputError(
            f"attentions of {family.title} cannot follow block lists",
            f"leave {option('density')} and {option('attention')} out",
        )


def require_statistics(run: Run) -> None:
    """Refuse to go on without them, or with changed ones.

    Raises:
        InputError: with the command that makes them; or the family has no self-attentions that are known.
        IntegrityError: they were changed after they were made.
    """
    require_sparse(options_of(run).model)
    if not run.done(STAGE):
        raise InputError(
            f"sparse attention needs to know what {run.path} looks at, which was not calibrated",
            f"run the same calibration, with attention: {command('calibrate', '…', attention=True, output=run.path)}",
        )
    run.verify(STAGE)


def decide_attention(calibrated: CalibratedModel, wish: Attention) -> tuple[AttentionPlan, Tensor]:
    """Return which blocks every head reads, for a recipe's wish:
    :func:`qdiff.allocation.attention_masks.decide_masks`.
    """
    from qdiff.allocation.attention_masks import decide_masks
    from qdiff.attention.numerics import numerics_named

    if not numerics_named(wish.numerics).exported:
        log.warning(
            "attention in %s runs in torch alone: no engine takes it (docs/how-to/sparse-attention.md)", wish.numerics
        )
    model, statistics = calibrated.model, calibrated.attention_statistics
    dense = len(model.family.self_attentions(model.backbone)) - len(statistics.layers)
    return decide_masks(statistics, wish.density, wish.numerics, calibrated.statistics.timesteps, dense)
