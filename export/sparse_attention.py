"""``qdiff::sparse_attention`` as ONNX local functions: plain operators that every target has.

Queries, keys and values are put in the heads' orders; then, head by head, the blocks on a head's lists are gathered behind each
block of queries, and two matrix products with a softmax between them do the rest. Lists are inputs, and how many blocks a head
reads is read from ``bounds``: an engine takes other lists at the next step without being built anew. What a list does not name
is not computed.

Unlike a kernel, a graph holds what it gathers: ``tokens x density x tokens / block_q`` rows of keys for a head. At 75,600 tokens
that is a job for a kernel. So with numerics that have codes the function is cut where kernels are: it calls one function each
that packs queries, keys and values, and one that attends (:mod:`qdiff.attention.nodes`). Between them, only those two ends know
what a tensor holds: here the values that codes will stand for and scales that fit them, in an engine with kernels the codes.
What crosses the outer function, means and the scale of the values, is the same in both.

Codes go through a QuantizeLinear with a *constant* scale, a power of two, behind a division by the block's own scale, which
comes back after the product: that is what TensorRT makes a true INT8 or FP8 product of, with scales that are only known at run
time. The powers of two keep what lies between in the range of float16.

The lists may not hold :data:`qdiff.attention.lists.NOTHING`, and every head reads at least one block: a Gather would take -1 for
the last block.
"""

from __future__ import annotations

from collections.abc import Sequence

from qdiff.attention.lists import Tiling
from qdiff.attention.nodes import KEYS, PLUGIN_ATTRIBUTES, PRODUCT, QUERIES, VALUES, WHOLE, AttentionNode
from qdiff.attention.numerics import NUMERICS, PROBABILITY_SCALE
from qdiff.export.function_text import Body, Function
from qdiff.formats.table import format_named

_FLOAT, _INT8, _INT32, _INT64, _E4M3 = 1, 3, 6, 7, 17  # onnx.TensorProto's numbers
_CODES = {"int8": _INT8, "fp8": _E4M3}
_UNIT = {"int8": 2.0**-7, "fp8": 2.0**-9}  # what a code counts: operands lie between -1 and 1
_V_UNIT = 2.0**-12  # sums of probabilities times values: 75,600 keys stay below float16's largest number


def attention_function(node: AttentionNode) -> Function:
    """Return the function of that name.

    ============== ==========================================================================================================
    ``WHOLE``      ``q``, ``k``, ``v [batch, heads, tokens, size]`` (``q`` scaled), ``order [heads, ordered]``,
                   ``blocks [rows, total]``, ``bounds [heads + 1]`` (of these heads, counted in ``blocks``) to the output
    ``QUERIES``    ``q``, ``order`` to packed queries and their scales
    ``KEYS``       ``k``, its float32 mean over tokens, ``order`` to packed keys and their scales
    ``VALUES``     ``v``, its float32 mean over tokens, its float32 scale by channel, ``order`` to packed values
    ``PRODUCT``    what was packed (``q``, ``k``, ``v``, the scales of all three), the mean of the values, ``order``, ``bounds``
                   in int32, ``blocks`` to the output
    ============== ==========================================================================================================
    """
    writer = _Writer(node)
    return {
        WHOLE: writer.whole,
        QUERIES: writer.queries,
        KEYS: writer.keys,
        VALUES: writer.values,
        PRODUCT: writer.product,
    }[node.kind]()


