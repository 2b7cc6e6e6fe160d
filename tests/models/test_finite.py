"""NaN and infinity end the work where they arise, with the step and the engine, in every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qdiff.engines import Runner
from qdiff.engines.pipeline import insert
from qdiff.errors import InputError, QualityGateError
from qdiff.models import FAMILIES
from qdiff.models.base import NamedInputs
from qdiff.models.model import Request
from qdiff.stages.generate import simulate

REQUEST = Request(["x"], [0], steps=3)


@pytest.fixture(params=["pixart-tiny", "sd-tiny", "wan-tiny"])
def model(request):
    family = {"pixart-tiny": "pixart", "sd-tiny": "stable-diffusion", "wan-tiny": "wan"}[request.param]
    return FAMILIES[family].load(f"random:{request.param}")


class Breaks(Runner):
    """Gives NaN from a timestep on."""

    def __init__(self, model, below: float) -> None:
        self.named, self.below = NamedInputs(model.family, model.backbone), below

    def __call__(self, inputs):
        with torch.inference_mode():
            found = self.named(**inputs).clone()
        if float(inputs["timestep"][0]) < self.below:
            found[0].view(-1)[0] = torch.nan
        return found


@pytest.mark.parametrize(("engine", "error"), [("float", InputError), ("openvino", QualityGateError)])
def test_a_prediction_names_its_step_and_its_engine(model, engine, error):
    inputs = model.family.inputs(model.backbone.config)
    with (
        insert(model.pipeline, model.family.backbone_attribute, Breaks(model, 900.0), inputs, engine),
        pytest.raises(error, match=r"the prediction at timestep \d+") as caught,
    ):
        model.generate(REQUEST)
    assert caught.value.exit_code == (3 if engine == "float" else 7)
    assert ("the float model itself" if engine == "float" else f"engine {engine}") in caught.value.message


def test_the_float_model_without_a_stand_in(model):
    with torch.no_grad():
        list(model.backbone.parameters())[-1].fill_(torch.inf)
    with pytest.raises(InputError, match=r"the float model itself makes NaN or infinity: the prediction at timestep"):
        model.generate(REQUEST)


def test_a_decoded_picture_is_looked_at_before_it_is_black(model):
    decoder = model.pipeline.vae.decoder
    with torch.no_grad():
        list(decoder.parameters())[-1].fill_(torch.nan)
    with pytest.raises(InputError, match="the decoded picture after the last step"):
        model.generate(REQUEST)
    with pytest.raises(InputError, match="the decoded picture"):
        simulate(model, model.backbone, REQUEST, 1)
    assert not decoder._forward_hooks and not model.backbone._forward_hooks, "nothing stays behind"


def test_latents_that_broke_between_two_steps(tiny):
    model = tiny()
    step = model.pipeline.scheduler.step
    model.pipeline.scheduler.step = lambda *args, **kwargs: tuple(
        part * torch.inf if isinstance(part, torch.Tensor) else part
        for part in step(*args, **{**kwargs, "return_dict": False})
    )
    with pytest.raises(InputError, match="the latents at timestep"):
        model.generate(REQUEST)


def test_a_candidate_that_breaks_is_the_worst_and_not_the_end(tiny, recorded):
    """While plans are tried; the float model's own NaN ends the trying."""
    import copy

    from qdiff.runs.run import Run
    from qdiff.stages.calibrated_model import calibrated_model
    from qdiff.stages.picture_scores import comparison

    calibrated = replace(calibrated_model(Run.existing(recorded[0].folder.parent)), model=tiny())
    candidate = copy.deepcopy(calibrated.model.backbone)
    judge = comparison(calibrated, candidate, ["x"], 0)
    whole = judge().psnr_db_mean
    with torch.no_grad():
        candidate.proj_out.weight.fill_(torch.nan)
    assert judge().psnr_db_mean < 20 < whole
