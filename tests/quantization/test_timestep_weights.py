"""Weights of timesteps with which gradients agree: what they are on small problems, and that a block is learned with them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from qdiff.quantization import timestep_weights
from qdiff.quantization.quantize import quantize
from qdiff.quantization.reconstruction import BlockFit
from qdiff.quantization.timestep_weights import agreeing, mean_gradient
from qdiff.recipes import load_recipe
from qdiff.recording.activation_statistics import Statistics
from qdiff.recording.trajectory import Trajectory


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smallest_cosine(direction: torch.Tensor, gradients: torch.Tensor) -> float:
    return float((nn.functional.normalize(gradients, dim=1) @ nn.functional.normalize(direction, dim=0)).min())


def test_a_gradient_that_is_a_hundred_times_larger_counts_a_hundredth():
    weights = agreeing(torch.tensor([[1.0, 0, 0], [0, 100, 0], [0, 0, 1]]))
    assert torch.allclose(weights, 3 * torch.tensor([1, 0.01, 1]) / 2.01)


def test_gradients_that_oppose_each_other_cancel():
    gradients = torch.tensor([[1.0, 0.0], [-4.0, 0.0]])
    assert torch.allclose(agreeing(gradients) @ gradients, torch.zeros(2), atol=1e-6)


def test_a_gradient_that_agrees_anyway_may_count_nothing_and_none_has_no_say():
    weights = agreeing(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))
    assert torch.allclose(weights, torch.tensor([1.5, 0.0, 1.5, 1.0]), atol=1e-6)
    assert torch.equal(agreeing(torch.zeros(3, 2)), torch.ones(3))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_weights_have_a_larger_smallest_cosine(seed):
    gradients = randn(3, 4, seed=seed) * torch.tensor([[0.1], [1.0], [30.0]]) + 0.5
    found = agreeing(gradients)
    assert found.min() >= 0 and abs(float(found.mean()) - 1) < 1e-6
    units = nn.functional.normalize(gradients, dim=1)
    grid = (torch.tensor([a, b, 40 - a - b]) / 40 for a, b in itertools.product(range(41), repeat=2) if a + b <= 40)
    best = max(smallest_cosine(share @ units, gradients) for share in grid)
    assert smallest_cosine(found @ gradients, gradients) >= best - 1e-6


def test_a_sample_of_the_elements_stands_for_all(monkeypatch):
    variables = [nn.Parameter(torch.zeros(4000)), nn.Parameter(torch.zeros(10))]
    pulls = [[randn(4000, seed=k), randn(10, seed=9 + k)] for k in range(2)]
    losses = [lambda pull=pull: sum((v * g).sum() for v, g in zip(variables, pull, strict=True)) for pull in pulls]
    whole = mean_gradient(losses, variables)
    assert torch.allclose(whole.square().sum(), sum((a + b).square().sum() / 4 for a, b in zip(*pulls, strict=True)))
    monkeypatch.setattr(timestep_weights, "ELEMENTS", 1000)
    part = mean_gradient(losses, variables)
    assert len(part) == 1010
    # The square's mean of 1000 normal numbers has a deviation of sqrt(2 / 1000); three of them.
    assert abs(float(part.square().sum() / whole.square().sum()) - 1) < 3 * (2 / 1000) ** 0.5


@pytest.fixture(scope="module")
def recorded(cli, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run"
    random = ("--model", "pixart", "--weights", "random:pixart-tiny")
    cli("calibrate", *random, "--samples", 4, "--steps", 4, "--batch", 2, "-o", folder, "--json").json  # noqa: B018
    folder = folder / "calibration"
    return Trajectory(folder), Statistics.load(folder / "statistics.safetensors")


def learned(model, recorded, **options: object):
    trajectory, statistics = recorded
    chosen = {"method": "adaround", "iterations": 8, "rate": 0.05, "lean": 0.0, **options}
    overrides = ["methods={}", "sequential.tokens=64", f"sequential.reconstruct={json.dumps(chosen)}"]
    plan = quantize(model, load_recipe("nvfp4", overrides), statistics, trajectory)
    return plan, model.backbone.state_dict()


def test_a_block_is_learned_with_weights_and_the_plan_says_their_range(tiny, recorded, monkeypatch):
    fits: list[BlockFit] = []
    learn, loss = BlockFit.learn, BlockFit._loss

    def spy(self, *args, **kwargs):
        learn(self, *args, **kwargs)
        fits.append(self)

    monkeypatch.setattr(BlockFit, "learn", spy)
    plan, state = learned(tiny(), recorded, weighting="gradient")
    plain, even = learned(tiny(), recorded)
    assert any(not torch.equal(state[name], even[name]) for name in state if name.endswith("codes"))
    assert all("timesteps weighted" in layer.why for layer in plan.quantized)
    assert not any("timesteps weighted" in layer.why for layer in plain.quantized)
    for fit in fits:
        assert fit.importance.min() >= 0 and torch.allclose(fit.importance.mean(), torch.tensor(1.0))
    # One timestep's loss a hundred times larger: its weight is a hundredth beside those of the others.
    monkeypatch.setattr(
        BlockFit, "_loss", lambda self, n: loss(self, n) * (100 if self.walk.calls[n].timestep == 0 else 1)
    )
    learned(tiny(), recorded, weighting="gradient")
    first, again = fits[0].importance, fits[4].importance
    assert first[0] > 0
    assert torch.allclose(again[0] / again[1:].sum() * 100, first[0] / first[1:].sum(), rtol=1e-3)
