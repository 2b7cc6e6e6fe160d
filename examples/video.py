"""Text to video: quantize the bundled Wan to INT8 and make a clip with an engine."""

import qdiff

PROMPTS = ["a rocket that moves up on a blue background", "a red apple that turns on a white background"]

run = qdiff.quantize("wan", recipe="int8", prompts=PROMPTS, output="runs/video", steps=8, frames=9, batch=2)
qdiff.build(run, engine="openvino")
(clip,) = qdiff.generate(run, PROMPTS[0], engine="openvino", output=run.path / "rocket.mp4", seed=1)
print(clip)

compared = qdiff.compare(run, ["openvino"], prompts=PROMPTS, pictures=2, accept_quality=True).results["compare"]
print(f"PSNR to the float model: {compared['engines'][0]['psnr_db_mean']:.1f} dB")
