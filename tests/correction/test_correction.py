"""Trajectory correction: what is estimated from pairs of predictions, and what it does to a sampler's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from qdiff.correction import CORRECTIONS, CorrectedScheduler, load_correction
from qdiff.correction.base import Correction, Moment, between
from qdiff.correction.moments import PairMoments
from qdiff.correction.ptqd import Ptqd
from qdiff.correction.q_drift import QDrift, scale_noise
from qdiff.correction.q_sched import QSched
from qdiff.correction.scheduler import noise_levels, noise_share, responses
from qdiff.errors import IntegrityError

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
FACTOR, OFFSET, DEVIATION = 1.06, 0.05, 0.1  # of the toy's quantization noise


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheduler(kind: type = DDIMScheduler, steps: int = 8, **options: Any) -> Any:
    made = kind.from_config(DDIMScheduler(**SCHEDULE, set_alpha_to_one=False, steps_offset=1).config, **options)
    made.set_timesteps(steps)
    return made


def spoiled(prediction: torch.Tensor, seed: int) -> torch.Tensor:
    """A prediction with quantization noise of known moments."""
    return FACTOR * prediction + OFFSET + DEVIATION * randn(*prediction.shape, seed=seed)


def toy(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """A denoiser of unit Gaussians around 0.5."""
    return (x - 0.5) * (0.3 + timestep / 2000)


def sample(made: Any, quantized: bool, seed: int, **options: Any) -> torch.Tensor:
    x = randn(4, 4, 8, 8, seed=seed)
    for place, t in enumerate(made.timesteps):
        prediction = toy(made.scale_model_input(x, t), float(t))
        prediction = spoiled(prediction, seed=100 * seed + place) if quantized else prediction
        x = made.step(prediction, t, x, **options).prev_sample
    return x


def measured(timesteps: list[float], seed: int = 1) -> PairMoments:
    moments = PairMoments()
    for place, t in enumerate(timesteps):
        f = toy(randn(16, 4, 8, 8, seed=seed + place), t)
        moments.add(t, f, spoiled(f, seed=seed + 1000 + place))
    return moments


def identities(steps: list[float]) -> list[Correction]:
    nothing = [0.0] * len(steps)
    return [
        Ptqd(timesteps=steps, factors=[1.0] * len(steps), offsets=[[0.0] * 4] * len(steps), variances=nothing),
        QDrift(timesteps=steps, variances=nothing),
        QSched(prediction_factor=1, sample_factor=1),
    ]


def test_every_method_has_an_identity():
    assert {type(each) for each in identities([1.0])} == {CORRECTIONS[name] for name in CORRECTIONS}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_the_identity_changes_no_bit(kind, place):
    plain = scheduler(kind)
    correction = identities(plain.timesteps.tolist())[place]
    corrected = CorrectedScheduler(scheduler(kind), correction)
    options = [{"generator": torch.Generator().manual_seed(3)} for _ in range(2)]
    assert sample(plain, True, 2, **options[0]).equal(sample(corrected, True, 2, **options[1]))


def test_moments_are_those_of_the_tensors():
    f, q = randn(32, 4, 8, 8, seed=1), randn(32, 4, 8, 8, seed=2)
    q = 1.2 * f + 0.3 + 0.5 * q
    moments = PairMoments()
    for half in (slice(0, 16), slice(16, 32)):
        moments.add(7.0, f[half], q[half])
    assert moments.factor(7.0) == pytest.approx(1.2, abs=0.02)
    assert moments.offsets(7.0) == pytest.approx([0.3] * 4, abs=0.03)
    assert moments.residual_variance(7.0) == pytest.approx(0.25, rel=0.03)
    error = (q - f).flatten()
    design = torch.stack([q.flatten(), torch.ones_like(error)], 1).double()
    fitted = design @ torch.linalg.lstsq(design, error.double()[:, None]).solution
    left = (error.double()[:, None] - fitted).square().mean()
    assert moments.error_variance_given(7.0) == pytest.approx(float(left), rel=0.01)


def test_ptqd_brings_other_trajectories_nearer_to_float():
    made = scheduler()
    correction = Ptqd.fit(measured(made.timesteps.tolist()), score=lambda correction: 0.0)
    wanted = sample(scheduler(), False, 9)
    plain = (sample(made, True, 9) - wanted).square().mean()
    corrected = (sample(CorrectedScheduler(scheduler(), correction), True, 9) - wanted).square().mean()
    assert corrected < 0.5 * plain
    fewer = CorrectedScheduler(scheduler(steps=5), correction)  # other timesteps: interpolated
    assert (sample(fewer, True, 9) - sample(scheduler(steps=5), False, 9)).square().mean() < 0.5 * plain


@pytest.mark.parametrize(
    ("kind", "options"),
    [(DDIMScheduler, {"eta": 1.0}), (EulerAncestralDiscreteScheduler, {}), (LCMScheduler, {})],
)
def test_a_noisy_sampler_takes_the_noise_in(kind, options):
    """One step of a prediction with noise and its share of the sampler's own has the variance that the step means."""
    deviation, place = 0.3, 2
    made = scheduler(kind, steps=6)
    response = responses(made, options)[place]
    assert response is not None
    t, x = made.timesteps[place], torch.zeros(64, 4, 16, 16)
    quiet = QDrift(timesteps=[0.0], variances=[0.0])
    absorbing = Ptqd(timesteps=[0.0], factors=[1.0], offsets=[[0.0] * 4], variances=[deviation**2])
    found = []
    for correction in (quiet, absorbing):
        corrected = CorrectedScheduler(scheduler(kind, steps=6), correction)
        corrected.scale_model_input(x, t)
        noise = deviation * randn(*x.shape, seed=5)
        step = corrected.step(noise, t, x, generator=torch.Generator().manual_seed(1), **options)
        found.append(float(step.prev_sample.var()))
    brought = (response.prediction * deviation) ** 2
    assert found[0] == pytest.approx(response.noise**2 + brought, rel=0.03)
    assert found[1] == pytest.approx(max(response.noise**2, brought), rel=0.03)


