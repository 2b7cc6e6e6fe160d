"""The text of an ONNX local function: its lines in ONNX's textual syntax, and what goes around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdiff.attention.nodes import DOMAIN as DOMAIN

OPSET = 23


class Body:
    """Lines of a function in ONNX's textual syntax; every call gives the name of a new value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._constants: dict[str, str] = {}

    def do(self, call: str) -> str:
        """Write one expression and return the name of its result: ``do("Mul(a, b)")`` gives the name of the product."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call}")
        return name

    def call(self, name: str, inputs: str, outputs: int, attributes: Mapping[str, str | int]) -> list[str]:
        """Write a call of another function of the domain, which has to declare the attributes, and return the names of
        its results.
        """
        names = [f"v{len(self.lines)}_{place}" for place in range(outputs)]
        given = ", ".join(
            f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}" for key, value in attributes.items()
        )
        self.lines.append(f"{', '.join(names)} = {DOMAIN}.{name} <{given}> ({inputs})")
        return names

    def number(self, value: float) -> str:
        """Return a float32 constant."""
        return self._constant(f"Constant<value = float {{{value!r}}}>()")

    def integers(self, *values: int) -> str:
        """Return a 1-D int64 constant."""
        return self._constant(f"Constant<value_ints = [{', '.join(map(str, values))}]>()")

    def small_integers(self, *values: int) -> str:
        """Return a 1-D int32 constant."""
        return self._constant(f"Constant<value = int32[{len(values)}] {{{', '.join(map(str, values))}}}>()")

    def table(self, values: tuple[float, ...]) -> str:
        """Return a 1-D float32 constant."""
        return self._constant(f"Constant<value = float[{len(values)}] {{{', '.join(map(repr, values))}}}>()")

    def _constant(self, call: str) -> str:
        if call not in self._constants:
            self._constants[call] = self.do(call)
        return self._constants[call]

    def clip(self, value: str, low: float, high: float) -> str:
        """Write a clip of ``value`` to the range between two numbers, and return the name of the result."""
        return self.do(f"Clip({value}, {self.number(low)}, {self.number(high)})")

    def cast(self, value: str, dtype: int) -> str:
        """Write a cast of ``value`` to an element type, by its number in ``onnx.TensorProto``, and return the name of
        the result.
        """
        return self.do(f"Cast<to = {dtype}>({value})")


@dataclass(frozen=True)
class Function:
    """Names of inputs and outputs, the lines between, and names of attributes that a call may have, which no line reads."""

    inputs: str
    outputs: str
    body: Body
    attributes: tuple[str, ...] = ()

    def text(self, name: str) -> str:
        """Return the whole function, called ``name``."""
        own = f', "{DOMAIN}" : 1' if any(f" {DOMAIN}." in line for line in self.body.lines) else ""
        declared = f" <{', '.join(self.attributes)}>" if self.attributes else ""
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}{own}]>\n{name}{declared} ({self.inputs}) => ({self.outputs})'
        return "\n  ".join([head + "\n{", *self.body.lines]) + "\n}"
