"""One backbone out of two: every block of the chain with its branches, everything else as the careful recipe made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qdiff.allocation.route_table import Costs
from qdiff.formats.table import FORMATS
from qdiff.nn.quant_linear import QuantLinear, TimestepIndex
from qdiff.plan.plan import LayerPlan, Plan, Structure
from qdiff.routing.blocks import BranchedBlock, BranchState, branch_name


@dataclass
class Version:
    """The whole backbone as one recipe makes it, with its plan."""

    plan: Plan
    backbone: nn.Module

    def layers_of(self, block: str) -> list[LayerPlan]:
        """Return the layers inside a block."""
        return [layer for layer in self.plan.layers if layer.name.startswith(f"{block}.")]


def clock_of(backbone: nn.Module) -> TimestepIndex | None:
    """Return the timestep index that its layers read."""
    return next(
        (m.timestep_index for m in backbone.modules() if isinstance(m, QuantLinear) and m.timestep_index is not None),
        None,
    )


def share_clock(versions: Sequence[Version]) -> TimestepIndex:
    """Let the layers of all versions read one timestep index, and return it."""
    timestep_index = next(
        (found for each in versions if (found := clock_of(each.backbone)) is not None), TimestepIndex()
    )
    for version in versions:
        for module in version.backbone.modules():
            if isinstance(module, QuantLinear):
                module.timestep_index = timestep_index
    return timestep_index


def branches_of(versions: Sequence[Version], block: str) -> list[nn.Module]:
    """Return a block in every version."""
    return [version.backbone.get_submodule(block) for version in versions]


def assemble(versions: Sequence[Version], blocks: dict[str, list[int]], keep: bool) -> BranchState:
    """Put branches into the first version's backbone, in place.

    Args:
        versions: the quantized models that branches are taken from.
        blocks: of each block, the versions that it can have.
        keep: blocks with one branch get one all the same, because they may be reused; else they take that version's block.
    """
    found = {
        name: [versions[index].backbone.get_submodule(name) for index in chosen] for name, chosen in blocks.items()
    }
    branched = [name for name, modules in found.items() if keep or len(modules) > 1]
    branch_state, backbone = BranchState(len(branched)), versions[0].backbone
    for name, modules in found.items():
        if name in branched:
            backbone.set_submodule(name, BranchedBlock(modules, branched.index(name), branch_state))
        else:
            backbone.set_submodule(name, modules[0])
    return branch_state


def joined_plan(versions: Sequence[Version], blocks: dict[str, list[int]], keep: bool, recipe: str) -> Plan:
    """Return the plan of what :func:`assemble` makes, without its routing."""
    branched = {name: len(chosen) for name, chosen in blocks.items() if keep or len(chosen) > 1}
    layers: list[LayerPlan] = []
    for layer in versions[0].plan.layers:
        block = next((name for name in blocks if layer.name.startswith(f"{name}.")), None)
        if block is None:
            layers.append(layer)
        elif block in branched or blocks[block]:
            own = f"{block}."
            if layer.name == versions[0].layers_of(block)[0].name:  # all layers of a block at once
                for branch, version in enumerate(blocks[block]):
                    prefix = f"{branch_name(block, branch)}." if block in branched else own
                    layers += [_moved(each, own, prefix) for each in versions[version].layers_of(block)]
    structure = Structure(
        split=versions[0].plan.structure.split,
        first_token=versions[0].plan.structure.first_token,
        branches=branched,
    )
    return versions[0].plan.model_copy(update={"layers": layers, "recipe": recipe, "structure": structure})


def _moved(layer: LayerPlan, own: str, prefix: str) -> LayerPlan:
    group = layer.group and prefix + layer.group.removeprefix(own)
    return layer.model_copy(update={"name": prefix + layer.name.removeprefix(own), "group": group})


def costs_of(versions: Sequence[Version], blocks: Sequence[str]) -> Costs:
    """Return what each block costs in every version."""
    weights, activations, sizes = [], [], []
    for block in blocks:
        own = [
            [(layer.shape[0] * layer.matrix[1], layer) for layer in version.layers_of(block)] for version in versions
        ]
        size = float(sum(elements for elements, _ in own[0]))
        weights.append([sum(n * layer.weight_bits() for n, layer in each) / size for each in own])
        activations.append([sum(n * FORMATS[layer.activations].bits for n, layer in each) / size for each in own])
        sizes.append(size)
    shares = torch.tensor(sizes, dtype=torch.float64)
    return Costs(
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(activations, dtype=torch.float64),
        shares / shares.sum(),
    )
