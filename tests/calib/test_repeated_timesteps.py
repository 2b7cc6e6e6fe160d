"""Samplers that come to a timestep's value more than once: every call is recorded, and tables stay keyed by the value."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch

from qdiff.calib.collect import Collector
from qdiff.calib.record import Recording, joined, record
from qdiff.errors import InputError
from qdiff.models import FAMILIES
from qdiff.models.model import Model
from qdiff.recording.trajectory import Trajectory
from tests.published_folders import BETAS

SCHEDULERS = {
    "pndm": (diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True), 4),
    "pndm with Runge-Kutta": (diffusers.PNDMScheduler(**BETAS), 4),
    "heun": (diffusers.HeunDiscreteScheduler(**BETAS), 3),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler(**BETAS), 3),
    "karras": (diffusers.DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), 50),
    "singlestep": (diffusers.DPMSolverSinglestepScheduler(beta_schedule="scaled_linear"), 4),
}
REPEATING = ("pndm", "pndm with Runge-Kutta", "heun", "karras")


def recorded(name: str, folder: Path) -> tuple[Model, Trajectory, list[float]]:
    """A model with that scheduler, its trajectory, and the timesteps of the backbone's calls, watched from outside."""
    scheduler, steps = SCHEDULERS[name]
    model = FAMILIES["stable-diffusion"].load("random:sd-tiny")
    model.pipeline.scheduler = scheduler
    seen: list[float] = []
    hook = model.backbone.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(float(args[1])), with_kwargs=True
    )
    record(model, Recording(["a red apple"], steps=steps, strategy="all"), folder)
    hook.remove()
    return model, Trajectory(folder), seen


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_call_is_recorded_and_numbered_within_its_value(name, tmp_path):
    _, trajectory, seen = recorded(name, tmp_path)
    steps = list(trajectory)
    assert [step.timestep for step in steps] == seen
    counted: Counter[float] = Counter()
    for step in steps:
        assert step.repeat == counted[step.timestep]
        counted[step.timestep] += 1
    assert (max(counted.values()) > 1) == (name in REPEATING)
    once = list(trajectory.steps(0, once=True))
    assert [step.timestep for step in once] == list(dict.fromkeys(seen)) and all(step.repeat == 0 for step in once)


def test_tables_have_a_row_for_a_value_and_all_its_calls_in_it(tmp_path):
    """Against a loop over the recorded calls, by hand, on one layer."""
    model, trajectory, seen = recorded("pndm", tmp_path)
    statistics = Collector(model, trajectory, "x").collect(tmp_path / "partial")
    assert statistics.timesteps == sorted(set(seen), reverse=True) and len(seen) == len(statistics.timesteps) + 1
    name = "conv_out"
    inputs: dict[float, list[torch.Tensor]] = {}
    for step in trajectory:
        hook = model.backbone.get_submodule(name).register_forward_pre_hook(
            lambda m, args, t=step.timestep: inputs.setdefault(t, []).append(args[0].movedim(1, -1).flatten(0, -2))
        )
        with torch.inference_mode():
            model.family.call(model.backbone, step.inputs)
        hook.remove()
    table = statistics.inputs[name]
    for row, timestep in enumerate(statistics.timesteps):
        together = torch.cat(inputs[timestep])
        assert torch.allclose(table.low[row], together.amin(0)) and torch.allclose(table.high[row], together.amax(0))
        assert torch.allclose(table.square[row], together.square().mean(0), rtol=1e-4)
    twice = next(timestep for timestep in statistics.timesteps if len(inputs[timestep]) == 2)
    kept = table.rows[table.rows_timestep == statistics.timesteps.index(twice)]
    assert len(kept) == 2 * len(table.rows[table.rows_timestep == 0]), "rows of both calls"
    half = len(kept) // 2
    assert not torch.equal(kept[:half], kept[half:])


def test_branches_of_guidance_are_paired_by_their_number():
    """A sampler's second call at a value is another step, not a third branch."""
    calls = [{"x": torch.full((1, 1), float(i))} for i in range(6)]
    timesteps, together = joined([9.0, 9.0, 9.0, 9.0, 5.0, 5.0], calls, 2)
    assert timesteps == [9.0, 9.0, 5.0]
    assert [call["x"].flatten().tolist() for call in together] == [[1, 0], [3, 2], [5, 4]]
    assert joined([9.0, 9.0, 5.0], calls[:3], 1)[0] == [9.0, 9.0, 5.0]
    for timesteps in ([9.0, 5.0], [9.0, 9.0, 5.0]):
        with pytest.raises(InputError, match="does not call its backbone 2 times"):
            joined(timesteps, calls[: len(timesteps)], 2)


def test_a_family_with_branches_apart_and_a_scheduler_of_second_order(tmp_path):
    """Wan calls its backbone twice a step, and Heun's method twice at a value: four calls."""
    model = FAMILIES["wan"].load("random:wan-tiny")
    model.use_scheduler("flow-heun")
    record(model, Recording(["a rocket"], steps=3, strategy="all", guidance=5.0), tmp_path)
    steps = list(Trajectory(tmp_path))
    assert len(steps) == 5 and max(step.repeat for step in steps) == 1
    assert all(len(step.inputs["timestep"]) == 2 for step in steps)