class _Writer:
    """Writes the body. Comments give shapes; ``r`` and ``c`` are blocks of queries and of keys, text included."""

    def __init__(self, made: AttentionNode) -> None:
        numerics = NUMERICS[made.numerics]
        self.made, self.tiling, self.body = made, made.tiling, Body()
        self.scores, self.output = (numerics.scores, numerics.output) if numerics.coded else (None, None)
        self.like = "q" if made.kind in (WHOLE, PRODUCT) else "x"  # a tensor of the dtype that the graph computes in

    def do(self, call: str) -> str:
        return self.body.do(call)

    def axes(self, *values: int) -> str:
        return self.body.integers(*values)

    def number(self, value: float) -> str:
        """Return a scalar in the dtype that the graph computes in."""
        return self.cast_like(self.body.number(value))

    def cast_like(self, x: str) -> str:
        return self.do(f"CastLike({x}, {self.like})")

    def whole(self) -> Function:
        inputs, tiling = "q, k, v, order, blocks, bounds", self.tiling
        if not self.output:
            q, k, v = (self.laid("q", tiling.block_q), self.laid("k", tiling.block_k), self.laid("v", tiling.block_k))
            return Function(inputs, self.attended(q, k, v, None, None, "bounds"), self.body)
        k_mean = self.mean(self.body.cast("k", _FLOAT))
        floats = self.body.cast("v", _FLOAT)
        v_mean = self.mean(floats)
        centred = self.do(f"Sub({floats}, {v_mean})")
        amax = self.do(f"ReduceMax<keepdims = 1>({self.do(f'Abs({centred})')}, {self.axes(2)})")
        fitting = self.do(f"Div({amax}, {self.body.number(format_named(self.output).element.largest)})")
        some = self.do(f"Greater({amax}, {self.body.number(0.0)})")
        v_scale = self.do(f"Where({some}, {fitting}, {self.body.number(1.0)})")  # [batch, heads, 1, size]
        q, q_scale = self.call(QUERIES, "q, order", 2)
        k, k_scale = self.call(KEYS, f"k, {k_mean}, order", 2)
        (v,) = self.call(VALUES, f"v, {v_mean}, {v_scale}, order", 1)
        bounds = self.body.cast("bounds", _INT32)
        scales = f"{q_scale}, {k_scale}, {v_scale}, {v_mean}"
        (result,) = self.call(PRODUCT, f"{q}, {k}, {v}, {scales}, order, {bounds}, blocks", 1)
        return Function(inputs, result, self.body)

    def call(self, kind: str, inputs: str, outputs: int) -> list[str]:
        return self.body.call(self.made.part(kind).name, inputs, outputs, PLUGIN_ATTRIBUTES)

    def mean(self, x: str) -> str:
        return self.do(f"ReduceMean<keepdims = 1>({x}, {self.axes(2)})")

    def queries(self) -> Function:
        assert self.scores
        codes = self.normalised(self.laid("x", self.tiling.block_q), self.scores, _UNIT[self.scores])
        return Function("x, order", ", ".join(codes), self.body, tuple(PLUGIN_ATTRIBUTES))

    def keys(self) -> Function:
        assert self.scores
        centred = self.do(f"Sub(x, {self.cast_like('mean')})")
        codes = self.normalised(self.laid(centred, self.tiling.block_k), self.scores, _UNIT[self.scores])
        return Function("x, mean, order", ", ".join(codes), self.body, tuple(PLUGIN_ATTRIBUTES))

    def values(self) -> Function:
        centred = self.do(f"Sub(x, {self.cast_like('mean')})")
        codes = self.laid(self.do(f"Div({centred}, {self.in_units('scale')})"), self.tiling.block_k)
        return Function("x, mean, scale, order", codes, self.body, tuple(PLUGIN_ATTRIBUTES))

    def in_units(self, scale: str) -> str:
        """Return what values are divided by so that a code counts :data:`_V_UNIT`."""
        return self.cast_like(self.do(f"Mul({scale}, {self.body.number(1 / _V_UNIT)})"))

    def product(self) -> Function:
        joined = self.attended("q", "k", "v", "q_scale", "k_scale", self.body.cast("bounds", _INT64))
        scaled = self.do(f"Mul({joined}, {self.in_units('v_scale')})")
        result = self.do(f"Add({scaled}, {self.cast_like('v_mean')})")
        inputs = "q, k, v, q_scale, k_scale, v_scale, v_mean, order, bounds, blocks"
        return Function(inputs, result, self.body, tuple(PLUGIN_ATTRIBUTES))

    def laid(self, x: str, block: int) -> str:
        """Return all heads' tokens where they lie, in blocks: ``[batch, heads, blocks, block, size]``. Where none lies
        there is zero.
        """
        tiling, heads, size = self.tiling, self.made.heads, self.made.size
        text, rest = -tiling.text % block, -tiling.ordered % block
        parts = [self.do(f"Add(order, {self.by_head(tiling.tokens, tiling.text)})")]
        if tiling.text:
            parts.insert(
                0, self.do(f"Add({self.row([*range(tiling.text), *[0] * text])}, {self.by_head(tiling.tokens)})")
            )
        if rest:
            parts.append(self.do(f"Add({self.row([0] * rest)}, {self.by_head(tiling.tokens)})"))
        places = self.do(f"Concat<axis = 1>({', '.join(parts)})") if len(parts) > 1 else parts[0]
        flat = self.do(f"Reshape({x}, {self.axes(0, heads * tiling.tokens, size)})")
        blocks = -(-tiling.text // block) + -(-tiling.ordered // block)
        gathered = self.do(f"Gather<axis = 1>({flat}, {places})")  # [batch, heads, places, size]
        laid = self.do(f"Reshape({gathered}, {self.axes(0, heads, blocks, block, size)})")
        if not text and not rest:
            return laid
        return self.do(
            f"Mul({laid}, {self.table([float(place) for place in _filled(tiling, block)], (blocks, block, 1))})"
        )

    def normalised(self, x: str, format: str, unit: float) -> tuple[str, str]:
        """Return ``x`` over its scale, between -largest and largest in units of ``unit``, and the scale
        ``[batch, heads, blocks, 1, 1]``.
        """
        amax = self.do(f"ReduceMax<keepdims = 1>({self.do(f'Abs({x})')}, {self.axes(3, 4)})")
        whole = self.number(1 / (format_named(format).element.largest * unit))
        some = self.do(f"Greater({amax}, {self.number(0.0)})")
        scale = self.do(f"Where({some}, {self.do(f'Mul({amax}, {whole})')}, {self.number(1.0)})")
        return self.do(f"Div({x}, {scale})"), scale

    def attended(self, q: str, k: str, v: str, q_scale: str | None, k_scale: str | None, bounds: str) -> str:
        """Return what was laid, and scales of it, to ``[batch, heads, tokens, size]`` in units of the values."""
        tiling, heads, size = self.tiling, self.made.heads, self.made.size
        empty = self.empty_places()
        found = []
        for head in range(heads):
            own_q, own_k, own_v = self.of_head(q, head), self.of_head(k, head), self.of_head(v, head)
            own_q_scale = None if q_scale is None else self.of_head(q_scale, head)
            own_k_scale = None if k_scale is None else self.of_head(k_scale, head)
            found.append(self.head(head, own_q, own_k, own_v, own_q_scale, own_k_scale, empty, bounds))
        places = tiling.rows * tiling.block_q
        rows = self.do(f"Concat<axis = 1>({', '.join(own for own, _ in found)})")  # [batch, heads * places, size]
        result = self.do(f"Gather<axis = 1>({rows}, {self.positions(places)})")  # [batch, heads, ordered, size]
        if not tiling.text:
            return result
        text = self.do(f"Concat<axis = 1>({', '.join(text for _, text in found)})")
        text = self.do(f"Reshape({text}, {self.axes(0, heads, tiling.text, size)})")
        return self.do(f"Concat<axis = 2>({text}, {result})")

    def of_head(self, x: str, head: int) -> str:
        return self.do(f"Gather<axis = 1>({x}, {self.do(f'Constant<value = int64 {{{head}}}>()')})")

    def head(
        self,
        head: int,
        q: str,
        k: str,
        v: str,
        q_scale: str | None,
        k_scale: str | None,
        empty: str | None,
        bounds: str,
    ) -> tuple[str, str]:
        """Return what one head's queries get: those that have an order ``[batch, rows * block_q, size]``, and the
        text's.
        """
        tiling, size = self.tiling, self.made.size
        listed = self.listed(head, bounds)  # [rows, blocks]
        ends = tiling.text_rows, tiling.text_rows + tiling.rows
        found = self.attend(
            self.rows_of(q, *ends),
            None if q_scale is None else self.rows_of(q_scale, *ends),
            self.gathered(k, listed, tiling.rows),
            self.gathered(v, listed, tiling.rows),
            self.gathered_scale(k_scale, listed, tiling.rows),
            None if empty is None else self.gathered_empty(empty, listed, tiling.rows),
        )
        flat = self.do(f"Reshape({found}, {self.axes(0, tiling.rows * tiling.block_q, size)})")
        return flat, self.text(q, q_scale, k, v, k_scale, empty) if tiling.text else ""

    def codes(self, x: str, format: str, unit: float) -> str:
        """Return ``x`` on the grid of ``format`` in units of ``unit``."""
        step = self.number(unit)
        if format == "int8" or self.made.pairs:
            coded = self.do(f"QuantizeLinear<output_dtype = {_CODES[format]}>({x}, {step})")
            return self.do(f"DequantizeLinear({coded}, {step})")
        largest = self.number(format_named(format).element.largest)
        least = self.do(f"Neg({largest})")
        within = self.do(f"Clip({self.do(f'Div({x}, {step})')}, {least}, {largest})")
        coded = self.body.cast(within, _CODES[format])
        return self.do(f"Mul({self.cast_like(coded)}, {step})")

    def empty_places(self) -> str | None:
        """Return what is added to the scores of places of keys: ``[c, block_k]``, or ``None`` where all are filled."""
        filled = _filled(self.tiling, self.tiling.block_k)
        if all(filled):
            return None
        return self.table(
            [0.0 if place else -60000.0 for place in filled], (len(filled) // self.tiling.block_k, self.tiling.block_k)
        )

    def listed(self, head: int, bounds: str) -> str:
        """Return the blocks that each block of queries reads, text first: ``[rows, blocks]``."""
        start, end = (self.do(f"Gather<axis = 0>({bounds}, {self.axes(place)})") for place in (head, head + 1))
        own = self.do(f"Slice(blocks, {start}, {end}, {self.axes(1)})")
        text, rows = self.tiling.text_columns, self.tiling.rows
        if not text:
            return own
        prefix = self.do(f"Reshape({self.row(list(range(text)) * rows)}, {self.axes(rows, text)})")
        return self.do(f"Concat<axis = 1>({prefix}, {self.do(f'Add({own}, {self.int32(text)})')})")

    def rows_of(self, x: str, start: int, end: int) -> str:
        if not self.tiling.text:
            return x
        return self.do(f"Slice({x}, {self.axes(start)}, {self.axes(end)}, {self.axes(1)})")

    def gathered(self, x: str, listed: str, rows: int) -> str:
        """Gather ``[batch, c, block_k, size]`` into ``[batch, rows, keys, size]``."""
        blocks = self.do(f"Gather<axis = 1>({x}, {listed})")
        return self.do(f"Reshape({blocks}, {self.axes(0, rows, -1, self.made.size)})")

    def gathered_scale(self, scale: str | None, listed: str, rows: int) -> str | None:
        """Gather ``[batch, c, 1, 1]`` into ``[batch, rows, 1, keys]``."""
        if scale is None:
            return None
        blocks = self.do(f"Gather<axis = 1>({self.do(f'Squeeze({scale}, {self.axes(3)})')}, {listed})")
        spread = self.do(f"Mul({blocks}, {self.table([1.0] * self.tiling.block_k, (self.tiling.block_k,))})")
        return self.do(f"Reshape({spread}, {self.axes(0, rows, 1, -1)})")

    def gathered_empty(self, empty: str, listed: str, rows: int) -> str:
        """Gather ``[c, block_k]`` into ``[rows, 1, keys]``."""
        blocks = self.do(f"Gather<axis = 0>({empty}, {listed})")
        return self.do(f"Reshape({blocks}, {self.axes(rows, 1, -1)})")

    def attend(
        self,
        q: str,
        q_scale: str | None,
        k: str,
        v: str,
        k_scale: str | None,
        empty: str | None,
    ) -> str:
        """Return the attention of ``[batch, r, block_q, size]`` over ``[batch, r, keys, size]``: ``[batch, r, block_q,
        size]``.
        """
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
        return self.cast_like(mean)

    def text(self, q: str, q_scale: str | None, k: str, v: str, k_scale: str | None, empty: str | None) -> str:
        """Return what the text's queries get, who read everything: ``[batch, text, size]``."""
        tiling, ends = self.tiling, (0, self.tiling.text_rows)
        everything = self.row(list(range(tiling.text_columns + tiling.columns)))
        found = self.attend(
            self.rows_of(q, *ends),
            None if q_scale is None else self.rows_of(q_scale, *ends),
            self.gathered(k, everything, 1),
            self.gathered(v, everything, 1),
            self.gathered_scale(k_scale, everything, 1),
            None if empty is None else self.gathered_empty(empty, everything, 1),
        )
        flat = self.do(f"Reshape({found}, {self.axes(0, ends[1] * tiling.block_q, self.made.size)})")
        return self.do(f"Slice({flat}, {self.axes(0)}, {self.axes(tiling.text)}, {self.axes(1)})")

    def positions(self, places: int) -> str:
        """Return where each head's tokens lie among the queries of all heads, of which each has ``places``: the inverse
        of its order.
        """
        heads, count = self.made.heads, self.tiling.ordered
        zeros = self.do(f"ConstantOfShape<value = int32[1] {{0}}>({self.axes(heads, count)})")
        numbers = self.do(f"Range({self.int32(0)}, {self.int32(count)}, {self.int32(1)})")
        own = self.do(f"Add({numbers}, {self.by_head(places)})")
        return self.do(f"ScatterElements<axis = 1>({zeros}, order, {own})")

    def by_head(self, step: int, first: int = 0) -> str:
        """Return int32 ``[heads, 1]``: ``first``, and ``step`` more for each head."""
        numbers = ", ".join(str(first + head * step) for head in range(self.made.heads))
        return self.do(f"Constant<value = int32[{self.made.heads},1] {{{numbers}}}>()")

    def row(self, values: Sequence[int]) -> str:
        """Return int32 ``[1, n]``."""
        return self.do(f"Constant<value = int32[1,{len(values)}] {{{', '.join(map(str, values))}}}>()")

    def int32(self, value: int) -> str:
        return self.do(f"Constant<value = int32 {{{value}}}>()")

    def table(self, values: Sequence[float], shape: tuple[int, ...]) -> str:
        """Return numbers of that shape, in the dtype that the graph computes in."""
        flat = self.body.table(tuple(values))
        return self.cast_like(self.do(f"Reshape({flat}, {self.axes(*shape)})"))


def _filled(tiling: Tiling, block: int) -> list[bool]:
    """Return where a token lies when the sequence is cut into blocks of ``block``."""
    lies: list[bool] = []
    for tokens in (tiling.text, tiling.ordered):
        lies += [True] * tokens + [False] * (-tokens % block)
    return lies
