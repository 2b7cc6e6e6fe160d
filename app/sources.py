"""Which models the page offers: run folders that were named on the command line or made by the page, and bundled weights.

The page sends names, never paths: a name is looked up here, and what is not in the list does not exist. So no request can
reach a file, a Hub id or an engine that the operator did not put there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qdiff.errors import InputError, QdiffError, unknown_name
from qdiff.runs.run import Run

if TYPE_CHECKING:
    from qdiff.models import Family

log = logging.getLogger("qdiff.app")
BUDGETS = {"quick": 8, "standard": 32, "thorough": 64}  # prompts to calibrate on


@dataclass(frozen=True)
class EngineChoice:
    """An engine of a source; ``why_not`` says why it cannot run here (empty: it can)."""

    name: str
    title: str
    why_not: str = ""


@dataclass(frozen=True)
class Weights:
    """A model that may be calibrated from the page: family and what ``--weights`` would name."""

    family: str
    weights: str

    @property
    def name(self) -> str:
        """Return the name as the page shows and sends it."""
        return self.family if self.weights == "bundled" else f"{self.family} {self.weights.rpartition('/')[2]}"

    @classmethod
    def parse(cls, text: str) -> Weights:
        """Return the weights that the command line names as ``FAMILY`` or ``FAMILY=WEIGHTS``.

        Raises:
            UsageError: no such family.
        """
        from qdiff.models import FAMILIES

        family, _, weights = text.partition("=")
        FAMILIES[family]
        return cls(family, weights or "bundled")


@dataclass(frozen=True)
class Source:
    """One entry of the list. Without ``run`` only the float model is there."""

    name: str
    title: str
    weights: Weights
    run: Run | None = None

    @property
    def family(self) -> Family:
        """Return its model family."""
        from qdiff.models import FAMILIES

        return FAMILIES[self.weights.family]

    @property
    def home(self) -> Run:
        """Return its run; for a bundled model without one an empty run, whose float engine asks nothing of it."""
        from qdiff.models.loading import bundled_folder

        return self.run if self.run is not None else Run(bundled_folder(self.weights.family))

    @property
    def quantized(self) -> bool:
        """Return whether there is a plan, so that there is something to compare with float."""
        return self.run is not None and self.run.done("quantize")

    def engines(self) -> list[EngineChoice]:
        """Return the engines, float first, then by speed; engines that were not built are not in the list."""
        from qdiff.engines import choose_engine, ranked

        chosen = [EngineChoice("float", choose_engine("float").title)]
        if self.run is None or not self.quantized:
            return chosen
        for engine in (engine for engine in ranked() if engine.name != "float"):
            if engine.runs_module or self.run.done(f"build:{engine.name}"):
                chosen.append(EngineChoice(engine.name, engine.title, engine.missing() or ""))
        return chosen

    def engine(self, name: str) -> str:
        """Return the name of an engine that can run here; empty: the fastest.

        Raises:
            InputError: unknown, not built, or not runnable here.
        """
        if not name:
            from qdiff.stages.build import default_engine

            return default_engine(self.run) if self.run is not None and self.quantized else "float"
        choices = {choice.name: choice for choice in self.engines()}
        if name not in choices:
            raise unknown_name("engine", name[:60], choices, InputError)
        if choices[name].why_not:
            raise InputError(f"{name} cannot run here: {choices[name].why_not}.", "Choose another engine.")
        return name

    def engine_bytes(self, engine: str) -> int | None:
        """Return bytes on disk of what that engine runs: the built file, or the backbone's weights."""
        if self.run is None or not self.quantized:
            return None
        quantize = self.run.entry("quantize")
        if engine == "float":
            return int(quantize["float32_bytes"])
        if engine == "eager":
            return int(quantize["packed_bytes"])
        from qdiff.engines import ENGINES

        built = int(self.run.entry(f"build:{engine}")["bytes"])
        graph = int(self.run.entry(f"export:{ENGINES[engine].target}")["bytes"])
        return (
            built if built > graph // 4 else graph
        )  # a folder without weights in it: the engine loads the graph itself


class Sources:
    """The list, in the order in which the page shows it.

    Args:
        runs: folders named by the operator; each must be a run with a finished calibration.
        workspace: where the page's own runs go; finished ones in there are listed too.
        allowed: models that may be built besides the bundled ones and those of ``runs``.
    """

    def __init__(self, runs: Sequence[Path], workspace: Path, allowed: Iterable[Weights] = ()) -> None:
        self.workspace = workspace
        self._named = [Path(run).absolute() for run in runs]
        for path in self._named:
            Run.existing(path).entry("calibrate")  # what the operator named and cannot be used is an error now
        self._allowed = list(allowed)
        self.version = 0
        self.refresh()

    def refresh(self) -> None:
        """Read the folders anew: a build has ended. Damaged folders in the workspace are left out, with a line in the
        log.
        """
        listed: list[Source] = []
        found = sorted(self.workspace.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in dict.fromkeys([*self._named, *(path.parent.absolute() for path in found)]):
            try:
                run = Run.existing(path)
                if run.done("calibrate") and (path in self._named or run.done("quantize")):
                    listed.append(_of_run(run, {source.name for source in listed}))
            except QdiffError as error:
                log.warning("%s is left out: %s", path, error.message)
        own = [weights for weights in _bundled() if not any(source.weights == weights for source in listed)]
        listed += [Source(weights.name, f"{weights.name} · float only", weights) for weights in own]
        self._sources = {source.name: source for source in listed}
        self.version += 1

    def __getitem__(self, name: str) -> Source:
        """Return the source of that name; empty: the first.

        Raises:
            InputError: not in the list.
        """
        if not name:
            return next(iter(self._sources.values()))
        if name not in self._sources:
            raise unknown_name("model", name[:60], self._sources, InputError)
        return self._sources[name]

    def all(self) -> list[Source]:
        """Return every source."""
        return list(self._sources.values())

    def buildable(self) -> dict[str, Weights]:
        """Return models that may be calibrated from the page, by name."""
        models = [*_bundled(), *(self._weights_of(path) for path in self._named), *self._allowed]
        return {weights.name: weights for weights in models}

    @staticmethod
    def _weights_of(path: Path) -> Weights:
        inputs = Run.existing(path).entry("calibrate")["inputs"]
        return Weights(inputs["model"], inputs["weights"])


def _bundled() -> list[Weights]:
    from qdiff.models import FAMILIES
    from qdiff.models.loading import bundled_folder

    return [Weights(name, "bundled") for name in FAMILIES if bundled_folder(name).is_dir()]


def _of_run(run: Run, taken: set[str]) -> Source:
    inputs = run.entry("calibrate")["inputs"]
    weights = Weights(inputs["model"], inputs["weights"])
    recipe = run.entry("quantize")["recipe"] if run.done("quantize") else "calibrated, not quantized"
    name = f"{weights.name} · {recipe}" if run.path.name == weights.name else f"{run.path.name} · {recipe}"
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name} ({number})", number + 1
    return Source(unique, unique, weights, run)
