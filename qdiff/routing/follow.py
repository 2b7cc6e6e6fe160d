"""A backbone that follows a routing plan when it is called: a router before and after every forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qdiff.errors import InputError
from qdiff.plan.routing_plan import RoutingPlan
from qdiff.recording.inputs import InputSpec
from qdiff.routing.blocks import branch_state_of
from qdiff.routing.router import Router, nearest


class BackboneFamily(Protocol):
    """What is asked of a :class:`qdiff.models.base.Family`, which is of a later room."""

    def inputs(self, config: Any, /) -> tuple[InputSpec, ...]: ...

    def capture(self, args: tuple[object, ...], kwargs: Mapping[str, object], /) -> dict[str, Tensor]: ...

    def call(self, backbone: nn.Module, inputs: Mapping[str, Tensor], /) -> Tensor: ...


def varying_inputs(family: BackboneFamily, config: object) -> frozenset[str]:
    """Return names of the inputs that change from step to step."""
    return frozenset(spec.name for spec in family.inputs(config) if spec.varies)


NOISE = 0.1  # about what NVFP4 does to what a block adds


@dataclass(frozen=True)
class Following:
    """A backbone's router, until it is stopped."""

    router: Router
    hooks: list[RemovableHandle]

    def stop(self) -> None:
        """Leave the backbone with the routes that it has."""
        for hook in self.hooks:
            hook.remove()


def predict(family: BackboneFamily, backbone: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a backbone's prediction ``[batch, ...]``; where it follows routes that depend on samples, of each sample alone.

    Args:
        family: of the backbone.
        backbone: which is called.
        inputs: by name.
    """
    branch_state = branch_state_of(backbone)
    router = None if branch_state is None or branch_state.pinned else branch_state.router
    if router is None or not router.plan.by_sample or len(inputs["timestep"]) == 1:
        return family.call(backbone, inputs)
    specs = family.inputs(backbone.config)
    return router.one_by_one(lambda sample: family.call(backbone, sample), inputs, specs)


def follow(family: BackboneFamily, backbone: nn.Module, plan: RoutingPlan) -> Following:
    """Set the routes of every call from now on.

    Args:
        family: of the backbone.
        backbone: with the branches of ``plan``.
        plan: the routes.
    """
    branch_state = branch_state_of(backbone)
    assert branch_state is not None
    router = Router(plan, varying_inputs(family, backbone.config))
    branch_state.router, branch_state.caching = router, plan.reuse is not None

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not branch_state.pinned:
            inputs = family.capture(args, kwargs)
            if router.plan.by_sample and len(inputs["timestep"]) > 1:
                raise InputError(
                    f"this backbone's routes depend on the sample, and it was given {len(inputs['timestep'])} at once",
                    "call it through qdiff.routing.follow.predict, or with one sample at a time",
                )
            timestep = float(inputs["timestep"].reshape(-1)[0])
            branch_state.routes, branch_state.deltas = router.route(timestep, inputs)
            here = nearest(router.plan.timesteps, timestep) == router.disturbed
            branch_state.noise = NOISE if here else 0.0

    def after(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        if not branch_state.pinned:
            if branch_state.caching:
                router.observe(branch_state.changes(), branch_state.drifts(), branch_state.new_deltas())
            else:
                router.observe(branch_state.changes())
            branch_state.clear()

    hooks = [
        backbone.register_forward_pre_hook(before, with_kwargs=True),
        backbone.register_forward_hook(after, with_kwargs=True),
    ]
    return Following(router, hooks)
