"""The quantized checkpoint: a backbone whose layers are packed, written to one safetensors file and built again from it.

The plan says what every layer is, the file holds its numbers; the float weights are not needed to come back.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.errors import IntegrityError
from qdiff.files import open_tensors, save_tensors
from qdiff.layers import HalfLinear, LinearForm, QuantLinear, TimestepClock
from qdiff.plan import Kept, LayerPlan, Plan

TIMESTEPS = "calibrated_timesteps"


def empty_layer(plan: LayerPlan, timesteps: int, clock: TimestepClock | None, kept: Kept) -> nn.Module:
    """The layer that ``plan`` describes, without numbers (its buffers are on the meta device)."""
    out_features, in_features = plan.shape
    with torch.device("meta"):
        if not plan.quantized:
            return HalfLinear(in_features, out_features, plan.bias, getattr(torch, plan.weights))
        form = LinearForm(
            in_features,
            out_features,
            plan.bias or plan.bias_correction,
            plan.weights,
            plan.activations,
            by_token=plan.by_token,
            smooth=plan.multiplier,
            shift=plan.shift,
            rotation=plan.rotation,
            outliers=plan.outliers,
            rank=plan.rank,
            timesteps=timesteps if plan.timestep_scales else 0,
            output=plan.output,
            kept=kept,
        )
        return QuantLinear(form, clock)


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
            backbone.set_submodule(layer.name, empty_layer(planned, len(plan.timesteps), clock, plan.kept), strict=True)
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
