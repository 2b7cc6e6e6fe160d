"""Provide a fake device: its tensors report a device of their own and compute in host memory.

Each operator is checked before it runs. One that mixes tensors of the device with tensors of the host, or draws them from a
generator of the host, fails as it would on a GPU. So a forgotten ``device=`` is found on a machine without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "fake_device"
_MOVES = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::detach", "aten::_has_compatible_shallow_copy_type")
_INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # indices may be the host's
_TAKES_LISTS = "qdiff::sparse_attention"  # block lists stay in host memory
_SCALARS = ("aten::_local_scalar_dense", "aten::equal")
_tensor = torch.tensor


class DeviceTensor(Tensor):
    """A tensor of the fake device. ``host`` is the tensor of the host that has its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=device(),
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __getitem__(self, place: Any) -> Tensor:
        return Tensor.__getitem__(self, _tensor(place).to(device()) if isinstance(place, list) else place)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return _tensor(data, dtype=options.get("dtype", self.dtype)).to(device())

    def tolist(self) -> Any:
        return self.host.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} has no numpy(): move it to the host first")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"{NAME}({self.host!r})"

    def __format__(self, spec: str) -> str:
        return format(self.host, spec)


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@functools.cache
def device() -> torch.device:
    """Return the fake device; the first call registers it with torch."""
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

    class Backend(_DummyBackendModule):
        def get_rng_state(self, device: Any) -> None:
            return None

        def set_rng_state(self, state: None, device: Any) -> None:
            return None

    _setup_privateuseone_for_python_backend(NAME, Backend())
    return torch.device(NAME, 0)


@contextlib.contextmanager
def watched(monkeypatch: Any) -> Iterator[torch.device]:
    """Check every operator in the block, let qdiff compute on the fake device, and give that device."""
    import qdiff.device
    from qdiff.models import loading

    load, usual = loading.load, (torch.tensor, torch.inference_mode)

    def loaded(*args: Any, **options: Any) -> Any:  # by the libraries' own ways, in host memory
        with _disable_current_modes(), monkeypatch.context() as own:
            own.setattr(torch, "tensor", usual[0])
            own.setattr(torch, "inference_mode", usual[1])
            return load(*args, **options)

    monkeypatch.setattr(loading, "load", loaded)
    monkeypatch.setattr(torch, "tensor", _made)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)  # inference tensors cannot be wrapped
    monkeypatch.setattr(qdiff.device, "chosen", device)
    with _Watch():
        yield device()


def _made(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    made = _tensor(data, **options)
    return made if device is None else made.to(device)


def _is_on_device(where: Any) -> bool:
    return torch.device(where).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = [x for x in tensors if isinstance(x, DeviceTensor)]
    where = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if not on_device and where is None:
        return func(*args, **kwargs)
    result_on_device = bool(on_device) if where is None else _is_on_device(where)
    _check(name, args, kwargs, tensors, on_device, result_on_device)
    if name == "aten::copy_":
        (args[0].host if isinstance(args[0], DeviceTensor) else args[0]).copy_(
            args[1].host if isinstance(args[1], DeviceTensor) else args[1]
        )
        return args[0]
    args, kwargs = tree_map_only(DeviceTensor, lambda x: x.host, (args, kwargs))
    if result_on_device:
        args, kwargs = tree_map_only(torch.device, lambda x: torch.device("cpu"), (args, kwargs))
    result = func(*args, **kwargs)
    if name in _SCALARS or not result_on_device:
        return result
    written = [
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written and isinstance(result, Tensor):
        return on_device[0] if written[0] >= len(args) else next(x for x in on_device if x.host is args[written[0]])
    return tree_map_only(Tensor, lambda x: x if isinstance(x, DeviceTensor) else DeviceTensor(x), result)


def _check(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    tensors: list[Tensor],
    on_device: list[DeviceTensor],
    result_on_device: bool,
) -> None:
    generator = kwargs.get("generator")
    if result_on_device and generator is not None:
        raise RuntimeError(f"{name}: a generator of the host cannot draw on {NAME}")
    if not on_device or name in _MOVES or name == _TAKES_LISTS:
        return
    on_host = [x for x in tensors if x.dim() and not isinstance(x, DeviceTensor)]
    if name in _INDEXES:
        on_host = [x for x in on_host if x is args[0]]
    if on_host:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME} and cpu")
