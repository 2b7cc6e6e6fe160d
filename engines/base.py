"""What an engine is: something that builds a file from an ONNX graph (or needs none) and then runs the backbone.

Every engine runs the same call: named tensors in, one tensor out. The pipeline, the parity check, the benchmark and the
web page know nothing more about it. Engines register in :data:`ENGINES`; the contract test runs over all of them.

There are two ways to a :class:`Runner`, and ``Engine.runs_module`` says which: engines with an export ``target`` build a
folder from an ONNX file and load it; engines without one take the torch module itself (``load_module``). One class
hierarchy for both keeps every table (doctor, benchmark, web page) a loop over :data:`ENGINES`; the way that an engine does not
have answers with the command that does work.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, TypedDict

from qdiff.engines.inputs import TensorSpec
from qdiff.errors import MissingDependencyError, UsageError, command, unknown_name
from qdiff.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qdiff.engines.plan_profiles import CalibratedSizes
    from qdiff.plan.plan import Plan

Shape = tuple[int, ...]


class ProfileJson(TypedDict):
    """A profile in a file: lists of smallest, usual and largest."""

    name: str
    ranges: dict[str, list[list[int]]]
    values: dict[str, list[list[int]]]


class OptionsJson(TypedDict):
    """Build options in a file."""

    profiles: list[ProfileJson]
    compute_capability: str | None
    flags: dict[str, str]


class BuildFacts(TypedDict, total=False):
    """What is recorded of a build. Every engine says ``bytes``, and what else its library tells."""

    bytes: int
    inputs: list[str]
    operations: int
    precision: str
    device: str
    compute_capability: str
    layers: dict[str, int]  # by kind
    tensors: dict[str, int]  # by element type
    seconds: float  # added by the cache


@dataclass(frozen=True)
class Profile:
    """An optimisation profile: for every input the smallest, the usual and the largest shape.

    ``ranges`` maps an input's name to ``(min, opt, max)``. A static profile has three equal shapes. ``values`` does the same for
    the numbers in inputs that decide the shapes of other tensors.
    """

    name: str
    ranges: Mapping[str, tuple[Shape, Shape, Shape]]
    values: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)

    def to_json(self) -> ProfileJson:
        """Return the profile as JSON values; part of the engine cache's key."""
        return {
            "name": self.name,
            "ranges": {key: [list(shape) for shape in value] for key, value in self.ranges.items()},
            "values": {key: [list(numbers) for numbers in value] for key, value in self.values.items()},
        }

    @classmethod
    def from_json(cls, value: ProfileJson) -> Profile:
        """Return the profile that :meth:`to_json` wrote."""

        def triples(of: dict[str, list[list[int]]]) -> dict[str, tuple[Shape, Shape, Shape]]:
            return {name: (tuple(low), tuple(usual), tuple(high)) for name, (low, usual, high) in of.items()}

        return cls(value["name"], triples(value["ranges"]), triples(value["values"]))


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Args:
        profiles: shapes that the engine must accept; the first is the default.
        compute_capability: GPU architecture to build for, e.g. ``"12.0"``; ``None``: the GPU that is there.
        threads: CPU threads at run time; ``None``: the library's default. Not part of the cache key.
        flags: backend-specific settings by name (:attr:`Engine.known_flags`); part of the cache key.
    """

    profiles: tuple[Profile, ...] = ()
    compute_capability: str | None = None
    threads: int | None = None
    flags: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> OptionsJson:
        """Return what decides the engine's files (all options but ``threads``) as JSON values."""
        return {
            "profiles": [profile.to_json() for profile in self.profiles],
            "compute_capability": self.compute_capability,
            "flags": dict(self.flags),
        }

    @classmethod
    def from_json(cls, value: OptionsJson, threads: int | None = None) -> BuildOptions:
        """Return the options that :meth:`to_json` wrote, with the threads of this run."""
        profiles = tuple(Profile.from_json(profile) for profile in value["profiles"])
        return cls(profiles, value["compute_capability"], threads, dict(value["flags"]))


class Runner(ABC):
    """A loaded engine. ``__call__`` takes the backbone's inputs by name and returns its output as a float32 CPU tensor
    (or a CUDA tensor when the inputs are). One call at a time; the output is the caller's to keep.
    """

    inputs: tuple[TensorSpec, ...] = ()  # what the graph declares; empty for torch modules, which check for themselves
    # Inputs whose tensors nobody changes: one that is given again need not be handed over again.
    lasting: frozenset[str] = frozenset()

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return everything that the graph returns, the prediction first; raise as :meth:`__call__` does."""
        return [self(inputs)]

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one denoising step of the backbone.

        Raises:
            InputError: names, shapes or element types that the engine does not take.
        """

    def keep(self, names: Iterable[str]) -> None:
        """Take it that nobody changes the tensors that are given for these inputs (:attr:`lasting`)."""
        self.lasting = self.lasting | frozenset(names)

    def close(self) -> None:
        """Free what the engine holds. The runner is not used afterwards."""


