"""Runs a TensorRT plan on an NVIDIA GPU with torch's CUDA tensors: no copies, no second CUDA library.

Written against TensorRT 10/11 and TensorRT-RTX 1.7; ``tests/engines/test_gpu.py`` is its test and runs only where a GPU is.

The engine has a stream of its own: on the default stream TensorRT adds synchronisation. That stream waits for the work
that made the inputs, and the caller's stream waits for the output, so torch's usual ordering holds for the caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qdiff.engines import signing
from qdiff.engines.base import Profile, Runner, Shape
from qdiff.engines.inputs import Copies, TensorSpec, conform
from qdiff.engines.trt_build import make_logger
from qdiff.errors import InputError, IntegrityError, MemoryExhaustedError, option

if TYPE_CHECKING:
    import tensorrt
    from torch import Tensor

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Return the index of the first profile that takes these shapes; among several, the one whose usual shape they are.

    Raises:
        InputError: no profile takes them (the message lists the ranges).
    """
    if not profiles:
        return 0
    fitting = []
    for index, profile in enumerate(profiles):
        ranges = {name: profile.ranges[name] for name in shapes if name in profile.ranges}
        if all(_between(low, shapes[name], high) for name, (low, _, high) in ranges.items()):
            if all(shapes[name] == usual for name, (_, usual, _) in ranges.items()):
                return index
            fitting.append(index)
    if fitting:
        return fitting[0]
    known = "; ".join(
        f"{p.name}: " + ", ".join(f"{n} {list(r[0])}..{list(r[2])}" for n, r in p.ranges.items()) for p in profiles
    )
    given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise InputError(
        f"no profile of this engine takes {given} (it has {known})",
        f"build with {option('profiles')} that cover this size",
    )


def _between(low: Shape, shape: Shape, high: Shape) -> bool:
    return len(low) == len(shape) and all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))


class TensorRTRunner(Runner):
    """A deserialised plan with one execution context.

    Args:
        trt: the library.
        plan: the file's bytes, already trusted.
        profiles: what it was built with, in order.
        kernels: TensorRT-RTX only: where the kernels compiled on this GPU are kept between runs; ``None``: not kept.
        graphs: TensorRT-RTX only: replay each step as a CUDA graph.
    """

    def __init__(
        self, trt: ModuleType, plan: bytes, profiles: Sequence[Profile], kernels: Path | None, graphs: bool
    ) -> None:
        import torch

        self._trt, self._profiles, self._kernels = trt, tuple(profiles), kernels
        self._logger = make_logger(trt)
        self._runtime = trt.Runtime(self._logger)  # engine_host_code_allowed stays off
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise IntegrityError(
                f"TensorRT cannot load the engine:\n  {self._logger.cause()}",
                f"build it here with {option('force', True)}",
            )
        self._stream = torch.cuda.Stream()
        self._context = self._make_context(graphs)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self.inputs = tuple(self._spec(name) for name in names if modes[name] == trt.TensorIOMode.INPUT)
        self._outputs = [self._spec(name) for name in names if modes[name] == trt.TensorIOMode.OUTPUT]
        self._copies, self._place = Copies(), torch.device("cuda", torch.cuda.current_device())
        self._active = 0  # the context begins with the first profile
        # Numbers that shapes of other tensors follow from are read by the host.
        self._on_host = {spec.name for spec in self.inputs if self._engine.is_shape_inference_io(spec.name)}

    def _make_context(self, graphs: bool) -> tensorrt.IExecutionContext:
        self._cache = None
        if not hasattr(self._trt, "IRuntimeCache"):
            context = self._engine.create_execution_context()
        else:
            config = self._engine.create_runtime_config()
            if graphs:
                config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._kernels is not None:
                self._cache = config.create_runtime_cache()
                stored = signing.unseal(self._kernels, self._kernels.parent.name)
                if stored is not None:
                    self._cache.deserialize(stored)
                config.set_runtime_cache(self._cache)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise MemoryExhaustedError(
                f"the engine does not fit on the GPU:\n  {self._logger.cause()}", "use a smaller profile"
            )
        return context

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise InputError(f"the engine's tensor {name!r} is {kind}", f"export with one of {', '.join(_DTYPES)}")
        shape = tuple(None if size == -1 else size for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, _DTYPES[kind], shape)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch

        home = next(iter(inputs.values())).device
        tensors = {
            name: tensor.cpu()
            if name in self._on_host
            else self._copies.of(inputs[name], tensor, self._place, name in self.lasting)
            for name, tensor in conform(inputs, self.inputs).items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        index = choose_profile(self._profiles, shapes)
        caller = torch.cuda.current_stream()
        self._stream.wait_stream(caller)
        with torch.cuda.stream(self._stream):
            if index != self._active:
                self._context.set_optimization_profile_async(index, self._stream.cuda_stream)
                self._active = index
            for name, tensor in tensors.items():
                self._context.set_input_shape(name, tensor.shape)
                self._context.set_tensor_address(name, tensor.data_ptr())
                if tensor.is_cuda:
                    tensor.record_stream(self._stream)  # its memory is not given away while the engine reads it
            unknown = self._context.infer_shapes()
            if unknown:
                raise InputError(f"TensorRT lacks the values or shapes of {', '.join(unknown)}", "give all inputs")
            results = []
            for output in self._outputs:
                shape = tuple(self._context.get_tensor_shape(output.name))
                results.append(torch.empty(shape, dtype=getattr(torch, output.dtype), device="cuda"))
                self._context.set_tensor_address(output.name, results[-1].data_ptr())
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise InputError(f"TensorRT did not run the engine for {shapes}:\n  {self._logger.cause()}")
            for result in results:
                result.record_stream(caller)
        caller.wait_stream(self._stream)
        return [result.to(home, torch.float32) for result in results]

    def close(self) -> None:
        if self._engine is None:
            return
        self._stream.synchronize()
        if self._cache is not None and self._kernels is not None:
            signing.seal(self._kernels, bytes(memoryview(self._cache.serialize())), self._kernels.parent.name)
        self._copies.clear()
        self._context = self._engine = self._runtime = self._cache = None
