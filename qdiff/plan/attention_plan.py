"""What was decided about a model's self-attentions, for people: a part of ``plan.json``. Loads no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

BLOCKS, BOUNDS = "attention_blocks", "attention_bounds"  # the lists as inputs of a graph


class HeadPlan(BaseModel):
    """One head: its order of tokens, and for each sparse group of timesteps how much it reads and keeps.

    ``recall`` is the share of its attention that the blocks on its lists hold, ``error`` the change of the prediction that the
    rest costs, when this head alone is sparse.
    """

    model_config = ConfigDict(extra="forbid")

    order: str
    density: list[float]
    recall: list[float]
    error: list[float]


class SparseLayer(BaseModel):
    """One self-attention."""

    model_config = ConfigDict(extra="forbid")

    name: str
    heads: list[HeadPlan]


class AttentionPlan(BaseModel):
    """All self-attentions that follow block lists; the others stay dense."""

    model_config = ConfigDict(extra="forbid")

    numerics: str
    asked: float = Field(description="mean density that was asked for, over the sparse layers and groups")
    density: float = Field(description="mean density that came of it")
    overall: float = Field(
        description="mean density over all self-attentions and recorded steps, dense ones counted as 1"
    )
    tokens: int
    text: int
    block_q: int
    block_k: int
    grid: tuple[int, int, int]
    edges: list[float] = Field(description="falling shares of the noise schedule; from the first on everything is read")
    layers: list[SparseLayer]

    @property
    def heads(self) -> int:
        """Return heads of all sparse attentions."""
        return sum(len(layer.heads) for layer in self.layers)
