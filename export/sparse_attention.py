"""``qdiff::sparse_attention`` as an ONNX local function: plain operators that every target has.

Head by head, the blocks on a head's lists are gathered behind each block of queries, and two matrix products with a softmax
between them do the rest. Lists are inputs, and how many blocks a head reads is read from ``bounds``: an engine takes other lists
at the next step without being built anew. What a list does not name is not computed.

Unlike a kernel, a graph holds what it gathers: ``tokens x density x tokens / block_q`` rows of keys for a head. At 75,600 tokens
that is a job for a plugin; the node's name and its inputs are made so that one can take the call over.

Codes go through a QuantizeLinear with a *constant* scale, a power of two, behind a division by the block's own scale, which
comes back after the product: that is what TensorRT makes a true INT8 or FP8 product of, with scales that are only known at run
time. The powers of two keep what lies between in the range of float16.

The lists may not hold :data:`qdiff.attention.lists.NOTHING`, and every head reads at least one block: a Gather would take -1 for
the last block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import NUMERICS, PROBABILITY_SCALE
from qdiff.export.function_text import Body, Function
from qdiff.formats import format_named

_FLOAT, _INT8, _E4M3 = 1, 3, 17  # onnx.TensorProto's numbers
_CODES = {"int8": _INT8, "fp8": _E4M3}
_UNIT = {"int8": 2.0**-7, "fp8": 2.0**-9}  # what a code counts: operands lie between -1 and 1
_V_UNIT = 2.0**-12  # sums of probabilities times values: 75,600 keys stay below float16's largest number


@dataclass(frozen=True)
class SparseAttention:
    """One function: sizes are in its name, as in every kernel's.

    Args:
        numerics: ``float``, ``int8_fp8`` or ``fp8``.
        pairs: whether codes are written as QuantizeLinear / DequantizeLinear pairs (else as Casts and rounding).
    """

    KIND: ClassVar[str] = "SparseAttention"

    numerics: str
    pairs: bool
    heads: int
    size: int
    tiling: Tiling

    @property
    def name(self) -> str:
        """Its name in the domain."""
        tiling = self.tiling
        return (
            f"{self.KIND}_{self.numerics}{'_qdq' if self.pairs else ''}_heads{self.heads}_size{self.size}"
            f"_tokens{tiling.tokens}_text{tiling.text}_block{tiling.block_q}x{tiling.block_k}"
        )

    @classmethod
    def named(cls, name: str) -> SparseAttention:
        """The function of that name."""
        found = re.fullmatch(
            rf"{cls.KIND}_(\w+?)(_qdq)?_heads(\d+)_size(\d+)_tokens(\d+)_text(\d+)_block(\d+)x(\d+)", name
        )
        assert found is not None, name
        numbers = [int(group) for group in found.groups()[2:]]
        return cls(found[1], found[2] is not None, numbers[0], numbers[1], Tiling(*numbers[2:]))

    def function(self) -> Function:
        """``q``, ``k``, ``v [batch, heads, tokens, size]`` (``q`` scaled), ``order [heads, ordered]``, ``blocks [rows, total]``,
        ``bounds [heads + 1]`` (of these heads, counted in ``blocks``) to the output."""
        writer = _Writer(self)
        return Function("q, k, v, order, blocks, bounds", writer.result(), writer.body)


class _Writer:
    """Writes the body. Comments give shapes; ``r`` and ``c`` are blocks of queries and of keys, text included."""

    def __init__(self, made: SparseAttention) -> None:
        numerics = NUMERICS[made.numerics]
        self.made, self.tiling, self.body = made, made.tiling, Body()
        self.scores, self.output = (numerics.scores, numerics.output) if numerics.coded else (None, None)

    def do(self, call: str) -> str:
        return self.body.do(call)

    def axes(self, *values: int) -> str:
        return self.body.integers(*values)

    def number(self, value: float) -> str:
        """A scalar in the dtype that the graph computes in."""
        return self.do(f"CastLike({self.body.number(value)}, q)")

    def result(self) -> str:
        k, v, mean = "k", "v", None
        if self.scores:
            k = self.do(f"Sub(k, {self.do(f'ReduceMean<keepdims = 1>(k, {self.axes(2)})')})")
            mean = self.do(f"ReduceMean<keepdims = 1>(v, {self.axes(2)})")
            v = self.do(f"Sub(v, {mean})")
        heads = [self.head(head, k, v) for head in range(self.made.heads)]
        joined = self.do(f"Concat<axis = 1>({', '.join(heads)})")
        return joined if mean is None else self.do(f"Add({joined}, {mean})")

    def head(self, head: int, k: str, v: str) -> str:
        tiling, number = self.tiling, self.do(f"Constant<value = int64 {{{head}}}>()")
        order = self.do(f"Gather<axis = 0>(order, {number})")
        queries = self.placed("q", number, order, tiling.block_q)  # [batch, r, block_q, size]
        keys = self.placed(k, number, order, tiling.block_k)  # [batch, c, block_k, size]
        values = self.placed(v, number, order, tiling.block_k)
        q_scale = k_scale = v_scale = None
        if self.scores and self.output:
            queries, q_scale = self.normalised(queries, (2, 3), self.scores, _UNIT[self.scores])  # [batch, r, 1, 1]
            keys, k_scale = self.normalised(keys, (2, 3), self.scores, _UNIT[self.scores])
            values, v_scale = self.normalised(values, (1, 2), self.output, _V_UNIT)  # [batch, 1, 1, size]
        empty = self.empty_places()
        listed = self.listed(head)  # [rows, blocks]
        rows = tiling.rows
        own = self.rows_of(queries, tiling.text_rows, tiling.text_rows + rows)
        own_scale = None if q_scale is None else self.rows_of(q_scale, tiling.text_rows, tiling.text_rows + rows)
        found = self.attend(
            own,
            own_scale,
            self.gathered(keys, listed),
            self.gathered(values, listed),
            self.gathered_scale(k_scale, listed),
            v_scale,
            None if empty is None else self.gathered_empty(empty, listed),
        )
        flat = self.do(f"Reshape({found}, {self.axes(0, rows * tiling.block_q, self.made.size)})")
        result = self.do(f"Gather<axis = 1>({flat}, {self.positions(order)})")  # [batch, ordered, size]
        if tiling.text:
            text = self.text(queries, q_scale, keys, values, k_scale, v_scale, empty)
            result = self.do(f"Concat<axis = 1>({text}, {result})")
        return self.do(f"Unsqueeze({result}, {self.axes(1)})")

    def placed(self, x: str, head: str, order: str, block: int) -> str:
        """One head's tokens where they lie, in blocks. Where none lies there is zero."""
        tiling = self.tiling
        lying = self.do(f"Add({order}, {self.int32(tiling.text)})") if tiling.text else order
        text, rest = -tiling.text % block, -tiling.ordered % block
        parts = [self.int32s(range(tiling.text)), self.int32s([0] * text), lying, self.int32s([0] * rest)]
        kept = [part for part, there in zip(parts, (tiling.text, text, 1, rest), strict=True) if there]
        places = self.do(f"Concat<axis = 0>({', '.join(kept)})") if len(kept) > 1 else kept[0]
        own = self.do(f"Gather<axis = 1>({x}, {head})")
        blocks = -(-tiling.text // block) + -(-tiling.ordered // block)
        shape = self.axes(0, blocks, block, self.made.size)
        laid = self.do(f"Reshape({self.do(f'Gather<axis = 1>({own}, {places})')}, {shape})")
        if not text and not rest:
            return laid
        filled = self.table([float(place) for place in _filled(tiling, block)], (blocks, block, 1))
        return self.do(f"Mul({laid}, {filled})")

    def normalised(self, x: str, axes: tuple[int, int], format: str, unit: float) -> tuple[str, str]:
        """``x`` over its scale, between -largest and largest in units of ``unit``, and the scale."""
        amax = self.do(f"ReduceMax<keepdims = 1>({self.do(f'Abs({x})')}, {self.axes(*axes)})")
        whole = self.number(1 / (format_named(format).element.largest * unit))
        some = self.do(f"Greater({amax}, {self.number(0.0)})")
        scale = self.do(f"Where({some}, {self.do(f'Mul({amax}, {whole})')}, {self.number(1.0)})")
        return self.do(f"Div({x}, {scale})"), scale

    def codes(self, x: str, format: str, unit: float) -> str:
        """``x`` on the grid of ``format`` in units of ``unit``."""
        step = self.number(unit)
        if format == "int8" or self.made.pairs:
            coded = self.do(f"QuantizeLinear<output_dtype = {_CODES[format]}>({x}, {step})")
            return self.do(f"DequantizeLinear({coded}, {step})")
        largest = self.number(format_named(format).element.largest)
        least = self.do(f"Neg({largest})")
        within = self.do(f"Clip({self.do(f'Div({x}, {step})')}, {least}, {largest})")
        coded = self.body.cast(within, _CODES[format])
        return self.do(f"Mul({self.do(f'CastLike({coded}, q)')}, {step})")

    def empty_places(self) -> str | None:
        """What is added to the scores of places of keys: ``[c, block_k]``, or ``None`` where all are filled."""
        filled = _filled(self.tiling, self.tiling.block_k)
        if all(filled):
            return None
        return self.table(
            [0.0 if place else -60000.0 for place in filled], (len(filled) // self.tiling.block_k, self.tiling.block_k)
        )

    def listed(self, head: int) -> str:
        """The blocks that each block of queries reads, text first: ``[rows, blocks]``."""
        start, end = (self.do(f"Gather<axis = 0>(bounds, {self.axes(place)})") for place in (head, head + 1))
        own = self.do(f"Slice(blocks, {start}, {end}, {self.axes(1)})")
        text, rows = self.tiling.text_columns, self.tiling.rows
        if not text:
            return own
        prefix = self.do(f"Reshape({self.int32s(list(range(text)) * rows)}, {self.axes(rows, text)})")
        return self.do(f"Concat<axis = 1>({prefix}, {self.do(f'Add({own}, {self.int32(text)})')})")

    def rows_of(self, x: str, start: int, end: int) -> str:
        if not self.tiling.text:
            return x
        return self.do(f"Slice({x}, {self.axes(start)}, {self.axes(end)}, {self.axes(1)})")

    def gathered(self, x: str, listed: str) -> str:
        """``[batch, c, block_k, size]`` to ``[batch, rows, keys, size]``."""
        blocks = self.do(f"Gather<axis = 1>({x}, {listed})")
        return self.do(f"Reshape({blocks}, {self.axes(0, self.tiling.rows, -1, self.made.size)})")

    def gathered_scale(self, scale: str | None, listed: str) -> str | None:
        """``[batch, c, 1, 1]`` to ``[batch, rows, 1, keys]``."""
        if scale is None:
            return None
        blocks = self.do(f"Gather<axis = 1>({self.do(f'Squeeze({scale}, {self.axes(3)})')}, {listed})")
        spread = self.do(f"Mul({blocks}, {self.table([1.0] * self.tiling.block_k, (self.tiling.block_k,))})")
        return self.do(f"Reshape({spread}, {self.axes(0, self.tiling.rows, 1, -1)})")

    def gathered_empty(self, empty: str, listed: str) -> str:
        """``[c, block_k]`` to ``[rows, 1, keys]``."""
        blocks = self.do(f"Gather<axis = 0>({empty}, {listed})")
        return self.do(f"Reshape({blocks}, {self.axes(self.tiling.rows, 1, -1)})")

    def attend(
        self,
        q: str,
        q_scale: str | None,
        k: str,
        v: str,
        k_scale: str | None,
        v_scale: str | None,
        empty: str | None,
    ) -> str:
        """``[batch, r, block_q, size]`` and ``[batch, r, keys, size]`` to ``[batch, r, block_q, size]``."""
        if self.scores and self.output:
            q, k = (self.codes(x, self.scores, _UNIT[self.scores]) for x in (q, k))
            v = self.codes(v, self.output, _V_UNIT)
        scores = self.do(f"MatMul({q}, {self.do(f'Transpose<perm = [0, 1, 3, 2]>({k})')})")
        for scale in (q_scale, k_scale):
            scores = scores if scale is None else self.do(f"Mul({scores}, {scale})")
        scores = scores if empty is None else self.do(f"Add({scores}, {empty})")
        if not self.output:
            return self.do(f"MatMul({self.do(f'Softmax<axis = -1>({scores})')}, {v})")
        largest = self.do(f"ReduceMax<keepdims = 1>({scores}, {self.axes(-1)})")
        shares = self.do(f"Exp({self.do(f'Sub({scores}, {largest})')})")
        total = self.do(f"ReduceSum<keepdims = 1>({self.body.cast(shares, _FLOAT)}, {self.axes(-1)})")
        product = self.do(f"MatMul({self.codes(shares, self.output, 1 / PROBABILITY_SCALE)}, {v})")
        mean = self.do(f"Div({self.body.cast(product, _FLOAT)}, {total})")
        return self.do(f"Mul({self.do(f'CastLike({mean}, q)')}, {v_scale})")

    def text(
        self,
        queries: str,
        q_scale: str | None,
        keys: str,
        values: str,
        k_scale: str | None,
        v_scale: str | None,
        empty: str | None,
    ) -> str:
        """What the text's queries get, who read everything: ``[batch, text, size]``."""
        tiling, rows = self.tiling, self.tiling.text_rows
        every = self.axes(0, 1, -1, self.made.size)
        k, v = (self.do(f"Reshape({x}, {every})") for x in (keys, values))
        if k_scale is not None:
            spread = self.do(
                f"Mul({self.do(f'Squeeze({k_scale}, {self.axes(3)})')}, {self.table([1.0] * tiling.block_k, (tiling.block_k,))})"
            )
            k_scale = self.do(f"Reshape({spread}, {self.axes(0, 1, 1, -1)})")
        hidden = None if empty is None else self.do(f"Reshape({empty}, {self.axes(1, 1, -1)})")
        scale = None if q_scale is None else self.rows_of(q_scale, 0, rows)
        found = self.attend(self.rows_of(queries, 0, rows), scale, k, v, k_scale, v_scale, hidden)
        flat = self.do(f"Reshape({found}, {self.axes(0, rows * tiling.block_q, self.made.size)})")
        return self.do(f"Slice({flat}, {self.axes(0)}, {self.axes(tiling.text)}, {self.axes(1)})")

    def positions(self, order: str) -> str:
        """Where each token lies: the inverse of a permutation."""
        count = self.tiling.ordered
        zeros = self.do(f"ConstantOfShape<value = int32[1] {{0}}>({self.axes(count)})")
        numbers = self.do(f"Range({self.int32(0)}, {self.int32(count)}, {self.int32(1)})")
        return self.do(f"ScatterElements<axis = 0>({zeros}, {order}, {numbers})")

    def int32(self, value: int) -> str:
        return self.do(f"Constant<value = int32 {{{value}}}>()")

    def int32s(self, values: Sequence[int]) -> str:
        if not values:
            return ""
        return self.do(f"Constant<value = int32[{len(values)}] {{{', '.join(map(str, values))}}}>()")

    def table(self, values: Sequence[float], shape: tuple[int, ...]) -> str:
        """Numbers of that shape, in the dtype that the graph computes in."""
        flat = self.body.table(tuple(values))
        return self.do(f"CastLike({self.do(f'Reshape({flat}, {self.axes(*shape)})')}, q)")


def _filled(tiling: Tiling, block: int) -> list[bool]:
    """Where a token lies when the sequence is cut into blocks of ``block``."""
    lies: list[bool] = []
    for tokens in (tiling.text, tiling.ordered):
        lies += [True] * tokens + [False] * (-tokens % block)
    return lies
