"""Models and engines in memory: each loaded once, the least recently used let go when the budget is reached.

One float pipeline serves all engines of the same weights: scheduler, text encoder and VAE are theirs in common, and an engine
only takes the backbone's place for the length of a request (:class:`qdiff.stages.generate.Session`). What an engine takes is
measured when it loads, because no file size tells it: OpenVINO repacks weights, ONNX Runtime copies them.

Only the compute slot's thread calls in here, so there are no locks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdiff.app.sources import Source, Weights
from qdiff.resources import release_memory, resident_bytes

if TYPE_CHECKING:
    from torch import nn

    from qdiff.app.previews import Previewer
    from qdiff.models import Model
    from qdiff.stages.generate import Session

log = logging.getLogger("qdiff.app")
ModelKey = tuple[Weights, str | None, str | None, int | None]
"""Tells float pipelines apart: by weights, their fingerprint, the scheduler, and the seed of random weights."""


@dataclass
class _LoadedModel:
    model: Model
    float_backbone: nn.Module
    previewer: Previewer
    bytes: int


@dataclass
class _LoadedEngine:
    session: Session
    model_key: ModelKey
    bytes: int
    used: float


class Pool:
    """Loaded sessions by source and engine.

    Args:
        budget_bytes: what all loaded models and engines may take together.
        on_load, on_evict: for counting.
    """

    def __init__(self, budget_bytes: int, on_load: Callable[[], object], on_evict: Callable[[], object]) -> None:
        self.budget_bytes = budget_bytes
        self._on_load, self._on_evict = on_load, on_evict
        self._models: dict[ModelKey, _LoadedModel] = {}
        self._engines: dict[tuple[str, str], _LoadedEngine] = {}

    @property
    def bytes(self) -> int:
        """Return the memory that everything loaded took when it was loaded."""
        return sum(one.bytes for one in self._models.values()) + sum(one.bytes for one in self._engines.values())

    @property
    def loaded(self) -> list[tuple[str, str]]:
        """Return the source and the engine of what is in memory."""
        return list(self._engines)

    def model(self, source: Source) -> Model:
        """Return the float pipeline of a source, loaded if need be, with its float backbone in place."""
        loaded = self._model(source)
        loaded.model.backbone = loaded.float_backbone
        return loaded.model

    def previewer(self, source: Source) -> Previewer:
        """Turn the latents of that model into small pictures."""
        return self._model(source).previewer

    def engine_bytes(self, source: Source, engine: str) -> int:
        """Return what loading that engine took."""
        return self._engines[source.name, engine].bytes

    def backbone_bytes(self, source: Source) -> int:
        """Return weights of the float backbone."""
        return sum(weight.numel() * weight.element_size() for weight in self._model(source).float_backbone.parameters())

    def session(self, source: Source, engine: str) -> Session:
        """Return a loaded engine of a source.

        Raises:
            QdiffError: it was not built, may not be trusted, or cannot run here.
        """
        from qdiff.stages.generate import Session

        key = (source.name, engine)
        if key not in self._engines:
            model = self.model(source)
            before = resident_bytes()
            session = Session(source.home, engine, model)
            took = max(0, resident_bytes() - before)
            self._engines[key] = _LoadedEngine(session, self._key(source), took, time.monotonic())
            log.info("loaded %s of %s in %.1f s", engine, source.name, session.load_seconds)
            self._on_load()
            self._shrink(keep=key)
        self._engines[key].used = time.monotonic()
        return self._engines[key].session

    def drop(self, keep: tuple[str, str] | None = None) -> int:
        """Let go of everything but ``keep``; return how many engines that were."""
        victims = [key for key in self._engines if key != keep]
        for key in victims:
            self._evict(key)
        self._drop_unused_models()
        release_memory()
        return len(victims)

    def _model(self, source: Source) -> _LoadedModel:
        key = self._key(source)
        if key not in self._models:
            from qdiff.app.previews import Previewer
            from qdiff.stages.calibrated_model import reload_model

            before = resident_bytes()
            model = reload_model(source.run) if source.run else source.family.load(source.weights.weights)
            backbone, previewer = model.backbone, Previewer(model)
            self._models[key] = _LoadedModel(model, backbone, previewer, max(0, resident_bytes() - before))
            log.info("loaded %s", model.note)
        return self._models[key]

    @staticmethod
    def _key(source: Source) -> ModelKey:
        """Return what decides the float pipeline; weights that were changed since a run are refused when they are
        loaded.
        """
        if source.run is None:
            return (source.weights, None, None, None)
        inputs = source.run.entry("calibrate")["inputs"]
        random = inputs["weights"].startswith("random:")
        seed = inputs["seed"] if random else None
        return (source.weights, inputs["fingerprint"], inputs["scheduler"], seed)

    def _shrink(self, keep: tuple[str, str]) -> None:
        while self.bytes > self.budget_bytes and len(self._engines) > 1:
            oldest = min((key for key in self._engines if key != keep), key=lambda key: self._engines[key].used)
            log.info("evicting %s of %s: %d MB are loaded", oldest[1], oldest[0], self.bytes // 10**6)
            self._evict(oldest)
            self._drop_unused_models()
            release_memory()

    def _evict(self, key: tuple[str, str]) -> None:
        self._engines.pop(key).session.close()
        self._on_evict()

    def _drop_unused_models(self) -> None:
        used = {engine.model_key for engine in self._engines.values()}
        for key in [key for key in self._models if key not in used]:
            del self._models[key]
