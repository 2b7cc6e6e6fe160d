"""Correcting the trajectory: fits the methods of :mod:`qdiff.correction` to a quantized model and keeps the one that pictures
want, or none.

Nothing here is believed because a statistic says so: what makes the error of single predictions smaller can make pictures worse.
So every method is judged by pictures on seeds that it was not fitted on, and where none gains :data:`MINIMUM_GAIN` the file says
that and nothing is applied.

``goal`` is what pictures are judged by. ``float``: PSNR to what the float model makes. ``prompt``: root mean squared error to
the nearest picture that the bundled models know (the one that was asked for, as long as the emoji is right), without a float
model. A goal without a reference also rewards what would make *any* model draw better; so the same search is done on the float
model, and only what the quantized model gains beyond that counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from qdiff.errors import InputError, UsageError, option
from qdiff.events import Progress, log
from qdiff.files import read_json, sha256_json, write_json
from qdiff.runs.partial import Scratch
from qdiff.runs.run import Run
from qdiff.stages.build import beside, default_engine, device_beside, require_runner
from qdiff.stages.calibrated_model import calibrated_model, options_of
from qdiff.stages.generate import CORRECTION, Session, check_pictures, make_request

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.correction import Correction
    from qdiff.correction.moments import PairMoments
    from qdiff.models.model import Request
    from qdiff.recording.trajectory import Step

Goal = Literal["float", "prompt"]
Scorer = Callable[["Session", "Correction | None"], float]
SEARCH_SEED, JUDGE_SEED = 30_000, 35_000  # neither calibration's nor comparison's
SEARCH_PICTURES = 8
FEW_STEPS = 8  # of a sampler; Q-Sched is made for those, and searching over pictures of more takes long
SCORES = "correction"  # pictures' scores so far, until the stage is done
MOST_CALLS = 400  # recorded calls that the statistics are made of
UNITS = {"float": "dB", "prompt": "grey levels"}
MINIMUM_GAIN = {"float": 0.1, "prompt": 0.05}  # less is within what two runs differ by


def correct(
    run: Run,
    methods: list[str] | None = None,
    *,
    engine: str | None = None,
    goal: Goal = "float",
    pictures: int = 16,
    force: bool = False,
) -> dict[str, Any]:
    """Write ``correction.json``: what was tried, and what is applied whenever the run's quantized engines make
    pictures.

    Args:
        run: with a built engine.
        methods: names of :data:`qdiff.correction.CORRECTIONS`; when not given, all of them, those that search over pictures only
            where the sampler takes few steps.
        engine: the quantized engine that makes the pictures; the fastest that is there when not given.
        goal: what pictures are judged by.
        pictures: how many judge.
        force: make anew what is there.

    Raises:
        InputError: an unknown method.
        UsageError: the goal ``prompt`` for a model that was not trained on the emoji; the float model as the engine.
    """
    from qdiff.correction import CORRECTIONS
    from qdiff.engines import choose_engine
    from qdiff.models import FAMILIES

    calibrated = options_of(run)
    chosen = methods or [name for name in CORRECTIONS if not CORRECTIONS[name].searches or _few_steps(run)]
    for method in chosen:
        CORRECTIONS[method]
    name = choose_engine(engine or default_engine(run)).name
    if name == "float":
        raise UsageError(
            f"{option('engine', 'float')} is the model that a correction aims at",
            "name an engine of the quantized model",
        )
    check_pictures(pictures)
    if run.file(CORRECTION).is_dir():
        raise InputError(f"{run.file(CORRECTION)} is a folder, and the correction has to be written there", "remove it")
    require_runner(run, name)
    if goal == "prompt" and (calibrated.weights != "bundled" or FAMILIES[calibrated.model].media == "video"):
        raise UsageError(
            f"{option('goal', 'prompt')} judges pictures of the bundled models alone", f"use {option('goal', 'float')}"
        )
    inputs = {
        "quantize": run.outputs_hash("quantize"),
        "methods": chosen,
        "engine": name,
        "goal": goal,
        "pictures": pictures,
    }
    inputs |= device_beside(run, [name])
    needs = ("calibrate", "quantize")  # the recorded calls are what a correction is fitted to
    with run.stage("correct", inputs, force=force, replace=True, leftovers=[SCORES], needs=needs) as work:
        if work is not None:
            owner = sha256_json(inputs)
            scratch = Scratch(run.file(SCORES, owner[:12]), owner)
            with beside(run, [name]):
                found = _Work(run, name, goal, pictures, scratch).try_all(chosen)
            write_json(work.output(run.file(CORRECTION)), found)
            shutil.rmtree(run.file(SCORES), ignore_errors=True)  # also of earlier tries with other settings
    return {"run": str(run.path), **read_json(run.file(CORRECTION), "the correction")}


def _few_steps(run: Run) -> bool:
    return len(set(run.entry("calibrate")["timesteps"])) <= FEW_STEPS


class _Work:
    """Float and quantized model side by side, on the recorded calls and on pictures."""

    def __init__(self, run: Run, engine: str, goal: Goal, pictures: int, scratch: Scratch) -> None:
        self.run, self.engine, self.goal, self.scratch = run, engine, goal, scratch
        self.calibrated = calibrated_model(run)
        self.model = self.calibrated.model
        self.float_backbone = self.model.backbone
        self.search = self._request(SEARCH_SEED, SEARCH_PICTURES)
        self.judge = self._request(JUDGE_SEED, pictures)

    def try_all(self, methods: list[str]) -> dict[str, Any]:
        """Return what ``correction.json`` holds."""
        quantized = self._gains(self.engine, methods)
        control = self._gains("float", methods) if self.goal == "prompt" else {}
        tried = []
        for method, row in quantized.items():
            beside = control[method]["gain"] if control else 0.0
            tried.append({"method": method, **row, "gain_of_float": beside, "counts": row["gain"] - max(0.0, beside)})
            log.info("correct: %s gains %+.3f %s", method, tried[-1]["counts"], UNITS[self.goal])
        best = max(tried, key=lambda row: row["counts"])
        kept = best["counts"] >= MINIMUM_GAIN[self.goal]
        return {
            "goal": self.goal,
            "unit": UNITS[self.goal],
            "engine": self.engine,
            "tried": [{name: value for name, value in row.items() if name != "correction"} for row in tried],
            "method": best["method"] if kept else None,
            "correction": best["correction"] if kept else None,
        }

    def _gains(self, engine: str, methods: list[str]) -> dict[str, dict[str, Any]]:
        """Return, for every method, its correction, fitted to an engine, and what pictures gain by it."""
        from qdiff.correction import CORRECTIONS

        judging = self._scorer(self.judge)
        # float pictures to search on are made only where a method searches
        searching = self._scorer(self.search) if any(CORRECTIONS[name].searches for name in methods) else judging
        session = Session(self.run, engine, self.model)
        try:
            moments = self._moments(session)
            plain = judging(session, None)
            found = {}
            for method in methods:
                correction = CORRECTIONS[method].fit(moments, partial(searching, session))
                score = judging(session, correction)
                found[method] = {
                    "score": score,
                    "gain": score - plain,
                    "correction": correction.model_dump(mode="json"),
                }
        finally:
            session.close()
        return found

    def _moments(self, session: Session) -> PairMoments:
        """Return the guided predictions of both models on the recorded calls."""
        import torch

        from qdiff.correction.moments import PairMoments

        family, moments = self.model.family, PairMoments()
        steps = list(islice(self.calibrated.trajectory, MOST_CALLS))
        with torch.inference_mode(), Progress(f"predict ({session.engine} beside float)", len(steps)) as progress:
            for step in steps:
                expected = self._guided(family.call(self.float_backbone, step.inputs), step)
                moments.add(step.timestep, expected, self._guided(session.runner(step.inputs), step))
                progress.advance()
        return moments

    def _guided(self, prediction: Tensor, step: Step) -> Tensor:
        """Return what the pipeline hands to the scheduler: both branches joined, a learned variance left out."""
        from qdiff.recording.inputs import latent_of

        latent = step.inputs[latent_of(self.model.family.inputs(self.float_backbone.config)).name]  # type: ignore[arg-type]
        prediction = prediction[:, : latent.shape[1]].float()
        guidance = self.model.guidance(self.calibrated.options.guidance)
        if not self.calibrated.guided:
            return prediction
        without, given = prediction.chunk(2)
        return without + guidance * (given - without)

    def _scorer(self, request: Request) -> Scorer:
        """Return how good an engine's pictures are with a correction; larger is better. What was scored before a kill
        is remembered.
        """
        score = self._new_scorer(request)

        def remembered(session: Session, correction: Correction | None) -> float:
            numbers = None if correction is None else correction.model_dump(mode="json")
            part = sha256_json([session.engine, request.seeds[0], numbers])[:16]
            known = self.scratch.load(part)
            if known is not None:
                return float(known[1])
            found = score(session, correction)
            self.scratch.save(part, {}, found)
            return found

        return remembered

    def _new_scorer(self, request: Request) -> Scorer:
        from qdiff.evaluation.images import to_pixels
        from qdiff.evaluation.metrics import paired
        from qdiff.stages.compare import accuracy

        def pictures(session: Session, correction: Correction | None) -> list[Any]:
            session.correction = correction
            return session.pictures(request, self.calibrated.options.batch).images

        if self.goal == "prompt":

            def nearness(session: Session, correction: Correction | None) -> float:
                found = accuracy(self.model, pictures(session, correction), list(request.prompts))
                assert found is not None
                return -float(found["distance"])

            return nearness
        reference = Session(self.run, "float", self.model)
        try:
            expected = to_pixels(pictures(reference, None))
        finally:
            reference.close()
        return lambda session, correction: paired(expected, to_pixels(pictures(session, correction))).psnr_db_mean

    def _request(self, seed: int, count: int) -> Request:
        from qdiff.models.model import default_prompts

        first = seed + self.calibrated.options.seed
        return make_request(self.run, default_prompts(count, first, self.model.family.media), seed=first)
