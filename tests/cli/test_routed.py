"""Recipe routed on the command line: branches in one graph, routes by timestep, blocks that are left out, and what is refused."""

from __future__ import annotations

import shutil
from importlib import resources

import pytest
import torch

from qdiff.errors import InputError
from qdiff.files import read_json
from qdiff.models import FAMILIES
from qdiff.plan.plan import Plan
from qdiff.plan.routing_plan import REUSE
from qdiff.quantization.checkpoint import load_quantized
from qdiff.recording.trajectory import Trajectory
from qdiff.routing.follow import predict
from qdiff.runs.run import Run
from qdiff.stages.build import load_runner

pytestmark = pytest.mark.slow

SETTINGS = ("--weights", "random:pixart-tiny", "--samples", 4, "--batch", 2, "--steps", 6)
ROUTED = ("--recipe", "routed", "--set", "routing.pictures=1", "--set", "routing.rule=table")


@pytest.fixture(scope="module")
def calibrated(cli, tmp_path_factory):
    path = tmp_path_factory.mktemp("routed") / "run"
    assert cli("calibrate", *SETTINGS, "-o", path).code == 0
    return path


@pytest.fixture(scope="module")
def routed(cli, calibrated):
    """Blocks in INT8 and NVFP4, with what they added kept, in engines of both targets."""
    reuse = "routing.reuse={loss_db: 20, in_a_row: 1}"
    for command in (
        ("quantize", calibrated, *ROUTED, "--budget", "bits=7", "--set", reuse),
        ("export", calibrated, "--target", "onnxruntime"),
        ("export", calibrated, "--target", "tensorrt"),
        ("build", calibrated, "--engine", "onnxruntime"),
        ("build", calibrated, "--engine", "openvino"),
        ("compare", calibrated, "--engine", "onnxruntime", "--pictures", 1),
        ("report", calibrated),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return calibrated


def test_plan_and_report_tell_routes_and_what_they_cost(routed):
    plan = Plan.load(routed / "plan.json")
    routing = plan.routing
    assert routing is not None and routing.rule == "table" and routing.reuse is not None
    assert [block.name for block in routing.blocks] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert routing.used_bits <= 7 < routing.resident_bits and 0 < routing.skipped < 0.5
    names = [layer.name for layer in plan.layers]
    for block in routing.blocks:
        if len(block.branches) == 2:
            assert f"{block.name}.branches.1.attn1.to_q" in names and len(set(block.table)) == 2
    tried = read_json(routed / "routing.json", "the routes")
    assert [row["name"] for row in tried["rules"]] == ["static", "table", "table, weighed"] and len(
        tried["influence"]
    ) == 6
    assert [row["name"] for row in tried["uniform"]] == ["int8", "nvfp4"]
    report = read_json(routed / "report.json", "the report")["routing"]
    assert len(report["routes"]) == 6 and report["resident_bits"] == routing.resident_bits
    page = (routed / "report.html").read_text()
    assert 'id="routing"' in page and "left out" in page


def test_weights_alone_change_where_activations_have_scales_by_token(cli, fails, calibrated, tmp_path):
    path, narrow = shutil.copytree(calibrated, tmp_path / "run"), tmp_path / "narrow.yaml"
    own = resources.files("qdiff.recipes").joinpath("w4a8.yaml").read_text()
    narrow.write_text(own.replace("int4_g64", "int4_g32"))  # this model's 32 columns are no 64
    wish = (f"routing.recipes=[int8-token, {narrow}]", *ROUTED[3::2])
    arguments = [part for one in wish for part in ("--set", one)]
    assert cli("quantize", path, "--recipe", "routed-token", *arguments, "--budget", "bits=6.5", "--force").code == 0
    plan = Plan.load(path / "plan.json")
    assert plan.routing is not None and 4.5 < plan.routing.used_bits <= 6.5
    inside = [layer for layer in plan.quantized if ".branches." in layer.name]
    assert {layer.weights for layer in inside} == {"int8", "int4_g32"} and {layer.activations for layer in inside} == {
        "int8"
    }
    assert cli("export", path, "--target", "onnxruntime", "--force").code == 0, "parity with torch, call by call"
    fails(3, "scales per token", "export", path, "--target", "tensorrt", "--force")


def test_predictors_are_made_where_no_rule_is_named(cli, calibrated, tmp_path):
    path = shutil.copytree(calibrated, tmp_path / "run")
    best = [*ROUTED[:-2], "--budget", "bits=7", "--force"]
    assert cli("quantize", path, *best).code == 0
    tried = read_json(path / "routing.json", "the routes")
    rules = ["static", "table", "predicted", "table, weighed", "predicted, weighed"]
    assert [row["name"] for row in tried["rules"]] == rules
    assert set(tried["r2"]) == {"transformer_blocks.0", "transformer_blocks.1"}


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_takes_the_routes_and_deltas_that_torch_takes(routed, engine, integer_arithmetic):
    plan = Plan.load(routed / "plan.json")
    module, runner = load_quantized(plan, routed / "model.safetensors"), load_runner(Run.existing(routed), engine, None)
    assert {spec.name for spec in runner.inputs} == {spec.name for spec in FAMILIES["pixart"].inputs(plan.config)}
    runner.router.record = True
    for step in Trajectory(routed / "calibration").steps(1):
        wanted = predict(FAMILIES["pixart"], module, step.inputs)
        assert torch.allclose(runner(step.inputs), wanted, atol=0.02 * float(wanted.abs().max())), step.timestep
    routes = [routes for _, routes in runner.router.history]
    assert any(REUSE in each for each in routes) and any(0 in each for each in routes)
    samples = len(step.inputs["timestep"])
    assert all(REUSE not in each for each in routes[:samples]), "there is nothing to reuse yet"
    with pytest.raises(InputError, match="depend on the sample, and it was given 4 at once"):
        FAMILIES["pixart"].call(module, step.inputs)
    runner.close()


def test_one_route_for_all_is_the_recipe_itself(calibrated):
    from qdiff.allocation.assemble import Version, assemble, joined_plan, share_clock
    from qdiff.allocation.candidates import with_own_backbone
    from qdiff.quantization.quantize import quantize
    from qdiff.recipes import load_recipe
    from qdiff.recording.activation_statistics import Statistics
    from qdiff.stages.calibrated_model import reload_model

    model, trajectory = reload_model(Run.existing(calibrated)), Trajectory(calibrated / "calibration")
    statistics = Statistics.load(calibrated / "calibration" / "statistics.safetensors")
    versions = []
    for name in ("int8", "nvfp4"):
        own = with_own_backbone(model)
        plan = quantize(own, load_recipe(name), statistics, trajectory)
        versions.append(Version(plan, own.backbone))
    step = next(iter(trajectory))
    alone = [model.family.call(version.backbone, step.inputs) for version in versions]
    assert not torch.equal(*alone)
    share_clock(versions)
    blocks = {name: [0, 1] for name in model.family.blocks(model.backbone)}
    branch_state = assemble(versions, blocks, keep=False)
    for branch, expected in enumerate(alone):
        branch_state.routes = [branch] * len(blocks)
        assert torch.equal(model.family.call(versions[0].backbone, step.inputs), expected)
    names = [layer.name for layer in joined_plan(versions, blocks, False, "routed").layers]
    assert len(set(names)) == len(names) and sum(".branches.1." in name for name in names) == sum(
        layer.name.startswith(tuple(f"{block}." for block in blocks)) for layer in versions[1].plan.layers
    )


def test_tensorrt_builds_both_branches_for_one_batch(routed, cli, fails):
    pytest.importorskip("tensorrt_rtx")
    build = ("build", routed, "--engine", "tensorrt_rtx", "--compute-capability", "12.0")
    assert cli(*build).code == 0
    fails(2, ["one batch size", "--profile batch=1"], *build, "--profile", "batch=1-4")


def test_one_step_has_nothing_to_route_by(cli, tmp_path):
    path = tmp_path / "run"
    assert cli("calibrate", "--weights", "random:pixart-tiny", "--samples", 1, "--steps", 1, "-o", path).code == 0
    reuse = "routing.reuse={loss_db: 1}"
    assert cli("quantize", path, "--recipe", "routed", "--budget", "bits=7", "--set", reuse).code == 0
    assert [row["name"] for row in read_json(path / "routing.json", "the routes")["rules"]] == ["static"]


def test_a_plan_with_branches_is_not_applied_by_hand(routed, fails):
    fails(3, "several branches", "quantize", routed, "--plan", routed / "plan.json", "--force")


def test_what_cannot_be_routed_is_refused(calibrated, fails, tmp_path):
    quantize = ("quantize", calibrated, "--force", *ROUTED)
    fails(3, "below", *quantize, "--budget", "bits=2")
    fails(3, "one recipe", *quantize, "--set", "routing.recipes=[int8]")
    fails(3, "chooses among others", *quantize, "--set", "routing.recipes=[int8, mixed]")
    fails(3, "routing.budget", *quantize, "--set", "routing.budget={bytes: 5}")
