"""Rows of qdiff: a built-in recipe with ``--set`` overrides, applied by the code that ``qdiff quantize`` runs."""

from __future__ import annotations

from collections.abc import Sequence

from bench.ptq.bits import Storage
from bench.ptq.material import Made, Material
from qdiff.formats import format_named
from qdiff.plan import LayerPlan
from qdiff.quantize import quantize
from qdiff.recipe import load_recipe
from qdiff.scratch import Scratch


def make(material: Material, recipe: str, overrides: Sequence[str] = ()) -> Made:
    """Quantizes ``model.backbone`` in place by ``recipe``."""
    plan = quantize(
        material.model,
        load_recipe(recipe, list(overrides)),
        material.statistics,
        material.trajectory,
        Scratch(material.scratch, recipe),
    )
    material.check({layer.name for layer in plan.quantized})
    return Made(
        {layer.name: storage(layer) for layer in plan.quantized},
        scaled_inputs=sum(layer.multiplier for layer in plan.quantized),
    )


def storage(layer: LayerPlan) -> Storage:
    """A planned layer in the terms that all libraries are counted in."""
    format = format_named(layer.weights)
    return Storage(format.bits, format.block, format.scale_bits, format.tensor_scale, rank=layer.rank)
