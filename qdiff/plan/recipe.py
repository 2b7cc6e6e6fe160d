"""The recipe: what a user wishes (targets, scheme, ignore, methods), checked before anything runs. :mod:`qdiff.recipes` reads it.

Layers are named by patterns: ``fnmatch`` wildcards over module names (``transformer_blocks.*.attn1.*``). A pattern that matches
nothing is an error: it is a typing mistake, or a recipe for another family.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qdiff.errors import InputError, command, nearest, unknown_name
from qdiff.formats.table import FORMATS
from qdiff.plan import renamed
from qdiff.plan.devices import DEVICES
from qdiff.plan.plan import StorageDtype
from qdiff.plan.renamed import with_new_names


class Scheme(BaseModel):
    """Formats of weights and activations of every targeted layer.

    ``activations`` may be a plain format: then only weights are quantized. ``per_token`` gives activations one scale for each
    token at run time instead of one constant; formats with blocks scale their blocks at run time anyway.
    """

    model_config = ConfigDict(extra="forbid")

    weights: str
    activations: str
    per_token: bool = False

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        return with_new_names(values, renamed.SCHEME)

    @field_validator("weights", "activations")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in FORMATS:
            raise ValueError(f"unknown format {value!r}, known: {', '.join(FORMATS)}")
        return value

    @model_validator(mode="after")
    def _possible(self) -> Scheme:
        if not FORMATS[self.weights].quantized:
            raise ValueError(f"weights: {self.weights!r} is no quantized format; leave layers alone with ignore")
        activations = FORMATS[self.activations]
        if self.per_token and (activations.block or not activations.quantized):
            raise ValueError(f"per_token: {self.activations!r} has no scale per token")
        return self


class Sequential(BaseModel):
    """Quantize block by block, each on what the quantized blocks before it hand over (:mod:`qdiff.quantization.block_walk`).

    ``tokens`` is how many of each tensor are kept for the methods, half to fit and half to judge. ``reconstruct`` names a
    method that learns the rounding of each block as a whole, with its options and those of :class:`qdiff.methods.learned.Course`
    (:mod:`qdiff.quantization.reconstruction`).
    """

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(4096, ge=16, le=1_000_000)
    reconstruct: dict[str, object] | None = None


class Distillation(BaseModel):
    """Train codes and biases of the whole quantized model against the float model's predictions
    (:mod:`qdiff.quantization.distillation`).

    It goes ``passes`` times over the recorded calls, of which each is a step, or, where ``iterations`` are given, for that many
    steps. More than a few passes overfit to the prompts (docs/log): calibrate with more of them instead.

    ``rate`` is Adam's for the codes, in their own units, ``bias_rate`` that of the biases; 0 leaves them as they are. Both fall
    to zero over the iterations. ``blocks`` is the share of the loss that is the error of the blocks' outputs and not of the
    prediction. ``layers`` are patterns of those that are trained, by family; all of them where it names none.
    """

    model_config = ConfigDict(extra="forbid")

    passes: float = Field(2.0, gt=0, le=1000, allow_inf_nan=False)
    iterations: int | None = Field(None, ge=1, le=100_000)
    rate: float = Field(0.004, ge=0, le=1)
    bias_rate: float = Field(0.0001, ge=0, le=1)
    blocks: float = Field(0.5, ge=0, le=1)
    layers: dict[str, list[str]] = {}

    @model_validator(mode="after")
    def _something(self) -> Distillation:
        if not self.rate and not self.bias_rate:
            raise ValueError("both rates are 0, so nothing would be trained")
        return self

    def steps(self, calls: int) -> int:
        """Return the number of training steps on that many recorded calls."""
        return self.iterations or max(1, round(self.passes * calls))


class Mixed(BaseModel):
    """Formats chosen layer by layer (:mod:`qdiff.allocation.sensitivity`, :mod:`qdiff.allocation.knapsack`).

    ``recipes`` are names or paths of the recipes whose formats and methods a layer may get; ``float16`` (or what ``kept`` is)
    among them means that a layer may stay. ``budget`` has one entry: ``bits`` (mean over the weights that are chosen for),
    ``bytes`` (of the whole checkpoint) or ``latency`` (milliseconds of these layers in one step on ``device``: measured on an
    engine that is here, reckoned from published rates for a GPU). ``minimum``
    maps a pattern of layers to a recipe of the list: no format of fewer bits than that one's. ``calls`` of the backbone
    measure every layer in every format (0: gradients estimate it, for models too large for that), and ``probes`` pictures
    where that is not 0; ``pictures`` decide between the solver's ``best`` solutions.
    """

    model_config = ConfigDict(extra="forbid")

    recipes: list[str] = Field(min_length=2)
    budget: dict[Literal["bits", "bytes", "latency"], float] = Field(min_length=1, max_length=1)
    device: str | None = None
    minimum: dict[str, dict[str, str]] = Field(default={}, description="by family: pattern of layers to recipe")
    calls: int = Field(20, ge=0, le=1000)
    probes: int = Field(0, ge=0, le=64)
    pictures: int = Field(8, ge=0, le=256)
    best: int = Field(4, ge=1, le=32)

    @model_validator(mode="after")
    def _sensible(self) -> Mixed:
        if len(set(self.recipes)) != len(self.recipes):
            raise ValueError(f"mixed.recipes names one twice: {', '.join(self.recipes)}")
        (measure, amount), *_ = self.budget.items()
        if not 0 < amount < float("inf"):
            raise ValueError(f"mixed.budget: {measure} = {amount} is no positive number")
        if measure == "latency" and self.device is None:
            raise ValueError(
                "mixed.budget: latency needs mixed.device: the engine that measures it, or the GPU whose published rates"
                " it is reckoned with"
            )
        for pattern, name in (pair for family in self.minimum.values() for pair in family.items()):
            if name not in self.recipes:
                raise ValueError(f"mixed.minimum: {pattern!r} wants {name!r}, which is not among mixed.recipes")
        return self

    @property
    def times_layers(self) -> bool:
        """Return whether latency is measured on an engine, and not reckoned from a GPU's published rates."""
        return "latency" in self.budget and self.device not in DEVICES


