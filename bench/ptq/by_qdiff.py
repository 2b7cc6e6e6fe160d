"""Rows of qdiff: a built-in recipe with ``--set`` overrides, applied by the code that ``qdiff quantize`` runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.ptq.bits import Storage
from bench.ptq.material import Made, Material
from qdiff.formats.table import format_named, rotation_bits
from qdiff.plan.plan import LayerPlan, Structure
from qdiff.quantization.quantize import quantize
from qdiff.recipes import load_recipe
from qdiff.runs.partial import Scratch


def make(material: Material, recipe: str, overrides: Sequence[str] = ()) -> Made:
    """Quantize ``model.backbone`` in place by ``recipe``."""
    plan = quantize(
        material.model,
        load_recipe(recipe, list(overrides)),
        material.statistics,
        material.trajectory,
        Scratch(material.scratch, recipe),
    )
    originals = {layer.name: original(layer.name, plan.structure) for layer in plan.quantized}
    material.check(set(originals.values()))
    parts = Counter(originals.values())
    return Made(
        {originals[layer.name]: storage(layer, parts[originals[layer.name]]) for layer in plan.quantized},
        scaled_inputs=sum(layer.input_multiplier for layer in plan.quantized),
    )


def original(name: str, structure: Structure) -> str:
    """Return the name of a planned layer in the model as it was before it was restructured."""
    parent = name.rpartition(".")[0]
    return parent if parent in structure.split or parent in structure.first_token else name


def storage(layer: LayerPlan, parts: int) -> Storage:
    """Return a planned layer in the terms that all libraries are counted in. Both halves of a split layer have one
    format.
    """
    format = format_named(layer.weights)
    fitted = rotation_bits(layer.rotation) if layer.outliers else 0
    return Storage(
        format.bits,
        format.block,
        format.scale_bits,
        format.tensor_scale,
        rank=layer.rank,
        parts=parts,
        column_bits=fitted,
    )
