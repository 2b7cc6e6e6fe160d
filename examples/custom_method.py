"""A quantization method of your own: a function of a group of layers and of what was decided so far."""

from dataclasses import replace

import qdiff
from qdiff.methods.base import METHODS, Decisions, LayerGroup


@METHODS.register("halve")
def halve(group: LayerGroup, decisions: Decisions, ratio: float = 0.5) -> Decisions:
    """Take ``ratio`` of the activations' range where the layers' outputs come out nearer to float."""
    if group.error(replace(decisions, clip=ratio)) >= group.error(decisions):
        return decisions.decide("halve", "the whole range is better")
    return decisions.decide("halve", f"range cut to {ratio}", clip=ratio)


PROMPTS = ["a rocket on a blue background", "a red apple"]
run = qdiff.calibrate("pixart", prompts=PROMPTS, output="runs/custom", steps=8, batch=2)
qdiff.quantize(run, recipe="int8", settings=["methods.halve.ratio=0.9"], accept_quality=True)

plan = qdiff.Plan.load(run.path / "plan.json")
cut = [layer.name for layer in plan.quantized if layer.clip == 0.9]
print(f"halve changed {len(cut)} of {len(plan.quantized)} layers")
assert all("halve" in layer.methods for layer in plan.quantized)
