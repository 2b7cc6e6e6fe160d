"""Recording and collecting: what is kept, that statistics are exact, and that a kill at any moment changes no byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qdiff.calib.collect import find_groups
from qdiff.calib.observers import OBSERVERS
from qdiff.calib.prompts import choose_prompts, read_prompts
from qdiff.calib.record import Recording, record
from qdiff.calib.timesteps import STRATEGIES
from qdiff.errors import InputError, IntegrityError
from qdiff.models.layers import quantizable_layers
from qdiff.recording.activation_statistics import HISTOGRAM_STEP, InputStatistics, Statistics
from qdiff.recording.trajectory import Trajectory

TIMES = [999.0 - 20 * i for i in range(50)]


def positions(name: str, count: int, seed: int = 0) -> list[int]:
    return STRATEGIES[name](TIMES, count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("count", [1, 2, 7, 49, 50, 51, 1000])
def test_a_strategy_gives_sorted_different_positions(name, count):
    kept = positions(name, count)
    assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < len(TIMES)
    assert len(kept) == (50 if name == "all" else min(count, 50))
    assert positions(name, count) == kept


def test_uniform_covers_both_ends_evenly():
    for count in (2, 5, 25, 37):
        kept = positions("uniform", count)
        assert kept[0] == 0 and kept[-1] == 49
        gaps = {b - a for a, b in zip(kept, kept[1:], strict=False)}
        assert max(gaps) - min(gaps) <= 1


def test_normal_is_skewed_to_the_clean_end_and_follows_its_seed():
    drawn = [positions("normal", 10, seed) for seed in range(200)]
    mean = sum(TIMES[i] for kept in drawn for i in kept) / 2000
    # The density of the formula itself, without repetition, pulls less than 0.4 T; noise of 2000 draws is about 6.
    assert 400 < mean < 490
    assert len({tuple(kept) for kept in drawn}) > 150


PROMPT_FILES = {
    "empty": (b"", "holds no prompt"),
    "blank and comments": (b"\n  \n# a comment\n", "holds no prompt"),
    "binary": (bytes(range(256)), "not a text file"),
    "zero bytes": (b"a\x00b\n", "not a text file"),
    "utf-16": ("a cat\n".encode("utf-16"), "not a text file"),
    "100 kB line": (b"fine\n" + b"x" * 100_000 + b"\n", "line 2 of .* has 100,000 characters"),
    "too many": (b"a\n" * 10_001, "holds 10,001 prompts"),
}


@pytest.mark.parametrize("name", sorted(PROMPT_FILES))
def test_prompts_files_that_are_none(tmp_path, name):
    content, message = PROMPT_FILES[name]
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts(path)


def test_prompts_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot read the prompts file"):
        read_prompts(tmp_path / "none.txt")
    for path in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match="no regular file"):
            read_prompts(path)
    large = tmp_path / "large.txt"
    with open(large, "wb") as file:
        file.truncate(65_000_000)  # sparse
    with pytest.raises(InputError, match="has 65 MB, at most 64 MB are read"):
        read_prompts(large)


def test_prompts_are_the_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff# no\r\n a cat \r\n\nein Fuchs, grün\n日本\n".encode())
    prompts = read_prompts(path)
    assert [prompt.lstrip("\ufeff") for prompt in prompts][-3:] == ["a cat", "ein Fuchs, grün", "日本"]
    assert len(prompts) == 3, "a byte order mark is no prompt"
    assert choose_prompts(prompts, 2) == prompts[:2] and choose_prompts(prompts, None) == prompts
    with pytest.raises(InputError, match="4 samples were asked of 3 prompts"):
        choose_prompts(prompts, 4)


def observe(name: str, calls: list[tuple[torch.Tensor, int]], timesteps: int, restart: int | None = None) -> dict:
    observer = OBSERVERS[name](timesteps, calls[0][0].shape[1])
    for i, (x, timestep) in enumerate(calls):
        if i == restart:
            state = {key: value.clone() for key, value in observer.state().items()}
            observer = OBSERVERS[name](timesteps, x.shape[1])
            observer.restore(state)
        observer.update(x, timestep, torch.Generator().manual_seed(i))
    return observer.result()


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_an_observers_state_survives_a_restart_byte_for_byte(name):
    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(200, 6, generator=generator) * 10 ** (i % 3), i % 4) for i in range(12)]
    whole = observe(name, calls, 4)
    for restart in (1, 6, 11):
        again = observe(name, calls, 4, restart)
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_timestep_that_was_not_seen_has_the_range_zero():
    ranges = observe("range", [(torch.full((5, 3), 4.0), 1)], 2)
    assert ranges["low"].tolist() == ranges["high"].tolist() == [[0.0] * 3, [4.0] * 3]


def test_percentiles_are_within_a_bin():
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)).exp()
    empty = torch.zeros(0)
    entry = InputStatistics([], empty, empty, empty, observe("histogram", [(x, 1)], 2)["histogram"], empty, empty)
    ordered = x.abs().flatten().sort().values
    for share in (0.01, 0.5, 0.9, 0.999, 1.0):
        exact = float(ordered[max(0, round(share * len(ordered)) - 1)])
        for got in (entry.percentile(share, 1), entry.percentile(share)):
            assert exact <= got * (1 + 1e-6) <= exact * 2 ** (1.01 * HISTOGRAM_STEP)


def test_zeros_and_extremes_count_too():
    x = torch.tensor([[0.0, 1e-30, 1e30, -1.0]])
    histogram = observe("histogram", [(x, 0)], 1)["histogram"]
    assert histogram.sum() == 4 and histogram[0, 0] == 2 and histogram[0, -1] == 1


def test_the_trajectory_has_both_guidance_branches_in_the_pipelines_order(finished):
    trajectory = Trajectory(finished.path / "calibration")
    assert len(trajectory.paths) == 2
    batches = []
    for shard in range(2):
        steps = list(trajectory.steps(shard))
        times = [step.timestep for step in steps]
        assert times == sorted(times, reverse=True) and len(set(times)) == 4
        states = steps[0].inputs["encoder_hidden_states"]
        batches.append(len(states))
        half = len(states) // 2
        assert (states[:half] == states[0]).all(), "the empty prompt first, the same for all"
        assert not torch.equal(states[half], states[half + 1])
        for step in steps:
            x = step.inputs["hidden_states"]
            assert torch.equal(x[:half], x[half:]) and (step.inputs["timestep"] == step.timestep).all()
    assert batches == [6, 4]


def test_without_guidance_there_is_one_branch(tiny, tmp_path):
    model = tiny()
    paths = record(model, Recording(["a", "b", "c"], steps=2, guidance=1.0, batch=2), tmp_path)
    shards = [next(Trajectory(tmp_path).steps(i)) for i in range(len(paths))]
    assert [len(step.inputs["hidden_states"]) for step in shards] == [2, 1]


def test_groups_are_the_layers_that_read_one_tensor(finished, tiny):
    model = tiny()
    groups = find_groups(model, next(iter(Trajectory(finished.path / "calibration"))))
    block = "transformer_blocks.0."
    assert groups[block + "attn1.to_q"] == [block + f"attn1.to_{n}" for n in "qkv"]
    assert groups[block + "attn2.to_q"] == [block + "attn2.to_q"]
    assert groups[block + "attn2.to_k"] == [block + "attn2.to_k", block + "attn2.to_v"]
    assert sorted(name for names in groups.values() for name in names) == sorted(quantizable_layers(model.backbone))


def test_statistics_are_what_a_loop_over_the_trajectory_computes(finished, tiny):
    model = tiny()
    statistics = Statistics.load(finished.path / "calibration" / "statistics.safetensors")
    trajectory = Trajectory(finished.path / "calibration")
    seen: dict[str, dict[float, list[torch.Tensor]]] = {name: {} for name in quantizable_layers(model.backbone)}
    out: dict[str, dict[float, float]] = {name: {} for name in seen}
    now, real = 0.0, torch.zeros(0)

    def watch(name: str):
        def hook(module, args, output):
            # k and v of the prompt, and what makes their input, are given the padding that attention never looks at
            of_text = name.startswith("caption_projection") or name.endswith(("attn2.to_k", "attn2.to_v"))
            x, y = (tensor[real] if of_text else tensor.flatten(0, -2) for tensor in (args[0], output))
            seen[name].setdefault(now, []).append(x)
            out[name][now] = max(out[name].get(now, 0.0), float(y.abs().max()))

        return hook

    for name, layer in quantizable_layers(model.backbone).items():
        layer.register_forward_hook(watch(name))
    for step in trajectory:
        now, real = step.timestep, step.inputs["encoder_attention_mask"].bool()
        assert 0 < real.sum() < real.numel(), "prompts are padded"
        with torch.inference_mode():
            model.family.call(model.backbone, step.inputs)
    assert statistics.timesteps == sorted({step.timestep for step in trajectory}, reverse=True)
    for entry in statistics.inputs.values():
        for layer in entry.layers:  # members of a group read the very same values
            for index, time_ in enumerate(statistics.timesteps):
                x = torch.cat(seen[layer][time_])
                assert torch.equal(entry.low[index], x.amin(0)) and torch.equal(entry.high[index], x.amax(0))
                assert torch.equal(entry.amax[index], x.abs().amax(0))
                torch.testing.assert_close(entry.square[index], x.double().square().mean(0).float(), rtol=1e-6, atol=0)
                assert float(statistics.outputs[layer][index]) == out[layer][time_]
                rows = entry.rows[entry.rows_timestep == index]
                assert len(rows) == 2 * 4 and (rows[:, None] == x[None]).all(-1).any(-1).all(), "rows are real tokens"


def test_padding_of_prompts_is_given_to_layers_and_read_by_nobody(finished, tiny):
    """What is left out of the statistics may be anything: the prediction does not change."""
    model, step = tiny(), next(iter(Trajectory(finished.path / "calibration")))
    read = model.family.read_by(model.backbone, step.inputs)
    assert len(read) == 2 + 2 * len(model.family.blocks(model.backbone))
    mask = next(iter(read.values()))
    states = step.inputs["encoder_hidden_states"]
    other = torch.where(mask[..., None], states, 100 * torch.randn_like(states))
    with torch.inference_mode():
        expected = model.family.call(model.backbone, step.inputs)
        assert torch.equal(model.family.call(model.backbone, {**step.inputs, "encoder_hidden_states": other}), expected)
        assert not torch.equal(
            model.family.call(model.backbone, {**step.inputs, "encoder_hidden_states": 2 * states}), expected
        )


def test_the_shards_do_not_matter(tiny, tmp_path):
    """Ranges do not depend on how prompts were batched, but for the last bits that another batch size rounds differently.

    Random rows are drawn by call, so they do depend on the batch: the batch is part of a calibration's inputs.
    """
    tables = []
    for batch in (1, 3):
        from qdiff.calib.collect import Collector

        model, folder = tiny(), tmp_path / str(batch)
        record(model, Recording(["a red apple", "a rocket", "cheese"], steps=2, batch=batch), folder)
        tables.append(Collector(model, Trajectory(folder), "x").collect(folder / "partial"))
    for name, entry in tables[0].inputs.items():
        torch.testing.assert_close(entry.amax, tables[1].inputs[name].amax, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(entry.square, tables[1].inputs[name].square, rtol=1e-4, atol=1e-7)


# Runs that are killed. The command is long enough that a signal finds it at work: 10 shards of one prompt.
ARGUMENTS = ["calibrate", "--weights", "random:pixart-tiny", "--samples", "10", "--batch", "1", "--steps", "6"]


def digests(run: Path) -> dict[str, str]:
    files = [
        path for path in run.rglob("*") if path.is_file() and path.name not in ("run.json", "run.copy.json", ".lock")
    ]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def start(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "qdiff", *ARGUMENTS, "-o", str(run)]

    def listen() -> (
        None
    ):  # a shell that starts its jobs in the background makes them deaf to Ctrl-C, and we inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}, preexec_fn=listen
    )


def kill_when(child: subprocess.Popen, ready, number: int, delay: float) -> tuple[int, str, str]:
    deadline = time.monotonic() + 400
    while not ready() and child.poll() is None:
        assert time.monotonic() < deadline, "the child never got as far"
        time.sleep(0.002)
    time.sleep(delay)
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    return child.returncode, out, err


@pytest.mark.slow
def test_a_kill_at_any_moment_changes_no_byte(cli, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert cli(*ARGUMENTS, "-o", whole).code == 0
    expected = digests(whole)
    shards = whole / "calibration"
    assert len(expected) == 10 + 2 and not list(shards.glob("*partial*"))
    chance = random.Random()

    # While it records: killed, then interrupted in good manners.
    after = chance.randrange(1, 5)
    delay = chance.random() * 0.03
    code, _, _ = kill_when(
        start(cut), lambda: len(list(cut.glob("calibration/trajectory-*"))) >= after, signal.SIGKILL, delay
    )
    left = digests(cut)
    assert code == -signal.SIGKILL and 0 < len([name for name in left if "trajectory" in name]) < 10, (after, delay)
    stamps = {path: path.stat().st_mtime_ns for path in cut.glob("calibration/trajectory-*")}
    code, out, err = kill_when(
        start(cut), lambda: len(list(cut.glob("calibration/trajectory-*"))) > len(stamps), signal.SIGINT, 0.0
    )
    assert code == 130 and "Traceback" not in err and "interrupted" in err and not out, err
    assert "less what an earlier try has done" in err
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "finished shards were made again"
    assert json.loads((cut / "run.json").read_text())["stages"]["calibrate"]["status"] == "begun"

    # While it collects.
    partial = cut / "calibration" / "statistics.partial.safetensors"
    code, _, _ = kill_when(start(cut), partial.exists, signal.SIGKILL, chance.random() * 0.02)
    assert code == -signal.SIGKILL, "it was too fast to be killed"
    result = cli(*ARGUMENTS, "-o", cut)
    assert result.code == 0, result.err
    assert digests(cut) == expected


def test_another_seed_or_model_is_refused_and_nothing_is_lost(finished, fails, cli, spoilt):
    before = digests(spoilt)
    same = [
        "calibrate",
        "--weights",
        "random:pixart-tiny",
        "--steps",
        "4",
        "--batch",
        "3",
        "--prompts",
        finished.prompts,
    ]
    fails(3, ["seed was 0 and is now 1", "fingerprint", "--force"], *same, "--seed", 1, "-o", spoilt)
    fails(3, ["guidance was null and is now 7.0"], *same, "--guidance", 7, "-o", spoilt)
    fails(3, ["prompts.count was 5 and is now 2"], *same, "--samples", 2, "-o", spoilt)
    assert digests(spoilt) == before
    assert cli(*same, "-o", spoilt).code == 0
    assert digests(spoilt) == before


def test_shards_of_another_calibration_are_not_mixed_in(tiny, tmp_path):
    model = tiny()
    prompts = Recording(["a", "b"], steps=2, batch=1)
    record(model, prompts, tmp_path / "theirs", "their fingerprint")
    shutil.copytree(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(IntegrityError, match="another calibration"):
        record(model, prompts, tmp_path / "ours", "our fingerprint")
    path = tmp_path / "theirs" / "trajectory-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(IntegrityError, match="damaged"):
        record(model, prompts, tmp_path / "theirs", "their fingerprint")


def test_a_folder_with_files_of_others_is_not_written_into(fails, tmp_path):
    (tmp_path / "run" / "calibration").mkdir(parents=True)
    (tmp_path / "run" / "calibration" / "trajectory-00000.safetensors").write_bytes(b"mine")
    fails(3, "holds files that this run did not make", *ARGUMENTS, "-o", tmp_path / "run")
    assert (tmp_path / "run" / "calibration" / "trajectory-00000.safetensors").read_bytes() == b"mine"