class Reuse(BaseModel):
    """Blocks whose residual is stable are left out of a step and add what they added before: at most ``in_a_row`` steps, and as
    often as costs no more than ``loss_db`` of the pictures' PSNR.
    """

    model_config = ConfigDict(extra="forbid")

    in_a_row: int = Field(2, ge=1, le=8)
    loss_db: float = Field(0.3, gt=0, le=20)


class Routing(BaseModel):
    """Precision that changes with the step (:mod:`qdiff.routing`).

    ``recipes`` are two, the careful one first, or one where only ``reuse`` is wanted. ``budget`` is the mean of the weights' bits
    that blocks are computed with. ``rule``: how routes are set, ``best``: as pictures say. At most ``blocks`` blocks carry both
    branches (all, where it is null). ``pictures`` decide.
    """

    model_config = ConfigDict(extra="forbid")

    recipes: list[str] = Field(min_length=1, max_length=2)
    budget: dict[Literal["bits"], float] | None = Field(None, min_length=1)
    rule: Literal["best", "static", "table", "predicted"] = "best"
    blocks: int | None = Field(None, ge=0)
    pictures: int = Field(8, ge=1, le=256)
    reuse: Reuse | None = None

    @property
    def predicts(self) -> bool:
        """Return whether routes may follow what blocks changed the step before."""
        return len(self.recipes) == 2 and self.rule in ("best", "predicted")

    @property
    def follows_changes(self) -> bool:
        """Return whether anything depends on how blocks change from step to step."""
        return self.predicts or self.reuse is not None

    @model_validator(mode="after")
    def _sensible(self) -> Routing:
        if len(set(self.recipes)) != len(self.recipes):
            raise ValueError(f"routing.recipes names {self.recipes[0]} twice")
        if len(self.recipes) == 1 and self.reuse is None:
            raise ValueError("routing.recipes names one recipe, and without reuse there is nothing to route")
        if len(self.recipes) == 2 and self.budget is None:
            raise ValueError("routing.budget: two recipes need one, for example {bits: 5.5}")
        if self.budget is not None and not 0 < self.budget["bits"] < float("inf"):
            raise ValueError(f"routing.budget: bits = {self.budget['bits']} is no positive number")
        return self


class Attention(BaseModel):
    """Self-attentions follow block lists (:mod:`qdiff.attention`), which ``qdiff calibrate --attention`` has prepared.

    ``density`` is the share of the blocks that is read, on average over the sparse layers and timesteps.
    """

    model_config = ConfigDict(extra="forbid")

    density: float = Field(gt=0, le=1)
    numerics: Literal["float", "bf16", "int8_fp8", "fp8"] = "float"


class Floors(BaseModel):
    """What quality may not fall below, in dB: below it nothing is quantized in silence.

    ``layer``: SQNR of a layer's output on held-out tokens; a layer that ends below it is kept. ``step``: SQNR of the whole
    backbone's prediction at any recorded step, and ``pictures``: mean PSNR of compared pictures against float; below them the
    stage writes its files and ends with exit code 7, unless the quality is accepted.
    """

    model_config = ConfigDict(extra="forbid")

    layer: float = Field(10.0, ge=-100, le=100)
    step: float = Field(15.0, ge=-100, le=100)
    pictures: float = Field(20.0, ge=0, le=100)


