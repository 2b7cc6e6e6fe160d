"""A GPU that is not there: tensors that say they are on another device and compute in host memory.

Every operator is looked at before it runs: one that mixes them with tensors of the host, or draws them from a generator of the
host, fails as it would on a GPU. It needs no GPU, so that a forgotten ``device=`` is found where there is none.
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

NAME = "elsewhere"
_MOVES = ("aten::to", "aten::_to_copy", "aten::copy_", "aten::detach", "aten::_has_compatible_shallow_copy_type")
_INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # indices may be the host's
_TAKES_LISTS = "qdiff::sparse_attention"  # block lists stay in host memory
_SCALARS = ("aten::_local_scalar_dense", "aten::equal")
_tensor = torch.tensor


class Far(Tensor):
    """A tensor of that device. ``near`` is where its numbers are."""

    near: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device(),
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __getitem__(self, place: Any) -> Tensor:
        return Tensor.__getitem__(self, _tensor(place).to(device()) if isinstance(place, list) else place)

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return _tensor(data, dtype=options.get("dtype", self.dtype)).to(device())

    def tolist(self) -> Any:
        return self.near.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError(f"a tensor on {NAME} has no numpy(): move it to the host first")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"{NAME}({self.near!r})"

    def __format__(self, spec: str) -> str:
        return format(self.near, spec)


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@functools.cache
def device() -> torch.device:
    """The device that is not there."""
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
    """For the length of a block every operator is looked at, and qdiff computes there."""
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


def _is_far(where: Any) -> bool:
    return torch.device(where).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, tensors = func._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    where = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if not far and where is None:
        return func(*args, **kwargs)
    result_is_far = bool(far) if where is None else _is_far(where)
    _check(name, args, kwargs, tensors, far, result_is_far)
    if name == "aten::copy_":
        (args[0].near if isinstance(args[0], Far) else args[0]).copy_(
            args[1].near if isinstance(args[1], Far) else args[1]
        )
        return args[0]
    args, kwargs = tree_map_only(Far, lambda x: x.near, (args, kwargs))
    if result_is_far:
        args, kwargs = tree_map_only(torch.device, lambda x: torch.device("cpu"), (args, kwargs))
    result = func(*args, **kwargs)
    if name in _SCALARS or not result_is_far:
        return result
    written = [
        place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if written and isinstance(result, Tensor):
        return far[0] if written[0] >= len(args) else next(x for x in far if x.near is args[written[0]])
    return tree_map_only(Tensor, lambda x: x if isinstance(x, Far) else Far(x), result)


def _check(
    name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor], far: list[Far], result_is_far: bool
) -> None:
    generator = kwargs.get("generator")
    if result_is_far and generator is not None:
        raise RuntimeError(f"{name}: a generator of the host cannot draw on {NAME}")
    if not far or name in _MOVES or name == _TAKES_LISTS:
        return
    near = [x for x in tensors if x.dim() and not isinstance(x, Far)]
    if name in _INDEXES:
        near = [x for x in near if x is args[0]]
    if near:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {NAME} and cpu")
