"""Sparse attention on the command line: from --attention to an engine that is given other lists at other timesteps."""

from __future__ import annotations

import shutil

import pytest
import torch

from qdiff.attention.sparse import SIDECAR, load_masks, schedule_of, schedule_state_of
from qdiff.events import Progress
from qdiff.files import read_json
from qdiff.models import FAMILIES
from qdiff.plan.plan import Plan
from qdiff.quantization.checkpoint import load_quantized
from qdiff.recording.trajectory import Trajectory
from qdiff.routing.follow import predict
from qdiff.runs.run import Run

pytestmark = pytest.mark.slow

SETTINGS = ("--model", "wan", "--weights", "random:wan-tiny", "--samples", 2, "--steps", 8, "--batch", 2)


@pytest.fixture(scope="module")
def sparse(cli, tmp_path_factory):
    """A run of the smallest video model at half density, with an ONNX Runtime engine."""
    path = tmp_path_factory.mktemp("sparse") / "run"
    for command in (
        ("calibrate", *SETTINGS, "--attention", "-o", path),
        ("quantize", path, "--recipe", "int8", "--density", 0.5),
        ("export", path, "--target", "onnxruntime"),
        ("build", path, "--engine", "onnxruntime"),
        ("compare", path, "--engine", "onnxruntime", "--pictures", 1),
        ("report", path),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return path


def test_the_plan_and_the_report_say_what_every_head_reads(sparse):
    plan = Plan.load(sparse / "plan.json").attention
    assert plan is not None and [layer.name for layer in plan.layers] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert plan.density <= 0.5 + 1e-9 and plan.overall > plan.density, "the noisiest steps are dense"
    heads = [head for layer in plan.layers for head in layer.heads]
    assert len(heads) == 4 and all(len(head.density) == len(plan.edges) == 3 for head in heads)
    assert all(0 < share <= 1 for head in heads for share in [*head.density, *head.recall])
    report = read_json(sparse / "report.json", "the report")["attention"]
    assert [head["recall"] for head in report["heads"]] == [head.recall for head in heads]
    page = (sparse / "report.html").read_text()
    assert 'id="attention"' in page and "blocks.1.attn1" in page and (sparse / "attention.png").exists()


def test_an_engine_gets_the_lists_of_its_timestep(sparse):
    from qdiff.stages.build import load_runner

    run, plan = Run.existing(sparse), Plan.load(sparse / "plan.json")
    runner = load_runner(run, "onnxruntime", None)
    assert {spec.name for spec in runner.inputs} == {"hidden_states", "encoder_hidden_states", "timestep"}
    steps = {runner.schedule.group(step.timestep): step for step in Trajectory(sparse / "calibration").steps(0)}
    assert set(steps) == {0, 1, 2, 3}
    module = load_quantized(plan, sparse / "model.safetensors")
    for group, step in steps.items():
        wanted = FAMILIES["wan"].call(module, step.inputs)
        assert torch.allclose(runner(step.inputs), wanted, atol=2e-3), group
        assert schedule_state_of(module).now[0] is schedule_state_of(module).schedule.lists[group].blocks
    # The same engine with everything to read: another answer, so the lists are not idle.
    dense = runner.schedule.lists[0]
    step = steps[2]
    everything = {"attention_blocks": dense.blocks, "attention_bounds": dense.bounds}
    assert not torch.allclose(runner.runner({**step.inputs, **everything}), runner(step.inputs), atol=1e-4)
    runner.close()


def test_what_is_left_out_is_what_masks_say(sparse):
    plan = Plan.load(sparse / "plan.json").attention
    masks = load_masks(plan, sparse / SIDECAR)
    densities = torch.tensor([[head.density for layer in plan.layers for head in layer.heads]])[0].T
    assert torch.allclose(masks.double().mean(dim=(2, 3)), densities.double())
    assert schedule_of(plan, masks).lists[1].density(masks.shape[-1]).tolist() == pytest.approx(densities[0].tolist())


def test_an_edited_plan_keeps_its_attention(sparse, cli, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(sparse, copy)
    result = cli("quantize", copy, "--plan", copy / "plan.json", "--force")
    assert result.code == 0, result.err
    assert Plan.load(copy / "plan.json").attention == Plan.load(sparse / "plan.json").attention
    assert (copy / SIDECAR).read_bytes() == (sparse / SIDECAR).read_bytes()
    assert (copy / "model.safetensors").read_bytes() == (sparse / "model.safetensors").read_bytes()


def test_a_whole_model_is_trained_with_its_attention_sparse(sparse, cli, tmp_path, monkeypatch):
    from qdiff.attention import operator

    run = tmp_path / "run"
    shutil.copytree(sparse, run)
    calls, gradients = [], operator.gradients

    def watched(*arguments: object) -> object:
        calls.append(arguments)
        return gradients(*arguments)

    monkeypatch.setattr(operator, "gradients", watched)
    training = ("--set", "distil.iterations=6", "--set", "distil.rate=0.02")
    assert cli("quantize", run, "--recipe", "int8", "--density", 0.4, *training, "--force").code == 0
    plan = Plan.load(run / "plan.json")
    read = [int(lists.bounds[-1]) for _, _, _, _, lists, *_ in calls]
    assert len(read) == 6 * 2 and min(read) < max(read), "both attentions of six calls, some of them sparse"
    assert all("distillation" in layer.why for layer in plan.quantized) and plan.attention.asked == 0.4


@pytest.fixture(scope="module")
def routed(sparse, cli, tmp_path_factory):
    """The same calibration, with blocks that change between INT8 and NVFP4 and are left out, in an ONNX Runtime engine."""
    path = tmp_path_factory.mktemp("routed") / "run"
    shutil.copytree(sparse, path)
    wish = ["routing.pictures=1", "routing.rule=table", "routing.reuse={loss_db: 20, in_a_row: 1}"]
    arguments = [part for one in wish for part in ("--set", one)]
    for command in (
        ("quantize", path, "--recipe", "routed", "--budget", "bits=7", "--density", 0.5, *arguments, "--force"),
        ("export", path, "--target", "onnxruntime", "--force"),
        ("export", path, "--target", "tensorrt"),
        ("build", path, "--engine", "onnxruntime", "--force"),
        ("report", path),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def joint(cli, tmp_path_factory):
    """A run at half density of a model whose text and video are one sequence, with an ONNX Runtime engine."""
    path = tmp_path_factory.mktemp("joint") / "run"
    settings = ("--model", "cogvideox", "--weights", "random:cogvideox-tiny", "--samples", 1, "--steps", 6)
    for command in (
        ("calibrate", *settings, "--attention", "-o", path),
        ("quantize", path, "--recipe", "int8", "--density", 0.5),
        ("export", path, "--target", "onnxruntime"),
        ("build", path, "--engine", "onnxruntime"),
    ):
        result = cli(*command)
        assert result.code == 0, result.err
    return path


def test_text_in_the_sequence_is_read_by_all_and_not_counted(joint):
    from qdiff.stages.build import load_runner
    from qdiff.stages.calibrated_model import reload_model

    run, plan = Run.existing(joint), Plan.load(joint / "plan.json")
    assert plan.attention is not None and (plan.attention.text, plan.attention.tokens) == (16, 64)
    schedule = schedule_of(plan.attention, load_masks(plan.attention, joint / SIDECAR))
    assert all(len(lists.blocks) == 3 and lists.blocks.max() < 3 for lists in schedule.lists), "blocks of video alone"
    family, module = FAMILIES["cogvideox"], load_quantized(plan, joint / "model.safetensors")
    runner = load_runner(run, "onnxruntime", None)
    steps = {runner.schedule.group(step.timestep): step for step in Trajectory(joint / "calibration").steps(0)}
    for group, step in steps.items():
        assert torch.allclose(runner(step.inputs), family.call(module, step.inputs), atol=2e-3), group
    backbone = reload_model(run).backbone
    step = steps[1]
    wanted = family.call(backbone, step.inputs)
    for name in family.self_attentions(backbone):
        attend = torch.nn.functional.scaled_dot_product_attention
        backbone.get_submodule(name).set_processor(family.attention_processor(attend))
    torch.testing.assert_close(family.call(backbone, step.inputs), wanted)


def test_masses_are_those_of_all_probabilities(joint):
    """Against probabilities of the whole sequence, text included, in the model's own order of tokens."""
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions
    from qdiff.stages.calibrated_model import reload_model

    model, trajectory = reload_model(Run.existing(joint)), Trajectory(joint / "calibration")
    options = AttentionOptions(block=24, orders=("fhw",))
    calibration = AttentionCalibration(model, trajectory, options, None)
    calibration.heads = 2
    tiling, seen = calibration.tiling, {}

    def look(layer, q, k, v):
        shares = torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=3)[:, :, 16:, 16:]
        blocks = shares.unflatten(3, (2, 24)).sum(dim=4).unflatten(2, (2, 24)).mean(dim=3)
        seen.setdefault(layer, []).append(blocks.amax(dim=0))

    names = [["fhw"] * 2 for _ in calibration.layers]
    with Progress("attention", 100) as calibration.progress:
        mass = calibration._add_up(names)["mass"]
        for step in calibration.shards[0][0]:
            calibration._replay(step, look)
    assert (tiling.rows, tiling.columns, tiling.text_rows) == (2, 2, 1), "16 tokens of text in a block of 24"
    for number, layer in enumerate(calibration.layers):
        torch.testing.assert_close(mass[0, number], torch.stack(seen[layer]).amax(dim=0))


def test_blocks_with_branches_follow_lists_in_each_of_them(routed):
    from qdiff.engines import choose_engine
    from qdiff.errors import UsageError
    from qdiff.plan.routing_plan import REUSE
    from qdiff.stages.build import load_runner, make_options

    run, plan = Run.existing(routed), Plan.load(routed / "plan.json")
    assert plan.attention is not None and plan.routing is not None
    module = load_quantized(plan, routed / "model.safetensors")
    runner = load_runner(run, "onnxruntime", None)
    assert {spec.name for spec in runner.inputs} == {"hidden_states", "encoder_hidden_states", "timestep"}
    runner.router.record = True
    seen = set()
    for step in Trajectory(routed / "calibration").steps(0):
        wanted = predict(FAMILIES["wan"], module, step.inputs)
        assert torch.allclose(runner(step.inputs), wanted, atol=0.02 * float(wanted.abs().max())), step.timestep
        seen.add(runner.runner.schedule.group(step.timestep))
    routes = {route for _, each in runner.router.history for route in each}
    assert seen == {0, 1, 2, 3} and REUSE in routes and len(routes) > 1
    branches = [m.branches for m in module.modules() if hasattr(m, "branches")]
    assert any(len(each) == 2 for each in branches)
    assert all(branch.attn1.sparse.first == each[0].attn1.sparse.first for each in branches for branch in each)
    page = (routed / "report.html").read_text()
    assert 'id="attention"' in page and 'id="routing"' in page
    runner.close()
    with pytest.raises(UsageError, match="crashes on sparse attention inside an If"):
        make_options(run, choose_engine("tensorrt_rtx"), [], "12.0", {})


def test_calibration_of_attention_resumes(sparse, monkeypatch):
    """A killed calibration goes on with the next pass, to the same numbers."""
    from qdiff.attention.statistics import AttentionStatistics
    from qdiff.calib.attention import AttentionCalibration, AttentionOptions
    from qdiff.runs.partial import Scratch
    from qdiff.stages.calibrated_model import reload_model

    run = Run.existing(sparse)
    model, trajectory = reload_model(run), Trajectory(sparse / "calibration")
    scratch = Scratch(sparse.parent / "passes", "one")
    with monkeypatch.context() as patch:
        patch.setattr(AttentionCalibration, "_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            AttentionCalibration(model, trajectory, AttentionOptions(), scratch).run()
        assert all(type(module.processor).__module__.startswith("diffusers") for module in
                   (model.backbone.blocks[0].attn1, model.backbone.blocks[1].attn1)), "put back"  # fmt: skip
        patch.setattr(AttentionCalibration, "_choose_orders", None)
        patch.setattr(AttentionCalibration, "_add_up", None)
        patch.undo()
    again = AttentionCalibration(model, trajectory, AttentionOptions(), scratch).run()
    first = AttentionStatistics.load(sparse / "attention" / "statistics.safetensors")
    assert again.orders == first.orders
    assert torch.equal(again.errors, first.errors) and torch.equal(again.mass, first.mass)


def test_what_cannot_be_is_refused(sparse, fails, filmed, tmp_path):
    fails(3, ["--attention", "not calibrated"], "quantize", filmed, "--density", 0.5, "--force")
    for wrong in (0, -1, 1.5, "nan"):
        fails(2, "--density", "quantize", sparse, f"--density={wrong}", "--force")
    fails(3, ["one block", "at least 0.334 can be had"], "quantize", sparse, "--density", 0.01, "--force", "--dry-run")
    fails(3, "numerics", "quantize", sparse, "--density", 0.5, "--set", "attention.numerics=fp9", "--force")
    fails(3, "known: density, numerics", "quantize", sparse, "--density", 0.5, "--set", "attention.foo=1", "--force")
    fails(3, "--set attention.density=", "quantize", sparse, "--set", "attention.numerics=fp8", "--force")
    fails(
        2,
        ["for the size that was calibrated", "--frames"],
        "build",
        sparse,
        "--engine",
        "onnxruntime",
        "--profile",
        "128",
    )
    alone = shutil.copy(sparse / "plan.json", tmp_path / "plan.json")
    fails(3, ["plan.json", SIDECAR], "quantize", sparse, "--plan", alone, "--force")


def test_attention_that_no_graph_can_say_is_announced_and_refused(sparse, cli, fails, tmp_path):
    copy = shutil.copytree(sparse, tmp_path / "run")
    wish = ("--recipe", "int8", "--density", 0.5, "--set", "attention.numerics=bf16", "--force")
    result = cli("quantize", copy, *wish)
    assert result.code == 0 and "runs in torch alone" in result.err
    fails(3, ["bf16 has no ONNX form", "float, int8_fp8, fp8"], "export", copy, "--target", "onnxruntime", "--force")


def test_densities_are_told_at_once_and_later(sparse, cli):
    plan = Plan.load(sparse / "plan.json").attention
    told = f"reads {100 * plan.density:.0f} % of its blocks, all attention {100 * plan.overall:.0f} %"
    assert told in cli("quantize", sparse, "--density", 0.5).out
    assert f"all attention {100 * plan.overall:.0f} %" in cli("inspect", sparse).out


def test_another_size_is_refused_and_never_a_wrong_clip(sparse, fails, tmp_path):
    for engine, message in (("eager", "calibrated for 48 tokens"), ("onnxruntime", "hidden_states")):
        given = ("--engine", engine, "--frames", 5, "-o", tmp_path / "x.mp4")
        fails(3, message, "generate", sparse, "--prompt", "x", *given)


def test_masks_of_another_plan_are_refused(sparse, cli, fails, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(sparse, copy)
    (copy / SIDECAR).write_bytes((copy / SIDECAR).read_bytes()[:-1])
    fails(5, "sha256 differs", "generate", copy, "--prompt", "x", "-o", tmp_path / "x.mp4", "--engine", "eager")
