"""What a report says, as plain data: ``report.json`` is exactly :class:`ReportData`; and how its numbers are written for people.

``None`` and empty mean *not measured*, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qdiff.evaluation.metrics import DB_CAP
from qdiff.events import duration

VERSION = 1
NOT_MEASURED = "not measured"


@dataclass
class ModelInfo:
    """Which model, and which weights really ran (``note``). ``parameters`` counts those of the backbone."""

    family: str
    weights: str
    parameters: int | None = None
    note: str = ""


@dataclass
class PromptResult:
    """One pair of pictures. Paths are relative to the run folder; ``psnr_db`` of 100 means identical."""

    prompt: str
    seed: int
    float_image: str | None = None
    quantized_image: str | None = None
    psnr_db: float | None = None
    ssim: float | None = None


@dataclass
class Quality:
    """Over all pairs. The accuracies are fractions of the pictures that show what the prompt asked for, in [0, 1].

    Of clips alone: accuracies of the motion, mean change from frame to frame over float's (0: frozen), and the PSNR of those
    changes.
    """

    psnr_db_mean: float | None = None
    psnr_db_min: float | None = None
    ssim_mean: float | None = None
    accuracy_float: float | None = None
    accuracy_quantized: float | None = None
    motion_accuracy_float: float | None = None
    motion_accuracy_quantized: float | None = None
    motion_ratio: float | None = None
    change_psnr_db: float | None = None


@dataclass
class LayerResult:
    """One layer: the format that the plan asked for, and by target the one found in its graph.

    ``sqnr_db`` is that of the layer's output; ``smoothing`` the exponent alpha; ``timestep_scales`` whether its activation
    scale depends on the timestep.
    """

    name: str
    kind: str
    requested: str
    realised: dict[str, str] = field(default_factory=dict)
    sqnr_db: float | None = None
    smoothing: float | None = None
    timestep_scales: bool = False
    why: str = ""
    bytes_float: int | None = None
    bytes_quantized: int | None = None


@dataclass
class TimestepError:
    """Error of the backbone's whole output at one timestep (its value, not its index)."""

    timestep: float
    sqnr_db: float | None = None
    cosine: float | None = None


@dataclass
class EngineResult:
    """One engine. ``seconds_per_step`` and ``speedup`` are medians of pairs: engine and baseline in turn, step by step.

    Args:
        speedup_low, speedup_high: between which the middle half of the pairs is.
        speed_reason: why the machine was too busy to tell the speed; empty where it was not.
    """

    name: str
    title: str
    available: bool = True
    why_not: str = ""
    seconds_per_step: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    speed_reason: str = ""
    peak_memory_bytes: int | None = None
    file_bytes: int | None = None
    psnr_db_mean: float | None = None
    note: str = ""

    @property
    def reliable_speedup(self) -> float | None:
        """Return the speed-up, unless the machine was too busy to tell."""
        return None if self.speed_reason else self.speedup

    @property
    def speed_words(self) -> str:
        """Return the speed-up for a table: ``3.5×``, or between what it was found on a busy machine."""
        if not self.speed_reason or self.speedup_low is None or self.speedup_high is None:
            return times(self.reliable_speedup)
        return f"machine busy: not reliable ({self.speedup_low:.2g} to {times(self.speedup_high)})"


@dataclass
class Sizes:
    """Bytes of the backbone's weights before and after, and of each file that the run made, by name."""

    weights_float: int | None = None
    weights_quantized: int | None = None
    artifacts: dict[str, int] = field(default_factory=dict)


@dataclass
class HeadResult:
    """One head of sparse attention; lists have an entry for each group of timesteps.

    ``recall`` is the share of its attention that the blocks it reads hold, ``error`` what leaving the others out changes in the
    prediction, in dB of signal over change, when this head alone is sparse.
    """

    layer: str
    head: int
    order: str
    density: list[float]
    recall: list[float]
    error_db: list[float]


@dataclass
class AttentionResult:
    """Self-attentions that follow block lists. ``density`` is the mean over sparse layers and
    timesteps, ``overall`` that over all.

    Args:
        blocks: of queries and of keys; ``block`` is how many tokens one of keys has.
        groups: of timesteps, in words, the noisiest first; everything is read above the first.
        picture: of the masks, relative to the run folder.
    """

    numerics: str
    density: float
    overall: float
    blocks: tuple[int, int]
    block: int
    groups: list[str]
    heads: list[HeadResult]
    picture: str | None = None


@dataclass
class PlanResult:
    """One plan that an allocation looked at: its ``cost`` in the budget's unit, and the PSNR of its simulated pictures.

    ``kind`` is ``uniform`` (one recipe for all), ``solver`` (another budget), ``candidate`` or ``chosen``.
    """

    name: str
    kind: str
    cost: float
    psnr_db: float | None = None
    layers: dict[str, int] = field(default_factory=dict)


