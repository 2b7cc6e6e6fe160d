"""The plan: every decision that was made, layer by layer, as JSON that a person can read and edit.

The plan says *what* and *why*; the numbers that follow from it (codes, scales) are in ``model.safetensors``. A quantized
model is rebuilt from the plan and the tensors alone, without the float model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qdiff.errors import IntegrityError, command
from qdiff.files import read_json, write_json
from qdiff.formats.table import FORMATS, low_rank_bits, rotation_bits
from qdiff.plan import renamed
from qdiff.plan.attention_plan import AttentionPlan
from qdiff.plan.renamed import with_new_names
from qdiff.plan.routing_plan import RoutingPlan

StorageDtype = Literal["float16", "bfloat16"]  # storage of every tensor that is not quantized


class LayerPlan(BaseModel):
    """What happens to one layer.

    ``sqnr_db`` is the layer's output error on held-back calibration tokens, against its float output, in dB.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: Literal["Linear", "Conv2d"]
    shape: tuple[int, int] | tuple[int, int, int, int]
    bias: bool
    weights: str
    activations: str
    output: str | None = Field(
        None, description="format of the output, where targets run what follows in it; null: float"
    )
    per_token: bool = Field(False, description="activation scales per token at run time instead of one constant")
    group: str | None = Field(
        None, description="layers with the same group read one tensor and share scale and smoothing"
    )
    smoothing: float | None = Field(None, description="SmoothQuant strength; null: none")
    input_multiplier: bool = Field(
        False, description="whether channels of the input are scaled, by smoothing or another method"
    )
    shift: bool = Field(False, description="whether channels of the input are moved to the middle of their range")
    centered: bool = Field(
        False,
        description="whether tokens are quantized without the mean of their picture, which two more rows give back",
    )
    rotation: int = Field(0, description="block of the rotation; 0: none")
    outliers: bool = Field(False, description="whether the rotation was fitted to outliers")
    rank: int = Field(0, description="rank of the low-rank branch in 16 bit; 0: none")
    scale_rule: Literal["amax", "mse", "four_over_six"] = Field(
        "amax", description="how the weight's scales are chosen"
    )
    rounding: str = Field("nearest", description="how the weight's codes are chosen: nearest, or the method's name")
    bias_correction: bool = Field(False, description="whether the bias makes up for the mean error of the output")
    clip: float = Field(1.0, description="range kept, as a share of the largest value seen")
    timestep_scales: bool = False
    input_scale_rule: Literal["range", "learned"] = Field(
        "range",
        description="how the input's constant scale, or its scales by timestep, are chosen: from ranges, or learned",
    )
    methods: list[str] = []
    why: str = ""
    sqnr_db: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        return with_new_names(values, renamed.LAYER)

    @property
    def quantized(self) -> bool:
        """Return whether this layer's weights are in a quantized format."""
        return FORMATS[self.weights].quantized

    @property
    def matrix(self) -> tuple[int, int]:
        """Return the rows and columns of the weight as the matrix that a product is made with."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def precision(self) -> str:
        """Return formats in one word or two: ``float16``, ``int8 x int8``, ``int4_g64 x int8 per token``, ``int4_g64 x
        float16``.
        """
        if not self.quantized:
            return self.weights
        return f"{self.weights} x {self.activations}{' per token' if self.per_token else ''}"

    def weight_bits(self) -> float:
        """Return bits of the stored weight with all its scales, its low-rank branch and a rotation that was fitted, for
        each of its elements.
        """
        rows, columns = self.matrix
        extra = low_rank_bits(rows, columns, self.rank) if self.rank else 0.0
        extra += rotation_bits(self.rotation) / rows if self.outliers else 0.0
        return FORMATS[self.weights].stored_bits(self.matrix) / (rows * columns) + extra

    def weight_bytes(self) -> int:
        """Return bytes of what :meth:`weight_bits` counts, bias left out."""
        rows, columns = self.matrix
        return round(rows * columns * self.weight_bits() / 8)


class Structure(BaseModel):
    """What was changed in a model before it was quantized (:mod:`qdiff.nn.surgery`)."""

    model_config = ConfigDict(extra="forbid")

    split: dict[str, int] = Field(
        {}, description="layers that became two, and the channel at which the skip connection begins"
    )
    first_token: list[str] = Field([], description="layers whose constant first token is computed apart")
    branches: dict[str, int] = Field({}, description="blocks that are there several times, and how often")


class Plan(BaseModel):
    """All layers of a backbone, in the order of its modules."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    family: str
    weights: str
    fingerprint: str
    recipe: str
    config: dict[str, object] = Field(description="the backbone's diffusers config: the model is rebuilt from it")
    backbone_class: str
    timesteps: list[float] = Field(description="calibrated timestep values, in sampling order")
    storage_dtype: StorageDtype = Field("float16", description="storage of every tensor that is not quantized")
    structure: Structure = Field(Structure(), description="what was changed in the model before it was quantized")
    attention: AttentionPlan | None = Field(None, description="self-attentions that follow block lists")
    routing: RoutingPlan | None = Field(None, description="blocks whose precision changes with the step")
    layers: list[LayerPlan]

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        return with_new_names(values, renamed.PLAN)

    def save(self, path: Path) -> None:
        """Write ``plan.json``."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read ``plan.json``.

        Raises:
            InputError: missing.
            IntegrityError: not JSON, unknown fields, formats that do not exist, or a layer named twice.
        """
        value = read_json(path, "the plan")
        try:
            plan = cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            where = _place(value, first["loc"])
            raise IntegrityError(
                f"{path} is not a plan: {where}: {first['msg']} ({error.error_count()} problems)",
                f"correct it by hand, or run: {command('quantize', 'RUN', force=True)}",
            ) from None
        for layer in plan.layers:
            for format in (layer.weights, layer.activations):
                if format not in FORMATS:
                    raise IntegrityError(
                        f"{path}: layer {layer.name} has the unknown format {format!r}", f"known: {', '.join(FORMATS)}"
                    )
        names = [layer.name for layer in plan.layers]
        if len(set(names)) != len(names):
            raise IntegrityError(
                f"{path} names a layer twice", f"correct it by hand, or run: {command('quantize', 'RUN', force=True)}"
            )
        return plan

    @property
    def quantized(self) -> list[LayerPlan]:
        """Return the layers that are quantized."""
        return [layer for layer in self.layers if layer.quantized]


def _place(value: object, path: tuple[int | str, ...]) -> str:
    """Return where in a plan something is wrong: a layer by its name, where it has one."""
    layer = value
    for part in path[:2]:
        if isinstance(layer, dict):
            layer = layer.get(part)
        else:
            layer = layer[part] if isinstance(layer, list) and isinstance(part, int) and part < len(layer) else None
    name = layer.get("name") if path[:1] == ("layers",) and isinstance(layer, dict) else None
    return f"layer {name}: {'.'.join(map(str, path[2:]))}" if isinstance(name, str) else ".".join(map(str, path))
