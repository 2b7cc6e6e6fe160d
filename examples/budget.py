"""Mixed precision: which layers get INT8 and which NVFP4, within a budget of bits for each weight."""

import qdiff

PROMPTS = ["a rocket on a blue background", "a red apple", "cheese", "two cats on a green background"]

run = qdiff.calibrate("pixart", prompts=PROMPTS, output="runs/budget")
# mixed.pictures: how many pictures decide between the best plans; 16 are better, and take longer
qdiff.quantize(
    run, recipe="mixed", budget="bits=5.5", settings=["mixed.pictures=2", "mixed.calls=4"], accept_quality=True
)

plan = qdiff.Plan.load(run.path / "plan.json")
for layer in plan.quantized[:8]:
    print(f"{layer.name:45} {layer.precision:16} {layer.why}")
counts: dict[str, int] = {}
for layer in plan.quantized:
    counts[layer.precision] = counts.get(layer.precision, 0) + 1
print(counts, f"{run.results['quantize']['packed_bytes'] / 1e6:.1f} MB")
