"""A picture does not depend on the others of its batch, in any recipe: bit for bit in torch, within an engine's own tolerance
elsewhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qdiff.engines import Runner
from qdiff.engines.eager import ModuleRunner
from qdiff.engines.pipeline import insert
from qdiff.evaluation.metrics import sqnr_db
from qdiff.models import FAMILIES
from qdiff.models.base import NamedInputs
from qdiff.models.model import Model, Request
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.recipes import built_in, load_recipe
from qdiff.runs.run import Run
from qdiff.stages.build import load_runner

pytestmark = pytest.mark.slow

PROMPTS, SEEDS = ["a red apple", "a rocket on a blue background", "two cats, asleep"], [7, 8, 9]
FEW = ("--set", "sequential.tokens=64")
ROUTES = ("--set", "routing.pictures=1", "--set", "routing.rule=predicted")
OPTIONS = {
    "mixed": ("--set", "mixed.calls=1", "--set", "mixed.pictures=0"),
    "mixed-token": ("--set", "mixed.calls=1", "--set", "mixed.pictures=0"),
    "routed": (*ROUTES, "--budget", "bits=7", "--set", "routing.reuse={loss_db: 20, in_a_row: 1}"),
    "routed-token": (*ROUTES, "--budget", "bits=7"),
    "nvfp4-distilled": (*FEW, "--set", "distil.iterations=2"),
}


@pytest.fixture(scope="module")
def calibrated(cli, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mates") / "run"
    settings = ("--weights", "random:pixart-tiny", "--samples", 4, "--batch", 2, "--steps", 5)
    assert cli("calibrate", *settings, "-o", path).code == 0
    return path


@pytest.fixture(scope="module")
def model() -> Model:
    return FAMILIES["pixart"].load("random:pixart-tiny")


class Widest(Runner):
    """Counts the samples of the largest call."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.inputs, self.samples = runner, runner.inputs, 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.samples = max(self.samples, len(inputs["timestep"]))
        return self.runner(inputs)

    def close(self) -> None:
        self.runner.close()


def latents(model: Model, runner: Runner, wanted: slice) -> Tensor:
    """What the sampler ends with ``[pictures, ...]``: some of the pictures, in one batch."""
    last: list[Tensor] = []
    request = Request(PROMPTS[wanted], SEEDS[wanted], steps=5)
    specs = model.family.inputs(model.backbone.config)
    with insert(model.pipeline, "transformer", runner, specs):
        model.generate(request, on_step=lambda step, timestep, latents: last.append(latents.clone()))
    return last[-1]


def alone_and_together(model: Model, runner: Runner) -> tuple[Tensor, Tensor]:
    """The three pictures one by one, and in one batch."""
    alone = torch.cat([latents(model, runner, slice(number, number + 1)) for number in range(len(PROMPTS))])
    return alone, latents(model, runner, slice(None))


def fitting(name: str, folder: Path) -> Path:
    """A built-in recipe, and those that it chooses among, with groups that divide the columns of so small a model."""
    text = resources.files("qdiff").joinpath(f"recipes/{name}.yaml").read_text(encoding="utf-8")
    text = text.replace("int4_g64", "int4_g32").replace("int6_g64", "int6")
    if members := re.search(r"recipes: \[(.*)\]", text):
        paths = [str(fitting(member, folder)) for member in members[1].split(", ")]
        text = text.replace(members[1], ", ".join(paths))
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def quantized(cli, run: Path, name: str, folder: Path) -> Plan:
    sequential = load_recipe(name).sequential is not None
    options = OPTIONS.get(name, FEW if sequential else ())
    recipe = fitting(name, folder)
    result = cli("quantize", run, "--recipe", recipe, *options, "--accept-quality", "--force")
    assert result.code == 0, result.err
    return Plan.load(run / "plan.json")


@pytest.mark.parametrize("name", built_in())
def test_a_picture_alone_is_the_picture_in_a_batch(cli, calibrated, model, name, tmp_path):
    """The float model says what this machine's products allow: theirs may depend on how many rows there are. Where float's bits
    are equal, and here they are, so are those of every recipe."""
    alone, together = alone_and_together(model, ModuleRunner(NamedInputs(model.family, model.backbone)))
    float_db = sqnr_db(alone, together) if not torch.equal(alone, together) else None
    assert float_db is None or float_db > 100
    plan = quantized(cli, calibrated, name, tmp_path)
    runner = Widest(ModuleRunner(NamedInputs(model.family, load_quantized(plan, calibrated / "model.safetensors"))))
    got, batched = alone_and_together(model, runner)
    assert runner.samples == 6, "both branches of guidance of three pictures are asked for at once"
    assert not torch.equal(got, alone)
    if float_db is None:
        assert torch.equal(got, batched)
    else:  # rounding makes a whole step of a sum's last digit, where it lies on the border
        assert sqnr_db(got, batched) > sqnr_db(alone, got) + 10


@pytest.fixture(scope="module")
def routed(cli, calibrated, tmp_path_factory) -> tuple[Path, Plan]:
    """A graph with routes that depend on the sample."""
    folder = tmp_path_factory.mktemp("routed")
    run = shutil.copytree(calibrated, folder / "run")
    plan = quantized(cli, run, "routed", folder)
    assert cli("export", run, "--target", "onnxruntime", "--force").code == 0
    return run, plan


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_in_engines_a_picture_is_nearer_to_itself_than_quantization_is_to_float(cli, routed, model, engine):
    """Routes that depend on the sample: a graph has one for a whole call, so batches are cut."""
    alone, _ = alone_and_together(model, ModuleRunner(NamedInputs(model.family, model.backbone)))
    run, plan = routed
    assert plan.routing is not None and plan.routing.by_sample
    assert cli("build", run, "--engine", engine, "--force").code == 0
    runner = load_runner(Run(run), engine, model)
    got, batched = alone_and_together(model, runner)
    runner.close()
    assert sqnr_db(got, batched) > sqnr_db(alone, got) + 20
