"""(float model, recipe, statistics) -> (plan, quantized backbone), and back from the run folder.

Layers are replaced in place, group by group, so the float model and the quantized one never stand in memory together.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff import numerics
from qdiff.errors import InputError, IntegrityError
from qdiff.events import Progress
from qdiff.files import open_tensors, save_tensors
from qdiff.formats import format_named
from qdiff.layers import HalfLinear, QuantLinear, TimestepClock
from qdiff.methods import Problem, Solution, apply_method
from qdiff.models.base import Model
from qdiff.plan import LayerPlan, Plan
from qdiff.recipe import Recipe
from qdiff.statistics import Statistics

TIMESTEPS = "calibrated_timesteps"


def quantize(model: Model, recipe: Recipe, statistics: Statistics) -> Plan:
    """Quantizes ``model.backbone`` in place and returns the plan.

    Raises:
        InputError: a pattern or method of the recipe that does not exist, NaN in a weight, statistics of another model, or
            a recipe that would quantize nothing.
    """
    backbone = model.backbone
    layers = {name: module for name, module in backbone.named_modules() if type(module) is nn.Linear}
    ignored = recipe.ignored(model.family.name, list(layers))
    with_output = recipe.with_output(model.family.name, list(layers))
    group_of = {name: group for group, entry in statistics.inputs.items() for name in entry.layers}
    unknown = [name for name in layers if name not in group_of]
    if unknown or len(group_of) != len(layers):
        raise InputError(
            f"the statistics are of another model: {len(group_of)} layers there, {len(layers)} here",
            "calibrate this model: qdiff calibrate … --force",
        )
    if set(layers) <= set(ignored):
        raise InputError(f"recipe {recipe.name!r} ignores every layer", "nothing would be quantized; change ignore")

    clock = TimestepClock()
    install_clock(backbone, clock, torch.tensor(statistics.timesteps))
    planned: dict[str, LayerPlan] = {}
    with Progress("quantize", len(layers)) as progress:
        for group, entry in statistics.inputs.items():
            members = [name for name in entry.layers if name not in ignored]
            if members:
                planned |= _quantize_group(backbone, group, members, layers, recipe, statistics, clock, with_output)
            for name in entry.layers:
                if name in ignored:
                    planned[name] = _keep(backbone, name, layers[name], recipe, ignored[name])
                del layers[name]
            progress.advance(len(entry.layers))
    _round_kept(backbone, recipe.kept)

    order = [name for name, module in backbone.named_modules() if isinstance(module, QuantLinear | HalfLinear)]
    return Plan(
        family=model.family.name,
        weights=model.weights,
        fingerprint=model.fingerprint,
        recipe=recipe.name,
        config=json.loads(backbone.to_json_string()),  # type: ignore[operator]
        backbone_class=type(backbone).__name__,
        timesteps=statistics.timesteps,
        kept=recipe.kept,
        layers=[planned[name] for name in order],
    )


def _quantize_group(
    backbone: nn.Module,
    group: str,
    members: list[str],
    layers: dict[str, nn.Linear],
    recipe: Recipe,
    statistics: Statistics,
    clock: TimestepClock,
    with_output: Mapping[str, str],
) -> dict[str, LayerPlan]:
    weights = []
    for name in members:
        numerics.require_finite(layers[name].weight.detach(), f"the weight of {name}")
        weights.append(layers[name].weight.detach().float())
    problem = Problem(
        members,
        weights,
        statistics.inputs[group],
        format_named(recipe.scheme.weights),
        format_named(recipe.scheme.activations),
    )
    solution = Solution()
    for method, options in recipe.methods.items():
        solution = apply_method(method, options or {}, problem, solution)
    errors = problem.errors(solution, held_out=True)
    scale, stretch = problem.activation_scale(solution)
    planned = {}
    kept = getattr(torch, recipe.kept)
    for name, (codes, weight_scale), error in zip(members, problem.quantized_weights(solution), errors, strict=True):
        linear = layers[name]
        plan = LayerPlan(
            name=name,
            kind="Linear",
            shape=(linear.out_features, linear.in_features),
            bias=linear.bias is not None,
            weights=recipe.scheme.weights,
            activations=recipe.scheme.activations,
            output=recipe.scheme.activations if name in with_output else None,
            group=group,
            smoothing=solution.strength,
            clip=solution.clip,
            timestep_scales=solution.timestep_scales,
            methods=list(solution.methods),
            why="; ".join(
                [
                    *solution.notes,
                    *([f"output {recipe.scheme.activations} where the target runs it"] if name in with_output else []),
                ]
            ),
            sqnr_db=round(-10 * torch.tensor(max(error, 1e-30)).log10().item(), 3),
        )
        module = _empty_layer(plan, len(statistics.timesteps), clock)
        module.load_state_dict(
            {
                key: value.clone()  # members of a group get equal values, not one shared tensor
                for key, value in {
                    "codes": codes,
                    "scale": weight_scale,
                    "bias": None if linear.bias is None else linear.bias.detach().to(kept).float(),
                    "input_scale": scale,
                    "multiplier": solution.multiplier,
                    "timestep_scale": stretch,
                    "output_scale": output_scale(statistics.outputs[name], plan),
                }.items()
                if value is not None
            },
            assign=True,
        )
        backbone.set_submodule(name, module)
        planned[name] = plan
    return planned


def output_scale(amax: Tensor, plan: LayerPlan) -> Tensor | None:
    """The constant scale of a layer's output from its ranges by timestep ``[T]``; ``None`` when the output stays float."""
    return None if plan.output is None else numerics.choose_scale(amax.max(), format_named(plan.output))


