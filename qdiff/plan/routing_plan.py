"""What a plan says about routes. No torch: engines read it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ROUTES, DELTAS = "routes", "deltas"  # inputs of a graph
CHANGES, DRIFTS, NEW_DELTAS = "changes", "drifts", "new_deltas"  # outputs, after the prediction
REUSE = -1  # the route of a block that is not computed

Rule = Literal["static", "table", "predicted"]


class ReusePlan(BaseModel):
    """When a block may add what it added before instead of being computed (temporal delta cache, 6Bit-Diffusion).

    ``tolerance`` bounds the squared relative error of the prediction that a block is expected to cause by that; ``in_a_row`` is
    how many calls it may be left out of.
    """

    model_config = ConfigDict(extra="forbid")

    tolerance: float = Field(ge=0)
    in_a_row: int = Field(ge=1)


class Predictor(BaseModel):
    """When the cheap branch is too bad: ``gains[t] (slope change + intercept)^2``, from the block's change in the call before, is
    the squared relative error of the prediction that it is expected to cause. What an error of a block does to the prediction
    differs a hundredfold along the noise schedule, so there is a gain for each of the plan's timesteps. ``r2`` of the line on
    held-out prompts; ``None`` where there are none.
    """

    model_config = ConfigDict(extra="forbid")

    slope: float
    intercept: float
    gains: list[float]
    r2: float | None = None

    def error(self, change: float, place: int) -> float:
        """Return the predicted error at a ``change``, as the class says; ``place`` is the index of the timestep."""
        return self.gains[place] * max(0.0, self.slope * change + self.intercept) ** 2


class RoutedBlock(BaseModel):
    """One block. ``table`` holds its branch at each of the plan's timesteps; a block with a predictor asks that, and its table
    is what most prompts of calibration would get.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    branches: list[str] = Field(min_length=1, description="recipes of its branches, the most careful first")
    table: list[int]
    predictor: Predictor | None = None
    reuse_gains: list[float] = Field(
        [], description="at each timestep: squared error of the prediction for a squared drift that is left out"
    )

    @property
    def switches(self) -> bool:
        """Return whether it needs more than one of its branches."""
        return self.predictor is not None or len(set(self.table)) > 1


class RoutingPlan(BaseModel):
    """Routes of the blocks of one chain, in its order.

    ``timesteps`` are those of calibration. Bits are means over blocks and timesteps, weighed by weights: ``used`` of the branch
    that is computed (one that is reused counts as its branch would), ``resident`` of all that is kept in memory.
    """

    model_config = ConfigDict(extra="forbid")

    rule: Rule
    timesteps: list[float]
    threshold: float | None = Field(
        None, description="of the predicted error of the prediction: a block is careful above it"
    )
    reuse: ReusePlan | None = None
    used_bits: float
    used_activation_bits: float
    resident_bits: float
    skipped: float = Field(0.0, description="share of block evaluations left out, on the pictures that decided")
    blocks: list[RoutedBlock]

    @property
    def by_sample(self) -> bool:
        """Return whether routes depend on what a sample did before, so that every sample has to be called for alone:
        else its picture would depend on the others of its batch. Tables depend on the timestep, which all samples
        share.
        """
        return self.reuse is not None or any(block.predictor is not None for block in self.blocks)
