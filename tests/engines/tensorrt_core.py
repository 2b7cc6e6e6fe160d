"""A thin stand-in for TensorRT's core, so that the Python files of its bindings run without its library.

``tensorrt_bindings/plugin/*.py`` is NVIDIA's; its classes derive from and call what is in a shared library that needs libnvinfer.
Here are classes of those names with the members that the files touch. Dimension expressions are kept as functions and evaluated
for given sizes. By its name it is not collected.
"""

from __future__ import annotations

import enum
import operator
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64, INT4 = range(10)


class TensorFormat(enum.IntEnum):
    LINEAR, HWC = 0, 8


PluginFieldType = enum.IntEnum(
    "PluginFieldType", "INT8 INT16 INT32 INT64 FLOAT16 FLOAT32 FLOAT64 CHAR UNKNOWN", start=0
)
DimensionOperation = enum.IntEnum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV", start=0)
QuickPluginCreationRequest = enum.IntEnum(
    "QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT", start=0
)
TensorRTPhase = enum.IntEnum("TensorRTPhase", "BUILD RUNTIME", start=0)
PluginArgType = enum.IntEnum("PluginArgType", "INT", start=0)
PluginArgDataType = enum.IntEnum("PluginArgDataType", "INT8 INT16 INT32", start=0)
_OPERATIONS = {
    DimensionOperation.SUM: operator.add,
    DimensionOperation.PROD: operator.mul,
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
    DimensionOperation.SUB: operator.sub,
    DimensionOperation.EQUAL: operator.eq,
    DimensionOperation.LESS: operator.lt,
    DimensionOperation.FLOOR_DIV: operator.floordiv,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class IDimensionExpr:
    """A size as a function of the named sizes of inputs."""

    def __init__(self, value, constant=False):
        self.value, self.constant = value, constant

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        return self.value({})


class IExprBuilder:
    def constant(self, value):
        return IDimensionExpr(lambda sizes: value, constant=True)

    def operation(self, kind, first, second):
        compute = _OPERATIONS[kind]
        constant = first.constant and second.constant
        return IDimensionExpr(lambda sizes: int(compute(first.value(sizes), second.value(sizes))), constant)

    def size(self, name):
        return IDimensionExpr(lambda sizes: sizes[name])


class _Plain:
    def __init__(self):
        pass


class ISymExpr(_Plain):
    pass


class IPluginV3(_Plain):
    pass


class IPluginV3QuickCore(_Plain):
    pass


class IPluginV3QuickBuild(_Plain):
    pass


class IPluginV3QuickAOTBuild(_Plain):
    pass


class IPluginV3QuickRuntime(_Plain):
    pass


class IPluginCreatorV3Quick(_Plain):
    pass


class ITensor(_Plain):
    pass


class Logger(_Plain):
    WARNING = 2

    def log(self, severity, message):
        pass


class PluginField:
    def __init__(self, name, data=None, type=None):
        self.name, self.data, self.type = name, data, type


class PluginFieldCollection(list):
    pass


class Dims(list):
    MAX_DIMS = 8


class DimsExprs(list):
    def __init__(self, length):
        super().__init__([None] * length)


class PluginTensorDesc:
    def __init__(self, dims=(), type=None, format=TensorFormat.LINEAR):
        self.dims, self.type, self.format, self.scale = Dims(dims), type, format, 1.0


class DynamicPluginTensorDesc:
    def __init__(self, desc):
        self.desc, self.min, self.opt, self.max = desc, desc.dims, desc.dims, desc.dims


class Registry:
    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name, version, namespace):
        return self.creators.get((name, version, namespace))


def install(patch):
    """Puts a ``tensorrt`` made of this and the bindings' own ``plugin`` package into ``sys.modules`` until ``patch`` is undone.

    Returns:
        the module, or ``None`` where the bindings are not installed.
    """
    found = find_spec("tensorrt_bindings")
    if found is None or not found.submodule_search_locations:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] in ("tensorrt", "tensorrt_bindings")]:
        patch.delitem(sys.modules, name)
    core, package = types.ModuleType("tensorrt"), types.ModuleType("tensorrt_bindings")
    core.__dict__.update({name: value for name, value in globals().items() if not name.startswith("_")})
    core.__name__, core.__version__, core.__spec__ = "tensorrt", "stand-in", ModuleSpec("tensorrt", None)
    core.int32, core.float32, core.float16 = DataType.INT32, DataType.FLOAT, DataType.HALF
    registry = Registry()
    core.get_plugin_registry = lambda: registry
    package.__path__ = list(found.submodule_search_locations)
    patch.setitem(sys.modules, "tensorrt", core)
    patch.setitem(sys.modules, "tensorrt_bindings", package)
    return core


def uninstall():
    """Forgets the bindings' files that were imported meanwhile."""
    for name in [name for name in sys.modules if name.startswith("tensorrt_bindings.")]:
        del sys.modules[name]