def _keep(backbone: nn.Module, name: str, linear: nn.Linear, recipe: Recipe, pattern: str) -> LayerPlan:
    plan = LayerPlan(
        name=name,
        kind="Linear",
        shape=(linear.out_features, linear.in_features),
        bias=linear.bias is not None,
        weights=recipe.kept,
        activations=recipe.kept,
        why=f"kept: ignore pattern {pattern!r} of recipe {recipe.name}",
    )
    module = _empty_layer(plan, 0, None)
    state = {"weight": linear.weight.detach().to(getattr(torch, recipe.kept))}
    if linear.bias is not None:
        state["bias"] = linear.bias.detach().to(state["weight"].dtype).float()
    module.load_state_dict(state, assign=True)
    backbone.set_submodule(name, module)
    return plan


def _empty_layer(plan: LayerPlan, timesteps: int, clock: TimestepClock | None) -> nn.Module:
    out_features, in_features = plan.shape
    with torch.device("meta"):
        if not plan.quantized:
            return HalfLinear(in_features, out_features, plan.bias, getattr(torch, plan.weights))
        return QuantLinear(
            in_features,
            out_features,
            plan.bias,
            plan.weights,
            plan.activations,
            smooth=plan.smoothing is not None,
            timesteps=timesteps if plan.timestep_scales else 0,
            clock=clock,
            output_format=plan.output,
        )


def _round_kept(backbone: nn.Module, kept: str) -> None:
    """Rounds the parameters outside linear layers to the storage they get, so that this model equals the loaded one."""
    for parameter in backbone.parameters():
        parameter.data = parameter.data.to(getattr(torch, kept)).float()


def install_clock(backbone: nn.Module, clock: TimestepClock, timesteps: Tensor) -> None:
    """Sets the clock at the start of every forward of the backbone, from the value of its ``timestep`` argument."""
    backbone.register_buffer(TIMESTEPS, timesteps.float())
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]

    def set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        timestep = given["timestep"]
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([float(timestep)])
        clock.set(timestep, getattr(module, TIMESTEPS))

    backbone.register_forward_pre_hook(set_clock, with_kwargs=True)


def save_quantized(backbone: nn.Module, plan: Plan, path: Path) -> None:
    """Writes codes, scales and everything that was kept as one safetensors file, really packed."""
    kept = getattr(torch, plan.kept)
    parameters = dict(backbone.named_parameters())
    tensors = {
        name: tensor.detach().to(kept) if name in parameters else tensor.detach()
        for name, tensor in backbone.state_dict().items()
    }
    save_tensors(path, tensors, {"qdiff": json.dumps({"recipe": plan.recipe, "fingerprint": plan.fingerprint})})


def load_quantized(plan: Plan, path: Path, *, outputs: bool = True) -> nn.Module:
    """Builds the quantized backbone from the plan and the packed tensors; the float weights are not needed.

    Args:
        outputs: ``False`` leaves the quantizers of layers' outputs away, for targets that run what follows in 16 bit.

    Raises:
        InputError: the file is missing.
        IntegrityError: the file is damaged or does not fit the plan.
    """
    import accelerate
    import diffusers

    cls = getattr(diffusers, plan.backbone_class, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise IntegrityError(
            f"the plan names the backbone class {plan.backbone_class!r}, which diffusers does not have"
        )
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            backbone = cls.from_config(plan.config)
    except Exception as error:  # whatever diffusers and torch say about a config that is none
        raise IntegrityError(
            f"the plan's config does not make a {plan.backbone_class}: {str(error)[:200]}",
            "quantize again with --force",
        ) from error
    clock = TimestepClock()
    install_clock(backbone, clock, torch.tensor(plan.timesteps))
    for layer in plan.layers:
        try:
            planned = layer if outputs else layer.model_copy(update={"output": None})
            backbone.set_submodule(layer.name, _empty_layer(planned, len(plan.timesteps), clock), strict=True)
        except AttributeError:
            raise IntegrityError(
                f"the plan names the layer {layer.name!r}, which the model does not have", "quantize again with --force"
            ) from None
    parameters = {name for name, _ in backbone.named_parameters()}
    with open_tensors(path, "the quantized checkpoint") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    state = {
        name: tensor.float() if name in parameters else tensor
        for name, tensor in tensors.items()
        if outputs or not name.endswith(".output_scale")
    }
    try:
        backbone.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise IntegrityError(f"{path} does not fit the plan: {reason[:200]}", "quantize again with --force") from None
    return backbone.eval().requires_grad_(False)
