"""Text to image: quantize the bundled PixArt to INT8, build an engine, and use it in diffusers' pipeline."""

import torch

import qdiff

PROMPTS = ["a rocket on a blue background", "a red apple", "cheese", "two cats on a green background"]

run = qdiff.quantize("pixart", recipe="int8", prompts=PROMPTS, output="runs/image")
sizes = run.results["quantize"]
print(f"{sizes['float32_bytes'] / 1e6:.1f} MB -> {sizes['packed_bytes'] / 1e6:.1f} MB")

qdiff.build(run, engine="openvino")
pipe = qdiff.load_pipeline(run, engine="openvino")
for seed, prompt in enumerate(PROMPTS):
    picture = pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]
    picture.save(run.path / f"picture-{seed}.png")
print(f"{len(PROMPTS)} pictures in {run.path}")
