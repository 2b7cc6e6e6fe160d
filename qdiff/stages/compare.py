"""Stage 5: the same prompts and seeds on the float model and on engines, how far the pictures are apart, and which is faster
(:mod:`qdiff.stages.speed`).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from qdiff.errors import QualityGateError, UsageError, command, option
from qdiff.events import log
from qdiff.files import write_json
from qdiff.resources import require_disk
from qdiff.runs.run import Run
from qdiff.stages.build import beside, default_engine, device_beside, require_runner
from qdiff.stages.calibrated_model import options_of, reload_model
from qdiff.stages.disk import picture_bytes
from qdiff.stages.generate import Pictures, Session, check_pictures, make_request, save_pictures
from qdiff.stages.quantize import floor_of
from qdiff.stages.speed import measure_speeds

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.evaluation.motion import MotionAccuracy
    from qdiff.evaluation.prompt_accuracy import PromptAccuracy
    from qdiff.evaluation.timing import Speed
    from qdiff.models.model import Model, Request

DEFAULT_PICTURES = 16
# Seeds of compared pictures start here: far from calibration's, so that no picture was calibrated on.
SEED_OFFSET = 10_000


def compare(
    run: Run,
    *,
    engines: list[str] | None = None,
    prompts: list[str] | None = None,
    pictures: int = DEFAULT_PICTURES,
    seed: int | None = None,
    minimum_psnr: float | None = None,
    force: bool = False,
    accept_quality: bool = False,
) -> dict[str, Any]:
    """Write ``images/<engine>/NNN.png`` and ``compare.json``.

    Args:
        run: with built engines.
        engines: names; ``None``: the default engine.
        prompts: texts; ``None``: default ones for pictures or clips.
        pictures: how many.
        seed: the first; ``None``: far from the calibration's.
        minimum_psnr: in dB.
        force: make anew what is there.
        accept_quality: whether pictures below the recipe's floor are no error.

    Raises:
        QualityGateError: the first engine's mean PSNR is below ``minimum_psnr``, or that of any engine below ``floors.pictures``
            of the recipe. The pictures are kept.
    """
    from qdiff.models import FAMILIES
    from qdiff.models.model import default_prompts

    check_pictures(pictures)
    check_gate(minimum_psnr)
    calibrated = options_of(run)
    chosen = engines or [default_engine(run)]
    require_comparable(chosen)
    for name in chosen:
        require_runner(run, name)
    first_seed = SEED_OFFSET + calibrated.seed if seed is None else seed
    prompts = prompts or default_prompts(pictures, first_seed, FAMILIES[calibrated.model].media)
    request = make_request(run, prompts, seed=first_seed)
    inputs = {
        "quantize": run.outputs_hash("quantize"),
        "builds": {name: run.entry(f"build:{name}")["folder"] for name in chosen if run.done(f"build:{name}")},
        "engines": chosen,
        "prompts": prompts,
        "seed": first_seed,
    }
    inputs |= device_beside(run, chosen)
    if run.done("correct"):
        inputs["correct"] = run.outputs_hash("correct")
    with run.stage("compare", inputs, force=force, replace=True, leftovers=["images"]) as work:
        if work is not None:
            with beside(run, chosen):
                _work(run, request, chosen, work)
    result = _summary(run)
    psnr = result["engines"][0]["psnr_db_mean"]
    if minimum_psnr is not None and not psnr >= minimum_psnr:
        raise QualityGateError(
            f"the pictures of {chosen[0]} have a mean PSNR of {psnr:.2f} dB against float, the gate is {minimum_psnr:g} dB",
            f"see {run.file('images')}; keep more layers in 16 bit (ignore), or lower the gate",
        )
    if not accept_quality:
        _require_quality(run, result["engines"])
    return result


def _require_quality(run: Run, engines: list[dict[str, Any]]) -> None:
    floor = floor_of(run, "pictures")
    for row in engines:
        if not row["psnr_db_mean"] >= floor:
            psnrs = [picture["psnr_db"] for picture in row["per_picture"]]
            worst = psnrs.index(min(psnrs))
            raise QualityGateError(
                f"the pictures of {row['name']} have a mean PSNR of {row['psnr_db_mean']:.2f} dB against float, the floor is "
                f"{floor:g} dB; the worst is picture {worst:03d} with {psnrs[worst]:.2f} dB",
                f"see {run.file('images')}; keep more layers in 16 bit (ignore), or take a recipe of more bits; or take the "
                f"pictures as they are with {option('accept_quality', True)}",
            )


def check_gate(minimum_psnr: float | None) -> None:
    """Refuse a gate that is no number of decibels, before anything is done for it.

    Raises:
        UsageError: NaN, infinity or a negative number.
    """
    if minimum_psnr is not None and not 0 <= minimum_psnr < math.inf:
        raise UsageError(f"{option('minimum_psnr', minimum_psnr)} is no number of dB from 0 on", "30 is usual")


def require_comparable(engines: list[str]) -> None:
    """Refuse the reference as something to compare with it.

    Raises:
        UsageError: with what to name instead.
    """
    if "float" in engines:
        raise UsageError(
            "float is what engines are compared with",
            f"name an engine ({command('doctor')} lists them), or eager for torch",
        )


def _work(run: Run, request: Request, engines: list[str], work: Any) -> None:
    model = reload_model(run)
    log.info("compare: %d pictures, float beside %s", len(request.prompts), ", ".join(engines))
    require_disk(run.path, picture_bytes(model, len(request.prompts), len(engines)), "the pictures")
    made: dict[str, Pictures] = {}
    together = model.calls_of_a_step(request.guidance, request.scheduler)
    calls: list[dict[str, Tensor]] = []
    for name in ["float", *engines]:
        session = Session(run, name, model)
        if name == "float":
            calls = session.recorder(model.steps(request.steps) * together).calls
        try:
            made[name] = session.pictures(request)
        finally:
            session.close()
        paths = [run.file("images", name, f"{i:03d}.png") for i in range(len(request.prompts))]
        save_pictures(run, made[name], request, model, paths)
        for path in paths:
            work.output(path)
            if model.family.media == "video":
                work.output(path.with_suffix(".mp4"))
    speeds = measure_speeds(run, model, engines, calls, together, made)
    result = {
        "prompts": list(request.prompts),
        "seeds": list(request.seeds),
        "engines": [_judge(name, made, speeds[name], request, model) for name in ["float", *engines]],
    }
    write_json(work.output(run.file("compare.json")), result)
    work.fact(device=str(model.device))


def _judge(name: str, made: dict[str, Pictures], speed: Speed, request: Request, model: Model) -> dict[str, Any]:
    from qdiff.evaluation.images import to_pixels
    from qdiff.evaluation.metrics import motion, paired

    pictures = made[name]
    row: dict[str, Any] = {
        "name": name,
        **speed.to_json(),
        "load_seconds": pictures.load_seconds,
        "added_bytes": pictures.added_bytes,
        "accuracy": accuracy(model, pictures.images, list(request.prompts)),
    }
    if name != "float":
        expected, got = to_pixels(made["float"].images), to_pixels(pictures.images)
        quality = paired(expected, got)
        if model.family.media == "video":
            row["motion"] = asdict(motion(expected, got))
        row |= {
            "psnr_db_mean": quality.psnr_db_mean,
            "psnr_db_min": quality.psnr_db_min,
            "ssim_mean": quality.ssim_mean,
            "per_picture": [{"psnr_db": pair.psnr_db, "ssim": pair.ssim} for pair in quality.per_image],
        }
    return row


def accuracy(model: Model, images: list[Any], prompts: list[str]) -> PromptAccuracy | MotionAccuracy | None:
    """Return the share of pictures or clips that show what their prompt names; ``None`` for models that were not
    trained on the emoji.
    """
    if model.weights != "bundled":
        return None
    from qdiff.evaluation.images import to_pixels
    from qdiff.evaluation.motion import motion_accuracy
    from qdiff.evaluation.prompt_accuracy import prompt_accuracy

    judge = motion_accuracy if model.family.media == "video" else prompt_accuracy
    return judge(to_pixels(images).numpy(), prompts)


def _summary(run: Run) -> dict[str, Any]:
    from qdiff.files import read_json

    data = read_json(run.file("compare.json"), "the comparison")
    rows = [row for row in data["engines"] if row["name"] != "float"]
    return {
        "run": str(run.path),
        "pictures": len(data["prompts"]),
        "images": str(run.file("images")),
        "engines": rows,
        "float": data["engines"][0],
    }
