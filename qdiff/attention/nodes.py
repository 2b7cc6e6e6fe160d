"""Names of the nodes that stand for sparse attention in an exported graph.

A graph calls one function for an attention. With numerics that have codes that function calls four others, and each of them is
what one kernel launch computes: packing of queries, of keys and of values, and the attention over what was packed. Where a
runtime has a kernel for such a node it takes the call over (``engines/trt_plugin.py``), elsewhere the functions are plain
operators (``export/sparse_attention.py``).

Sizes are in the name, as in every kernel's, and nothing in attributes: TensorRT hands attributes to a plugin by position, does
not keep them in an engine, and does not tell kernels apart by them when it looks up what it has timed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import NUMERICS

DOMAIN = "qdiff"
WHOLE = "SparseAttention"
QUERIES, KEYS, VALUES, PRODUCT = "PackQueries", "PackKeys", "PackValues", "BlockAttention"
PARTS = (QUERIES, KEYS, VALUES, PRODUCT)
# What TensorRT's parser reads on a node: which plugin it is, and that its kernel goes into the engine.
PLUGIN_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
_SIZES = r"heads(\d+)_size(\d+)_tokens(\d+)_text(\d+)_block(\d+)x(\d+)"


@dataclass(frozen=True)
class AttentionNode:
    """One such node.

    Args:
        kind: :data:`WHOLE` or one of :data:`PARTS`.
        numerics: a name of :data:`qdiff.attention.numerics.NUMERICS`.
        pairs: whether codes are written as QuantizeLinear / DequantizeLinear pairs (else as Casts and rounding).
        heads, size: of the attention.
        dtype: of queries, keys, values and the output, by torch's name.
    """

    kind: str
    numerics: str
    pairs: bool
    heads: int
    size: int
    tiling: Tiling
    dtype: str

    @property
    def name(self) -> str:
        """Return its name in :data:`DOMAIN`."""
        tiling = self.tiling
        return (
            f"{self.kind}_{self.numerics}{'_qdq' if self.pairs else ''}_heads{self.heads}_size{self.size}"
            f"_tokens{tiling.tokens}_text{tiling.text}_block{tiling.block_q}x{tiling.block_k}_{self.dtype}"
        )

    @classmethod
    def named(cls, name: str) -> AttentionNode | None:
        """Return the node of that name; ``None``: it is none of these."""
        found = re.fullmatch(rf"({'|'.join((WHOLE, *PARTS))})_(\w+?)(_qdq)?_{_SIZES}_([a-z0-9]+)", name)
        if found is None or found[2] not in NUMERICS:
            return None
        numbers = [int(group) for group in found.groups()[3:9]]
        return cls(found[1], found[2], found[3] is not None, numbers[0], numbers[1], Tiling(*numbers[2:]), found[10])

    def part(self, kind: str) -> AttentionNode:
        """Return the same attention's node of another kind."""
        return replace(self, kind=kind)
