"""An engine whose blocks change their precision: before every step it is given routes, after it a router hears what changed.

Routes, cached deltas and reports are inputs and outputs of the graph (:mod:`qdiff.export.routes`); whoever calls the runner
names the backbone's own inputs and gets its prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from qdiff.engines.base import Runner
from qdiff.plan.routing_plan import DELTAS, ROUTES
from qdiff.routing.router import Router

if TYPE_CHECKING:
    from torch import Tensor

    from qdiff.models.base import Family
    from qdiff.models.config import Config


class RoutedRunner(Runner):
    """A runner with its routes added.

    Args:
        runner: of a graph that takes routes.
        router: of the plan that the graph was made from.
        family, config: of the backbone; they say how a latent is cut into tokens.
    """

    def __init__(self, runner: Runner, router: Router, family: Family, config: Config) -> None:
        self.runner, self.router = runner, router
        self.inputs = tuple(spec for spec in runner.inputs if spec.name not in (ROUTES, DELTAS))
        self._family, self._config = family, config
        from qdiff.models.config import integer
        from qdiff.recording.inputs import latent_of

        self._latent = latent_of(family.inputs(config)).name
        self._width = integer(config, "num_attention_heads") * integer(config, "attention_head_dim")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        if self.router.plan.by_sample and len(inputs["timestep"]) > 1:
            return self.router.one_by_one(self, inputs, self._family.inputs(self._config))
        return self._called(inputs)

    def _called(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        routes, deltas = self.router.route(float(inputs["timestep"].reshape(-1)[0]), inputs)
        given = {**inputs, ROUTES: torch.tensor(routes, dtype=torch.int64)}
        if self.router.plan.reuse is not None:
            if deltas is None:
                latent = inputs[self._latent]
                cells = math.prod(self._family.grid(self._config, latent.shape))
                deltas = torch.zeros(len(routes), len(latent), cells, self._width)
            given[DELTAS] = deltas
        prediction, changes, *rest = self.runner.outputs(given)
        self.router.observe(changes, *rest)
        return prediction

    def close(self) -> None:
        self.router.forget()
        self.runner.close()