class Recipe(BaseModel):
    """See the module's docstring. ``methods`` maps a method's name to its options, in the order in which they apply.

    A recipe has either a ``scheme`` for all targeted layers, or ``mixed``: recipes of which every layer gets one, or
    ``routing``: recipes between which whole blocks change from step to step.
    """

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    name: str
    description: str = ""
    scheme: Scheme | None = None
    mixed: Mixed | None = None
    routing: Routing | None = None
    convolutions: Scheme | None = Field(
        None, description="formats of convolutions, where they are not those of `scheme`"
    )
    targets: list[Literal["Linear", "Conv2d"]] = Field(["Linear", "Conv2d"], min_length=1)
    split_shortcuts: bool = Field(True, description="two scales where a layer reads a skip connection (U-Nets)")
    first_token: bool = Field(True, description="CLIP's constant first token apart from the quantized ones")
    ignore: dict[str, list[str]] = Field(default={}, description="patterns of layers that stay unquantized, by family")
    quantize_outputs: dict[str, list[str]] = Field(
        default={}, description="patterns of layers whose output is quantized too (q and k of attentions), by family"
    )
    storage_dtype: StorageDtype = "float16"
    floors: Floors = Field(
        Floors(), description="quality in dB below which layers are kept and stages end with exit code 7"
    )
    sequential: Sequential | None = None
    methods: dict[str, dict[str, object]] = {}
    distil: Distillation | None = None
    attention: Attention | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: object) -> object:
        return with_new_names(values, renamed.RECIPE)

    @model_validator(mode="after")
    def _one_source(self) -> Recipe:
        sources = [name for name in ("scheme", "mixed", "routing") if getattr(self, name) is not None]
        if len(sources) != 1:
            raise ValueError("a recipe has either a scheme, or mixed, or routing")
        if self.scheme is None:
            own = ["convolutions", "methods", "quantize_outputs", "targets"]
            own += ["sequential", "distil"] if self.routing is not None else []
            beside = [name for name in own if name in self.model_fields_set and getattr(self, name)]
            if beside:
                raise ValueError(f"{beside[0]}: beside {sources[0]}, its recipes say that")
        return self

    def scheme_of(self, kind: str) -> Scheme:
        """Return formats of a layer of that kind (``Linear``, ``Conv2d``).

        Raises:
            RuntimeError: the recipe is mixed or routed: its members have formats.
        """
        scheme = self.convolutions if kind == "Conv2d" and self.convolutions is not None else self.scheme
        if scheme is None:
            raise RuntimeError(f"recipe {self.name!r} chooses among others and has no formats of its own")
        return scheme

    def check_device(self, engines: Iterable[str]) -> None:
        """Refuse a ``mixed.device`` that is neither a GPU of :data:`qdiff.plan.devices.DEVICES` nor one of ``engines``, on which
        layers can be timed.

        Raises:
            InputError: with what there is.
        """
        engines, device = list(engines), None if self.mixed is None else self.mixed.device
        if device is not None and device not in (*DEVICES, *engines):
            raise InputError(
                f"recipe {self.name!r}: mixed.device: unknown device {device!r}",
                f"GPUs: {', '.join(DEVICES)}; engines of this machine: {', '.join(engines)}",
            )

    def check_families(self, known: Iterable[str]) -> None:
        """Refuse patterns for families that do not exist: they would never match.

        Raises:
            InputError: with the nearest names.
        """
        known = list(known)
        named: dict[str, Iterable[str]] = {
            "ignore": self.ignore,
            "quantize_outputs": self.quantize_outputs,
            "mixed.minimum": self.mixed.minimum if self.mixed else {},
            "distil.layers": self.distil.layers if self.distil else {},
        }
        for entry, families in named.items():
            for family in families:
                if family not in known:
                    raise unknown_name(f"family in {entry} of recipe {self.name!r}", family, known, InputError)

    def ignored(self, family: str, names: list[str]) -> dict[str, str]:
        """Return which of ``names`` stay unquantized, with the pattern that says so.

        Raises:
            InputError: a pattern that matches no layer, with the nearest names.
        """
        return match(f"recipe {self.name!r}: the ignore", self.ignore.get(family, []), family, names)

    def with_output(self, family: str, names: list[str]) -> dict[str, str]:
        """Return which of ``names`` have their output quantized too, with the pattern that says so. Raises as
        :meth:`ignored`.
        """
        return match(f"recipe {self.name!r}: quantize_outputs", self.quantize_outputs.get(family, []), family, names)


def match(what: str, patterns: list[str], family: str, names: list[str]) -> dict[str, str]:
    """Return which of ``names`` the patterns mean, with the first pattern that does.

    Args:
        what: begins the message, before "pattern".
        patterns: of the recipe.
        family: name of the model's family.
        names: that they may mean.

    Raises:
        InputError: a pattern that matches no layer, with the nearest names.
    """
    matched: dict[str, str] = {}
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            close = nearest(pattern, names)
            raise InputError(
                f"{what} pattern {pattern!r} matches no layer of {family}",
                f"nearest layers: {', '.join(close)}"
                if close
                else f"see the layers with: {command('quantize', 'RUN', dry_run=True)}",
            )
        for name in hits:
            matched.setdefault(name, pattern)
    return matched
