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

from qdiff import device
from qdiff.errors import InputError, IntegrityError, option
from qdiff.files import open_tensors, save_tensors
from qdiff.formats.scales import to_storage
from qdiff.nn.conv import Window
from qdiff.nn.quant_linear import KeptConv2d, KeptLinear, QuantConv2d, QuantLinear, TimestepIndex
from qdiff.nn.rotations import hadamard
from qdiff.nn.surgery import restructure
from qdiff.plan.plan import LayerPlan, Plan, StorageDtype
from qdiff.plan.renamed import buffer_name
from qdiff.quantization.quantized_layer import config_of
from qdiff.routing.blocks import install_branches

TIMESTEPS = "calibrated_timesteps"
TIMESTEP = "timestep"  # argument of a backbone's forward


def empty_layer(
    plan: LayerPlan,
    timesteps: int,
    timestep_index: TimestepIndex | None,
    storage_dtype: StorageDtype,
    replaced: nn.Module,
) -> nn.Module:
    """Return the layer that ``plan`` describes, without numbers (its buffers are on the meta device).

    Args:
        plan: of the layer.
        timesteps: number of the calibrated ones.
        timestep_index: that its per-timestep scales are looked up by; ``None``: it has none.
        storage_dtype: of its float tensors.
        replaced: the layer whose place it takes; a convolution's geometry is read from it.

    Raises:
        IntegrityError: it takes the place of another kind of layer.
    """
    out_features, in_features = plan.matrix
    window = _window(plan, replaced)
    with torch.device("meta"):
        if not plan.quantized:
            storage = getattr(torch, plan.weights)
            if window is None:
                return KeptLinear(in_features, out_features, plan.bias, storage)
            return KeptConv2d((out_features, plan.shape[1], *window.kernel), window, plan.bias, storage)
        config = config_of(plan, timesteps, storage_dtype, window)
        return QuantLinear(config, timestep_index) if window is None else QuantConv2d(config, timestep_index)


def _window(plan: LayerPlan, replaced: nn.Module) -> Window | None:
    if plan.kind == "Linear":
        return None
    if isinstance(replaced, nn.Conv2d):
        window = Window.of(replaced)
    elif isinstance(replaced, QuantConv2d | KeptConv2d):
        window = replaced.window
    else:
        raise IntegrityError(
            f"the plan calls layer {plan.name} a convolution, the model has a {type(replaced).__name__}",
            f"quantize again with {option('force', True)}",
        )
    if tuple(plan.shape[2:]) != window.kernel:
        raise IntegrityError(
            f"the plan gives layer {plan.name} the shape {list(plan.shape)}, its kernel is {window.kernel}"
        )
    return window


def install_timestep_index(backbone: nn.Module, timestep_index: TimestepIndex, timesteps: Tensor) -> None:
    """Set the timestep index at the start of every forward of the backbone, from the value of its ``timestep``
    argument.
    """
    backbone.register_buffer(TIMESTEPS, timesteps.float().to(device.of(backbone)))
    names = list(inspect.signature(type(backbone).forward).parameters)[1:]
    if TIMESTEP not in names:  # a module that has one timestep
        timestep_index.set(timesteps[:1], timesteps)
        return

    def set_timestep_index(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        timestep = given.get(TIMESTEP)
        if timestep is None:
            timestep = timesteps[0]
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([float(timestep)])
        timestep_index.set(timestep, getattr(module, TIMESTEPS))

    backbone.register_forward_pre_hook(set_timestep_index, with_kwargs=True)


def save_quantized(backbone: nn.Module, plan: Plan, path: Path) -> None:
    """Write codes, scales and everything that was kept as one safetensors file, really packed. Hadamard matrices are
    left out: their size says all.
    """
    parameters, known = dict(backbone.named_parameters()), set(_hadamards(plan))
    tensors = {
        name: to_storage(tensor.detach(), plan.storage_dtype) if name in parameters else tensor.detach()
        for name, tensor in backbone.state_dict().items()
        if name not in known
    }
    save_tensors(path, tensors, {"qdiff": json.dumps({"recipe": plan.recipe, "fingerprint": plan.fingerprint})})


def _hadamards(plan: Plan) -> dict[str, int]:
    """Return names of the Hadamard matrices of a plan's layers, and their sizes."""
    return {f"{layer.name}.rotation": layer.rotation for layer in plan.layers if layer.rotation}


def load_quantized(plan: Plan, path: Path, *, outputs: bool = True) -> nn.Module:
    """Build the quantized backbone from the plan and the packed tensors; the float weights are not needed. The masks of
    sparse attention are read from beside ``path``.

    Args:
        plan: of the model.
        path: of the checkpoint.
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
            f"quantize again with {option('force', True)}",
        ) from error
    timestep_index = TimestepIndex()
    install_timestep_index(backbone, timestep_index, torch.tensor(plan.timesteps))
    try:
        restructure(backbone, plan.structure)
        if plan.structure.branches:
            install_branches(backbone, plan.structure.branches)
    except InputError as error:
        raise IntegrityError(
            f"the plan does not fit its model: {error.message}", f"quantize again with {option('force', True)}"
        ) from None
    for layer in plan.layers:
        try:
            planned = layer if outputs else layer.model_copy(update={"output": None})
            replaced = backbone.get_submodule(layer.name)
            made = empty_layer(planned, len(plan.timesteps), timestep_index, plan.storage_dtype, replaced)
            backbone.set_submodule(layer.name, made, strict=True)
        except AttributeError:
            raise IntegrityError(
                f"the plan names the layer {layer.name!r}, which the model does not have",
                f"quantize again with {option('force', True)}",
            ) from None
    parameters = {name for name, _ in backbone.named_parameters()}
    with open_tensors(path, "the quantized checkpoint") as file:
        tensors = {buffer_name(name): file.get_tensor(name) for name in file.keys()}
    state = {
        name: tensor.float() if name in parameters else tensor
        for name, tensor in tensors.items()
        if outputs or not name.endswith(".output_scale")
    }
    state |= {name: hadamard(size) for name, size in _hadamards(plan).items()}
    try:
        backbone.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise IntegrityError(
            f"{path} does not fit the plan: {reason[:200]}", f"quantize again with {option('force', True)}"
        ) from None
    if plan.attention is not None:
        from qdiff.attention.sparse import install, load_schedule
        from qdiff.models import FAMILIES

        install(FAMILIES[plan.family], backbone, plan.attention, load_schedule(plan.attention, path.parent))
    if plan.routing is not None:
        from qdiff.models import FAMILIES
        from qdiff.routing.follow import follow

        follow(FAMILIES[plan.family], backbone, plan.routing)
    return backbone.eval().requires_grad_(False)
