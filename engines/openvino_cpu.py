"""OpenVINO: the fast engine on a CPU. It takes the same S8S8 Q/DQ graph as ONNX Runtime and TensorRT.

Measured on a 20 M-parameter PixArt (32x32 latents, batch 2, one core of an AMD EPYC, INT8; OpenVINO 2026.4), which decided:

- **The file is IR, not a compiled blob.** IR keeps INT8 constants (21 MB, as the ONNX file), reads in 0.1 s and compiles in
  1.9 s; a blob (23 MB more) imports in 0.4 s, but fits one CPU type, one version and one shape. ``compress_to_fp16`` stays off:
  it rounds float weights.
- **One compiled variant per seen shape.** 37.8 ms static, 41.5 ms dynamic, and 12 % more where dynamic shapes alternate.
  Each variant repacks the weights (117 MB resident for those 21 MB), so only the last :data:`VARIANTS` are kept.
  ``shapes=dynamic`` compiles once for all shapes: right for a server with many sizes.

- **What is not quantized runs in BF16 where the CPU has it** (``precision=auto``). The plan keeps those parts in 16 bit anyway.
  It is 12 % faster on a 67 M-parameter INT8 PixArt whose q kᵀ is INT8, and costs the bundled PixArt 1.2 dB of 49
  (docs/log). ``precision=f32`` gives the plan's exact numbers. Formats that OpenVINO has no kernels for (FP8, NVFP4 and MX
  activations, scales per token) are arithmetic in the graph, and 16 bit would round their very scales: those run in float32.

Without VNNI its INT8 products overflow now and then (:mod:`qdiff.engines.integer_products`): the bundled PixArt has 43.6 dB
instead of 52.5 then (docs/log). There they run in float, unless ``integers=on`` asks for them, and ONNX Runtime is the
default engine: 1.6 times as fast as float, OpenVINO 1.1 times.

Two defaults of the library change the numbers without a word, so they are always set:

- where only weights are quantized, activations are rounded to INT8 at run time in groups of 32 (error 0.02 instead of 0.0
  on a unit MatMul): ``dynamic_quantization=on`` asks for it.
- with a static shape and a single thread, two INT8 layers in a row (at most 256 wide, at most 2 rows: a timestep embedding!)
  are fused into a "snippet" that returns numbers near 1e9. So snippets are off there (40.9 ms), and only there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qdiff.engines import integer_products
from qdiff.engines.base import ENGINES, BuildFacts, BuildOptions, Runner
from qdiff.engines.graph import external_files, inlined, multiplies_integers, simulates
from qdiff.engines.inputs import TensorSpec, conform
from qdiff.engines.integer_products import IntegerEngine
from qdiff.errors import InputError, IntegrityError, option
from qdiff.events import log
from qdiff.plan.attention_plan import BLOCKS, BOUNDS

if TYPE_CHECKING:
    import openvino
    from torch import Tensor

    Settings = dict[str, str | int]

VARIANTS = 2
IN_FLOAT = (
    "openvino: on this processor products of INT8 are added in 16 bits, which overflow now and then, so they are computed in "
    "float: the plan's pictures, but not its speed. %s takes the overflow"
)
_SIMULATED = ("qdiff", "simulated_quantizers")  # a note in the IR, see OpenVinoEngine._precision
_DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32", "boolean": "bool"}


def _specs(model: openvino.Model) -> tuple[TensorSpec, ...]:
    specs = []
    for port in model.inputs:
        name, kind = port.get_any_name(), port.get_element_type().get_type_name()
        if kind not in _DTYPES:
            raise InputError(f"the graph's input {name!r} is a {kind}", f"export with one of {', '.join(_DTYPES)}")
        shape = tuple(None if size.is_dynamic else size.get_length() for size in port.get_partial_shape())
        specs.append(TensorSpec(name, _DTYPES[kind], shape))
    return tuple(specs)


def _threads(library: ModuleType, core: openvino.Core, settings: Settings) -> int:
    """Return how many threads OpenVINO would take: it counts cores, affinity and hints, and tells only a compiled
    model.
    """
    operators = library.opset13
    parameter = operators.parameter([1], library.Type.f32)
    model = library.Model([operators.relu(parameter)], [parameter])
    return int(core.compile_model(model, "CPU", dict(settings)).get_property("INFERENCE_NUM_THREADS"))


def _fold_codes(library: ModuleType, model: openvino.Model) -> None:
    """Put INT8 constants in the place of what computes them from constants: codes of 6 bits that the graph unpacks.
    OpenVINO looks for constants when it chooses integer kernels, and would take the whole way to a float weight
    together.
    """
    fixed: set[str] = set()  # names of what follows from constants alone
    for op in model.get_ordered_ops():
        if op.get_type_name() == "If":  # branches of routed blocks
            for branch in range(2):
                _fold_codes(library, op.get_function(branch))
        sources = [port.get_source_output().get_node().get_name() for port in op.inputs()]
        if op.get_type_name() == "Constant" or (sources and fixed.issuperset(sources)):
            fixed.add(op.get_name())
            if not sources or op.get_output_size() > 1 or op.get_output_element_type(0) != library.Type.i8:
                continue
            values = library.compile_model(library.Model([op.output(0)], []), "CPU")([])[0]
            made = library.opset13.constant(values.copy(), dtype=library.Type.i8)
            made.set_friendly_name(op.get_friendly_name())
            for port in op.output(0).get_target_inputs():
                port.replace_source_output(made.output(0))
            fixed.add(made.get_name())


def _name_by_place(model: openvino.Model, prefix: str = "") -> None:
    """Name operations that the graph names not by their place in it. OpenVINO would number them by what the process has
    made before, so the file of one graph would have another hash in every process.
    """
    for place, op in enumerate(model.get_ordered_ops()):
        if op.get_friendly_name() == op.get_name():
            op.set_friendly_name(f"{prefix}{op.get_type_name()}.{place}")
        if op.get_type_name() == "If":
            for branch in range(2):
                _name_by_place(op.get_function(branch), f"{prefix}{place}.{branch}.")


class OpenVinoRunner(Runner):
    """The model and its compiled variants.

    Args:
        read: gives a fresh, uncompiled model at every call (reshaping changes the model itself).
        compile_model: compiles one.
        static: one variant per shape; else one dynamic variant for all. Lists of sparse attention stay dynamic either way: they
            change from step to step.
    """

    def __init__(
        self,
        read: Callable[[], openvino.Model],
        compile_model: Callable[[openvino.Model], openvino.CompiledModel],
        static: bool,
    ) -> None:
        self._read, self._compile = read, compile_model
        self.inputs = _specs(read())
        dynamic = [spec.name for spec in self.inputs if None in spec.shape]
        self._fixed = [name for name in dynamic if name not in (BLOCKS, BOUNDS)]
        self._static = static and bool(dynamic)
        self._variants: OrderedDict[tuple[tuple[int, ...], ...], tuple[openvino.InferRequest, dict[str, Tensor]]] = (
            OrderedDict()
        )

    def prepare(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[openvino.InferRequest, dict[str, Tensor]]:
        """Compile the variant for these input shapes unless it is there; return its inference request, and the lasting
        tensors that it holds.
        """
        key = tuple(tuple(shapes[name]) for name in self._fixed) if self._static else ()
        if key not in self._variants:
            while len(self._variants) >= VARIANTS:
                self._variants.popitem(last=False)
            model = self._read()
            if self._static:
                model.reshape({name: list(shapes[name]) for name in self._fixed})
            self._variants[key] = self._compile(model).create_infer_request(), {}
        self._variants.move_to_end(key)
        return self._variants[key]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        import torch

        tensors = conform(inputs, self.inputs)
        home = next(iter(tensors.values())).device
        try:
            request, held = self.prepare({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        except RuntimeError as error:
            shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
            raise InputError(
                f"the graph does not take the shapes {shapes}: {error}", "export for these sizes"
            ) from error
        new = [name for name in tensors if name not in held or held[name] is not inputs[name]]
        feed = {name: tensors[name].cpu().numpy() for name in new}
        # a shared buffer has to live as long as the request may read it, so what is lasting is kept
        held.update({name: inputs[name] for name in new if name in self.lasting})
        results = request.infer(feed, share_inputs=True)  # outputs are copied: the request's own buffer is used again
        return [torch.from_numpy(results[index]).to(home, torch.float32) for index in range(len(results))]

    def close(self) -> None:
        self._variants.clear()


@ENGINES.register("openvino")
class OpenVinoEngine(IntegerEngine):
    """OpenVINO on the CPU."""

    name = "openvino"
    title = "OpenVINO (CPU)"
    target = "onnxruntime"
    extra = "cpu"
    library = "openvino"
    overflow = "INT8 products overflow on this processor: they are computed in float"
    known_flags = {
        "precision": ("auto", "f32", "bf16", "f16"),
        "shapes": ("static", "dynamic"),
        "dynamic_quantization": ("off", "on"),
        "integers": ("auto", "on", "off"),  # off: what is quantized to INT8 is multiplied in float
    }

    @property
    def rank(self) -> int:
        """Return a place before ONNX Runtime; behind it where products overflow and are computed in float, which is
        slower.
        """
        return 20 if self.missing() is not None or integer_products.exact(self.library) else 5

    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> BuildFacts:
        library = self.backend()
        external_files(onnx)  # links and names that lead elsewhere are refused before the backend follows them
        try:
            with inlined(onnx) as graph:
                model = library.Core().read_model(str(graph))
                _fold_codes(library, model)
                model.set_rt_info("yes" if simulates(onnx) else "no", list(_SIMULATED))
                if self._integers(options) == "off" and multiplies_integers(onnx):
                    log.warning(IN_FLOAT, option("flags", {"integers": "on"}))
                _name_by_place(model)
                library.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)
            if not options.profiles:
                library.Core().compile_model(model, "CPU")
            runner = self.load(folder, options)
            if options.profiles:  # what cannot run fails now
                names = {spec.name for spec in runner.inputs}
                usual = {name: shapes[1] for name, shapes in options.profiles[0].ranges.items() if name in names}
                runner.prepare(usual)
        except RuntimeError as error:
            raise InputError(f"OpenVINO refuses {onnx}: {error}", "export again for target onnxruntime") from error
        runner.close()
        return {
            "bytes": sum(path.stat().st_size for path in folder.iterdir()),
            "inputs": [str(spec) for spec in runner.inputs],
            "operations": len(model.get_ops()),
            "precision": self._precision(library.Core(), model, options),
        }

    def load(self, folder: Path, options: BuildOptions) -> OpenVinoRunner:
        library = self.backend()
        core = library.Core()
        path = folder / "model.xml"
        if not path.is_file():
            raise IntegrityError(
                f"there is no model.xml in {folder}", f"build the engine anew with {option('force', True)}"
            )
        settings: Settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self._precision(core, core.read_model(str(path)), options),
        }
        if options.threads:
            settings["INFERENCE_NUM_THREADS"] = options.threads
        if self.flag(options, "dynamic_quantization") == "off":
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if self._integers(options) == "off":
            settings["LP_TRANSFORMS_MODE"] = "NO"  # with snippets: without them attention then loses 5 dB
        elif _threads(library, core, settings) == 1:
            settings["SNIPPETS_MODE"] = "DISABLE"
        runner = OpenVinoRunner(
            lambda: core.read_model(str(path)),
            lambda model: core.compile_model(model, "CPU", settings),
            self.flag(options, "shapes") == "static",
        )
        return runner

    def _integers(self, options: BuildOptions) -> str:
        return self._by_processor(options, "integers", where_exact="on", where_not="off")

    def _precision(self, core: openvino.Core, model: openvino.Model, options: BuildOptions) -> str:
        """Return what runs unquantized layers: the flag, or with ``auto`` the 16-bit type that this CPU computes with,
        unless the model writes quantizers out in float arithmetic.
        """
        asked = self.flag(options, "precision")
        if asked != "auto":
            return asked
        simulated = model.has_rt_info(list(_SIMULATED)) and model.get_rt_info(list(_SIMULATED)).astype(str) == "yes"
        return "bf16" if not simulated and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