@dataclass
class AllocationResult:
    """How a mixed recipe's formats were chosen. ``rank_correlations``: Spearman's, of proxies with the measured change."""

    measure: str
    budget: float
    device: str | None = None
    measured: bool = False
    groups: int = 0
    calls: int = 0
    plans: list[PlanResult] = field(default_factory=list)
    rank_correlations: dict[str, float] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Return the budget's unit, for axes and tables."""
        if self.measure == "latency":
            return f"ms a step, {'measured with' if self.measured else 'reckoned for'} {self.device}"
        return {"bits": "bits a weight", "bytes": "bytes"}[self.measure]


@dataclass
class RoutesResult:
    """One set of routes that was tried. ``kind`` is ``rule``, ``uniform`` or ``reuse``; ``skipped`` the share of block
    evaluations that were left out.
    """

    name: str
    kind: str
    used_bits: float
    psnr_db: float
    skipped: float = 0.0


@dataclass
class RoutingResult:
    """Blocks that change between recipes from step to step.

    Args:
        chosen: name of the rule that was taken.
        routes: for each timestep of one picture the block's recipe, by index; -1 where it was left out.
        used_bits: of the weights that blocks compute with, on average; ``resident_bits`` of all that is kept for them;
            ``None`` where no block has branches.
        skipped: share of block evaluations that were left out.
        r2: of the predictors on held-out prompts, by block.
    """

    recipes: list[str]
    blocks: list[str]
    chosen: str
    timesteps: list[float]
    routes: list[list[int]]
    tried: list[RoutesResult]
    used_bits: float
    used_activation_bits: float | None = None
    resident_bits: float | None = None
    skipped: float = 0.0
    r2: dict[str, float] = field(default_factory=dict)


@dataclass
class CorrectionResult:
    """Corrections of the sampler's steps that were tried. ``gains``: of pictures, by method, in ``unit``; ``kept``: the one that
    quantized engines follow, or ``None``.
    """

    engine: str
    unit: str
    gains: dict[str, float]
    kept: str | None = None


@dataclass
class StageResult:
    """One stage as the manifest has it."""

    name: str
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass
class ReportData:
    """Everything that a report says; ``report.json`` is exactly this. ``None`` and empty mean *not measured*.

    Args:
        engine: name of the engine that made the quantized pictures; the summary shows its speed.
        baseline: name of the float engine that the speed-ups refer to.
        warnings: what was skipped, and why.
    """

    model: ModelInfo
    recipe: str
    run_id: str
    engine: str | None = None
    baseline: str | None = None
    quality: Quality = field(default_factory=Quality)
    sizes: Sizes = field(default_factory=Sizes)
    prompts: list[PromptResult] = field(default_factory=list)
    layers: list[LayerResult] = field(default_factory=list)
    timesteps: list[TimestepError] = field(default_factory=list)
    allocation: AllocationResult | None = None
    attention: AttentionResult | None = None
    routing: RoutingResult | None = None
    correction: CorrectionResult | None = None
    engines: list[EngineResult] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    version: int = VERSION

    @property
    def size_ratio(self) -> float | None:
        """Return the float model's bytes over the quantized model's, or ``None``."""
        before, after = self.sizes.weights_float, self.sizes.weights_quantized
        return before / after if before and after else None

    @property
    def chosen(self) -> EngineResult | None:
        """Return the entry of :attr:`engine`, when it could run."""
        return next((one for one in self.engines if one.name == self.engine and one.available), None)

    @property
    def identical(self) -> int:
        """Return how many pairs of pictures are equal in every value."""
        return sum(one.psnr_db is not None and one.psnr_db >= DB_CAP for one in self.prompts)

    @property
    def mismatches(self) -> list[LayerResult]:
        """Return layers that some target runs in another precision than the plan asked for."""
        return [layer for layer in self.layers if any(found != layer.requested for found in layer.realised.values())]


def megabytes(size: int | None) -> str:
    """Return a size as text: ``68_200_000`` gives ``68.2 MB`` (powers of ten, as disks and ``ls --si`` count)."""
    if size is None:
        return NOT_MEASURED
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * step:
            return f"{size / step:.3g} {unit}" if size < 999.5 * step else f"{size / step:,.0f} {unit}"
    return f"{size} B"


def seconds(value: float | None) -> str:
    """Return a time as text: ``0.105`` gives ``105 ms``; from ten seconds on as :func:`qdiff.events.duration` does."""
    if value is None:
        return NOT_MEASURED
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 10 else duration(value)


def db(value: float | None) -> str:
    """Return decibels as text: ``38.94`` gives ``38.9 dB``; the cap gives ``identical``."""
    return NOT_MEASURED if value is None else "identical" if value >= DB_CAP else f"{value:.1f} dB"


def times(value: float | None) -> str:
    """Return a factor as text: ``3.93`` gives ``3.9×``."""
    return NOT_MEASURED if value is None else f"{value:.2g}×" if value < 10 else f"{value:.0f}×"


def percent(value: float | None) -> str:
    """Return a share as text: ``0.957`` gives ``96 %``."""
    return NOT_MEASURED if value is None else f"{100 * value:.0f} %"


def count(value: int | None) -> str:
    """Return a count as text: ``66_800_000`` gives ``66.8 M``."""
    if value is None:
        return NOT_MEASURED
    for unit, step in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * step:
            return f"{value / step:.3g} {unit}"
    return str(value)
