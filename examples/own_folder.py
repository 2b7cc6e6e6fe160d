"""Your own model: a diffusers folder or Hub id by its name, or a pipeline object that you have changed."""

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

import qdiff
from qdiff.models.loading import bundled_folder

FOLDER = bundled_folder("stable-diffusion")  # stands for your folder: what save_pretrained wrote, or a Hub id
PROMPTS = ["a rocket on a blue background", "a red apple"]

# By its name. The family follows from the pipeline's class.
run = qdiff.calibrate(FOLDER, prompts=PROMPTS, output="runs/folder", steps=8, batch=2)
print(run.results["calibrate"])

# As an object: it is saved into the run folder, because later stages load the same weights again.
pipe = DiffusionPipeline.from_pretrained(str(FOLDER))
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
run = qdiff.quantize(pipe, recipe="int8", prompts=PROMPTS, output="runs/object", steps=8, batch=2)
qdiff.build(run, engine="onnxruntime")
picture = qdiff.load_pipeline(run, engine="onnxruntime")(PROMPTS[0]).images[0]
picture.save(run.path / "rocket.png")