class Engine(ABC):
    """One backend. Subclasses are cheap to construct and import their library only inside methods."""

    name: ClassVar[str]
    title: ClassVar[str]
    target: ClassVar[str | None] = None  # the export target whose graph it takes; None: it runs torch modules
    extra: ClassVar[str | None] = None  # the optional dependency group that installs it
    library: ClassVar[str]  # import name of the backend
    known_flags: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # flag -> its values; the first is the default
    runs_float: ClassVar[bool] = False  # whether the torch module that it runs is the float model

    @property
    def rank(self) -> int:
        """Return the place among the engines: the highest rank among those that can run is the default engine."""
        return 0

    def integer_arithmetic(self) -> str | None:
        """Return how this engine multiplies INT8 here, in a sentence for ``qdiff doctor``; ``None`` where the processor
        does not decide it, or the library is not installed.
        """
        return None

    @property
    def runs_module(self) -> bool:
        """Return whether a runner is made from a torch module (:meth:`load_module`) and not from a built folder
        (:meth:`load`).
        """
        return self.target is None

    def missing(self) -> str | None:
        """Return why this engine cannot run here (package or hardware), or ``None`` when it can."""
        try:
            self.backend()
        except MissingDependencyError as error:
            return error.message
        return None

    def missing_for_build(self) -> str | None:
        """Return why this engine cannot be built here, or ``None``. Building may need less than running."""
        return self.missing()

    def backend(self) -> ModuleType:
        """Return the backend library, imported.

        Raises:
            MissingDependencyError: it is not installed, or is but cannot be loaded.
        """
        try:
            return importlib.import_module(self.library)
        except (ImportError, OSError) as error:  # OSError: a shared library inside the wheel does not load
            absent = isinstance(error, ModuleNotFoundError) and error.name == self.library
            why = "is not installed" if absent else f"cannot be imported: {error}"
            fix = f"pip install 'qdiff-deploy[{self.extra}]', or choose another engine ({command('doctor')} lists them)"
            raise MissingDependencyError(
                f"engine {self.name!r} needs the package {self.library}, which {why}", fix
            ) from error

    def version(self) -> str:
        """Return the version of the backend library.

        Raises:
            MissingDependencyError: it is not installed.
        """
        return str(self.backend().__version__)

    def device(self, options: BuildOptions) -> str:
        """Return the device an engine is built for, as it goes into the cache key: ``cpu``, ``cuda`` or e.g.
        ``sm_120``.
        """
        return "cpu"

    def flag(self, options: BuildOptions, name: str) -> str:
        """Return the value of one of :attr:`known_flags` in ``options``, or its default.

        Raises:
            UsageError: ``options`` holds a flag or a value that this engine does not know.
        """
        for given, value in options.flags.items():
            if given not in self.known_flags:
                raise unknown_name(f"flag of engine {self.name!r}", given, self.known_flags)
            if value not in self.known_flags[given]:
                raise unknown_name(f"value of flag {given!r}", value, self.known_flags[given])
        return options.flags.get(name, self.known_flags[name][0])

    def refuses(self, plan: Plan) -> UsageError | None:
        """Return why this engine builds nothing from a graph of ``plan``, or ``None`` where it does."""
        return None

    def profile_for(self, plan: Plan, text: str, sizes: CalibratedSizes, flags: Mapping[str, str]) -> Profile:
        """Return the profile of a graph of ``plan`` for the words ``text`` (``""``: the model's own size, and the batches
        that this engine takes).

        Args:
            plan: of the quantized model.
            text: the words of ``--profile``.
            sizes: what the words do not say.
            flags: of :attr:`known_flags`, those that are given.

        Raises:
            UsageError: words that are not understood, or sizes that this engine or this graph does not take.
        """
        from qdiff.engines.plan_profiles import plan_profile

        return plan_profile(plan, text, sizes)

    def default_compute_capability(self) -> str | None:
        """Return the GPU architecture to build for where none is named; ``None``: the GPU that is here, or no GPU at
        all.
        """
        return None

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> BuildFacts:
        """Build the engine's files in ``folder`` (which exists) from the graph at ``onnx``.

        Returns:
            JSON facts about the engine (layers, precisions, bytes).

        Raises:
            UsageError: options that do not fit this engine, or an engine that has no build.
            InputError: the backend refuses the graph; the message names the node.
            MissingDependencyError: the package or the hardware that building needs is not there.
        """
        raise UsageError(
            f"engine {self.name!r} runs the torch module itself: there is nothing to build", "leave the build out"
        )

    def reads(self, folder: Path) -> list[Path]:
        """Return the files outside of ``folder`` that a built engine reads: they count to its size.

        Raises:
            InputError: one is missing.
            IntegrityError: one is not what was built.
        """
        return []

    def load(self, folder: Path, options: BuildOptions) -> Runner:
        """Load what :meth:`build` wrote. Whether the files may be trusted is not asked here but in :mod:`~.cache`.

        Raises:
            MissingDependencyError: the package or the hardware that running needs is not there.
            IntegrityError: the files are not what the build wrote.
        """
        raise UsageError(f"engine {self.name!r} has no engine folder: it runs the torch module", "give it the model")

    def load_module(self, module: nn.Module) -> Runner:
        """Return a runner around a torch module (float or quantized) whose ``forward`` takes the backbone's inputs by
        name.
        """
        raise UsageError(f"engine {self.name!r} runs built engines, not torch modules", "export and build first")


ENGINES: Registry[type[Engine]] = Registry(
    "engine",
    meant={"torch": "eager", "pytorch": "eager", "onnx": "onnxruntime", "ort": "onnxruntime", "trt": "tensorrt"},
)