def test_where_nothing_can_be_taken_in():
    assert responses(scheduler(DDIMScheduler, eta=0.0), {"eta": 0.0}) == [None] * 8
    assert responses(scheduler(DPMSolverMultistepScheduler), {}) == [None] * 8
    sde = responses(scheduler(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++"), {})
    assert sde[0] is not None and sde[1:] == [None] * 7, "later steps look at earlier ones"


def test_drift_is_the_papers_formula():
    correction = QDrift(timesteps=[1.0, 999.0], variances=[0.2, 0.2])
    moment = Moment(500.0, 0.5, 2.0, 1.5, "epsilon")
    assert correction.lengthening(moment) == pytest.approx(0.5 / (2 * 2.0) * 0.2)
    prediction, seen = randn(2, 4, 4, 4, seed=1), randn(2, 4, 4, 4, seed=2)
    expected = prediction * (1 + correction.lengthening(moment))
    assert torch.equal(correction.prediction(prediction, seen, moment), expected)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_longer_step_is_the_same_in_every_kind_of_prediction(kind):
    x, noise = randn(2, 4, 4, 4, seed=1).double(), randn(2, 4, 4, 4, seed=2).double()
    moment = Moment(500.0, 0.5, 1.7, 1.2, kind)
    alpha, sigma = moment.alpha, moment.alpha * moment.level

    def as_kind(noise: torch.Tensor) -> torch.Tensor:
        start = (x - sigma * noise) / alpha
        return start if kind == "sample" else alpha * noise - sigma * start

    torch.testing.assert_close(scale_noise(as_kind(noise), x, moment, 1.1), as_kind(1.1 * noise), rtol=0, atol=1e-12)


def test_the_search_finds_what_was_hidden():
    def score(correction: Correction) -> float:
        assert isinstance(correction, QSched)
        return -((correction.prediction_factor - 1.05) ** 2) - (correction.sample_factor - 0.97) ** 2

    found = QSched.fit(PairMoments(), score)
    assert found.prediction_factor == pytest.approx(1.05, abs=0.0051)
    assert found.sample_factor == pytest.approx(0.97, abs=0.0051)
    first, last = (Moment(1.0, progress, 1.0, 0.5, "epsilon") for progress in (0.0, 1.0))
    one = torch.ones(1)
    assert float(found.sample(one, first)) == pytest.approx(found.sample_factor)
    assert float(found.prediction(one, one, last)) == 1.0


def test_noise_levels_are_those_of_the_schedule():
    made = scheduler()
    at = made.alphas_cumprod[made.timesteps]
    assert noise_levels(made)[:-1] == pytest.approx(((1 - at) / at).sqrt().tolist()) and noise_levels(made)[-1] == 0
    euler = scheduler(EulerAncestralDiscreteScheduler)
    assert noise_levels(euler) == pytest.approx(euler.sigmas.tolist())


def test_between_and_shares():
    assert [between([9.0, 1.0], [4.0, 0.0], t) for t in (0.0, 1.0, 5.0, 9.0, 20.0)] == [0.0, 0.0, 2.0, 4.0, 4.0]
    response = responses(scheduler(DDIMScheduler), {"eta": 1.0})[0]
    assert response is not None and noise_share(response, 0.0) == 1.0 and noise_share(response, 1e6) == 0.0


def test_a_correction_is_read_as_it_was_written():
    for correction in identities([3.0, 1.0]):
        assert load_correction(correction.model_dump(mode="json")) == correction
        for key, entry in correction.model_dump(mode="json").items():
            if isinstance(entry, list) and entry and isinstance(entry[0], float):
                with pytest.raises(IntegrityError, match="not a correction"):
                    load_correction({**correction.model_dump(mode="json"), key: [float("nan"), *entry[1:]]})
    for damaged in ({"method": "magic"}, {"method": "q_drift", "timesteps": [1.0]}, {}, [], None, 3):
        with pytest.raises(IntegrityError, match="not a correction"):
            load_correction(damaged)


@pytest.mark.parametrize(
    ("kind", "advancing"), [(HeunDiscreteScheduler, slice(0, None, 2)), (PNDMScheduler, slice(0, -1))]
)
def test_a_scheduler_that_comes_to_a_timestep_twice_is_corrected_at_every_step(kind, advancing):
    """Heun counts its steps and every other one only looks ahead; PNDM does not count."""
    made, seen = scheduler(kind, steps=4), []

    class Watching(QDrift):
        def lengthening(self, moment: Moment) -> float:
            seen.append(super().lengthening(moment))
            return seen[-1]

    corrected = CorrectedScheduler(made, Watching(timesteps=[0.0], variances=[0.1]))
    x = randn(1, 4, 4, 4, seed=1)
    for t in made.timesteps:
        corrected.scale_model_input(x, t)
        x = corrected.step(toy(x, float(t)), t, x).prev_sample
    assert len(seen) == len(made.timesteps) > 4 and all(each > 0 for each in seen[advancing])


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_where_nothing_but_noise_is_seen_nothing_is_corrected(kind):
    """The first step of schedules with zero terminal signal, as CogVideoX has them: the level is infinite."""
    moment = Moment(999.0, 0.0, float("inf"), 50.0, kind)
    drift = QDrift(timesteps=[999.0, 1.0], variances=[0.1, 0.1])
    prediction, seen = torch.randn(1, 4), torch.randn(1, 4)
    assert torch.equal(drift.prediction(prediction, seen, moment), prediction)
