"""The scores of the bundled models' makers: a model that makes NaN is refused, not scored as one that draws black."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdiff.errors import InputError
from qdiff.models import FAMILIES
from zoo import evaluate, evaluate_clips
from zoo.finite import in_bytes


def test_finite_pictures_become_bytes():
    pictures = np.array([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3)
    assert in_bytes(pictures, ["one"]).tolist() == [[[[0, 128, 255]]]]


@pytest.mark.parametrize(("family", "module"), [("pixart", evaluate), ("wan", evaluate_clips)])
def test_a_model_that_makes_nan_is_not_scored(family, module):
    pipeline = FAMILIES[family].load("bundled").pipeline
    decoder = pipeline.vae.decoder
    with torch.no_grad():
        next(decoder.parameters()).fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinity for 'a red apple'"):
        module.generate(pipeline, ["a red apple"], 1.0, 1)
