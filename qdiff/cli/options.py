"""Options that several commands take: their names, types and one line of help each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qdiff import device
from qdiff.errors import UsageError
from qdiff.files import path_of

# Written out, because the tables themselves import much; a test compares them.
ENGINES = ("openvino", "onnxruntime", "tensorrt_rtx", "tensorrt", "eager", "float")
RECIPES = (
    "fp8", "fp8-gptq", "int8", "int8-gptq", "int8-rotate", "int8-token", "mixed", "mixed-token", "nvfp4", "nvfp4-distilled",
    "nvfp4-svd", "routed", "routed-token", "w4a16", "w4a8", "w6a8",
)  # fmt: skip

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", parser=path_of, help="the run folder")]
RunOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="PATH", parser=path_of, help="run folder [default: runs/MODEL]"),
]
ModelOption = Annotated[str, typer.Option("--model", help="model family (see: qdiff models)")]
WeightsOption = Annotated[
    str, typer.Option("--weights", help="bundled, a diffusers folder, a Hub id, or random:CONFIGURATION")
]
RevisionOption = Annotated[
    str | None, typer.Option(help="commit, tag or branch of a Hub id; resolved once and recorded")
]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", metavar="PATH", parser=path_of, help="text file, one prompt a line")
]
SamplesOption = Annotated[int | None, typer.Option(help="prompts to calibrate on [default: 32, or all of the file]")]
StepsOption = Annotated[int | None, typer.Option(help="denoising steps [default: the model's]")]
GuidanceOption = Annotated[float | None, typer.Option(help="guidance scale [default: the model's]")]
GuidanceScalesOption = Annotated[
    str | None,
    typer.Option(
        "--guidance",
        help="guidance scale, or several such as 2,7.5 for batches to take turns at [default: the model's]",
    ),
]
SchedulerOption = Annotated[str | None, typer.Option(help="scheduler, e.g. dpmsolver++ [default: the model's]")]
TimestepsOption = Annotated[str, typer.Option(help="steps to keep: uniform (Q-Diffusion), normal (PTQ4DM) or all")]
KeepOption = Annotated[int, typer.Option(help="how many steps of a trajectory to keep")]
BatchOption = Annotated[int, typer.Option(help="prompts denoised together")]
HeightOption = Annotated[int | None, typer.Option(help="pixels [default: the model's]")]
WidthOption = Annotated[int | None, typer.Option(help="pixels [default: the model's]")]
FramesOption = Annotated[int | None, typer.Option(help="of a clip [default: the model's]")]
SeedOption = Annotated[int, typer.Option(help="picture i starts from the noise of SEED + i")]
RecipeOption = Annotated[
    str, typer.Option("--recipe", help=f"built-in recipe or a YAML file; built in: {', '.join(RECIPES)}")
]
BudgetOption = Annotated[
    str | None,
    typer.Option("--budget", help="bits=5.5 (recipes mixed, routed); bytes=4000000 or latency=MILLISECONDS (mixed)"),
]
DensityOption = Annotated[
    float | None, typer.Option("--density", help="share of attention's blocks to read, e.g. 0.3 [default: all]")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="change one entry of the recipe")
]
PlanOption = Annotated[
    Path | None,
    typer.Option(
        "--plan", metavar="PATH", parser=path_of, help="a plan.json edited by hand: take its decisions, not a recipe's"
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        callback=device.set_device,
        help="where torch computes: cpu, cuda, cuda:1 [default: a GPU if there is one]",
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option("--engine", help=f"one of {', '.join(ENGINES)} [default: the fastest that is there]"),
]
CapabilityOption = Annotated[
    str | None, typer.Option("--compute-capability", help="GPU to build for, e.g. 8.9 or 12.0")
]
ProfileOption = Annotated[
    list[str] | None, typer.Option("--profile", help="sizes to accept, e.g. 512, dyn-256-1024, 512,batch=1-2-8")
]
PicturesOption = Annotated[int, typer.Option(help="pictures to compare")]
AcceptOption = Annotated[
    bool, typer.Option("--accept-quality", help="take a prediction or pictures below the recipe's floors (else exit 7)")
]
PsnrOption = Annotated[float | None, typer.Option("--min-psnr", help="fail (exit 7) when the mean PSNR is lower, dB")]
ForceOption = Annotated[bool, typer.Option("--force", help="begin this stage anew")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="say what would be done and do nothing")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


CALIBRATION: dict[str, tuple[object, object]] = {
    "revision": (RevisionOption, None),
    "samples": (SamplesOption, None),
    "steps": (StepsOption, None),
    "guidance": (GuidanceScalesOption, None),
    "scheduler": (SchedulerOption, None),
    "height": (HeightOption, None),
    "width": (WidthOption, None),
    "frames": (FramesOption, None),
    "timesteps": (TimestepsOption, "uniform"),
    "keep": (KeepOption, 25),
    "batch": (BatchOption, 4),
    "seed": (SeedOption, 0),
}  # of :class:`qdiff.api.calibration.Calibration`, each with its default


def with_calibration(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a calibration in the place of its argument ``calibration``, which gets them as the API takes
    them.
    """
    own = inspect.signature(command, eval_str=True)  # what is put together is not evaluated later
    parameters = [parameter for name, parameter in own.parameters.items() if name != "calibration"]
    place = list(own.parameters).index("calibration")
    parameters[place:place] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, (annotation, default) in CALIBRATION.items()
    ]

    @functools.wraps(command)
    def run(**given: object) -> None:
        options = {name: given.pop(name) for name in CALIBRATION}
        if options["guidance"] is not None:
            options["guidance"] = scales_of(str(options["guidance"]))
        command(**given, calibration=options)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def scales_of(text: str) -> list[float]:
    """Return the guidance scales of ``--guidance``: numbers with commas between.

    Raises:
        UsageError: something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--guidance {text!r} is no number, and no numbers with commas", "example: 2,7.5") from None


def pairs_of(values: list[str] | None, option: str) -> dict[str, str]:
    """Return the settings of an option that is given several times, each ``name=value``.

    Raises:
        UsageError: another form.
    """
    pairs = {}
    for value in values or []:
        name, equals, setting = value.partition("=")
        if not equals or not name:
            raise UsageError(f"{option} {value!r} is not of the form name=value")
        pairs[name] = setting
    return pairs
