"""The text of an ONNX local function: its lines in ONNX's textual syntax, and what goes around them."""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "qdiff"
OPSET = 23


class Body:
    """Lines of a function in ONNX's textual syntax; every call gives the name of a new value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._constants: dict[str, str] = {}

    def do(self, call: str) -> str:
        """``do("Mul(a, b)")`` -> the name of the product."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {call}")
        return name

    def number(self, value: float) -> str:
        """A float32 constant."""
        return self._constant(f"Constant<value = float {{{value!r}}}>()")

    def integers(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self._constant(f"Constant<value_ints = [{', '.join(map(str, values))}]>()")

    def table(self, values: tuple[float, ...]) -> str:
        """A 1-D float32 constant."""
        return self._constant(f"Constant<value = float[{len(values)}] {{{', '.join(map(repr, values))}}}>()")

    def _constant(self, call: str) -> str:
        if call not in self._constants:
            self._constants[call] = self.do(call)
        return self._constants[call]

    def clip(self, value: str, low: float, high: float) -> str:
        """Between two numbers."""
        return self.do(f"Clip({value}, {self.number(low)}, {self.number(high)})")

    def cast(self, value: str, dtype: int) -> str:
        """To an element type, by its number in ``onnx.TensorProto``."""
        return self.do(f"Cast<to = {dtype}>({value})")


@dataclass(frozen=True)
class Function:
    """Names of inputs and outputs, and the lines between."""

    inputs: str
    outputs: str
    body: Body

    def text(self, name: str) -> str:
        """The whole function, called ``name``."""
        head = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{name} ({self.inputs}) => ({self.outputs})'
        return "\n  ".join([head + "\n{", *self.body.lines]) + "\n}"
