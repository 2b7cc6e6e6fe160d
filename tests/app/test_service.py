"""The service on the true path: real engines, real pictures, memory that runs out, engines that are let go."""

from __future__ import annotations

import json
import logging

import pytest

from qdiff.app.limits import Limits
from qdiff.app.settings import Settings
from qdiff.errors import InputError, MemoryExhaustedError
from qdiff.evaluation.images import read_metadata
from tests.waiting import wait_until


def test_a_picture_says_how_it_was_made_and_can_be_made_again(service, draw):
    made = draw(engine="openvino", prompt="a <b>red</b> apple", seed=7).result
    info = read_metadata(made.paths[0])
    assert (info.prompt, info.seed, info.steps, info.engine) == ("a <b>red</b> apple", 7, 2, "openvino")
    again = Settings.parse(json.dumps(made.facts()), 8000)
    assert again == made.settings and None not in again.to_json().values()
    repeated = service.generate(again, "test").wait(60).result
    assert repeated.paths[0].read_bytes() == made.paths[0].read_bytes()
    assert draw(engine="float", seed=7).result.paths[0].read_bytes() != made.paths[0].read_bytes()


def test_several_pictures_have_following_seeds(draw):
    import numpy
    from PIL import Image

    made = draw(pictures=3, seed=5).result
    assert [read_metadata(path).seed for path in made.paths] == [5, 6, 7]
    third = made.each()[2]
    assert (third.settings.seed, third.settings.pictures) == (7, 1)
    beside, alone = (draw(**{**one.settings.to_json(), "engine": "float"}).result.paths[-1] for one in (made, third))
    pixels = [numpy.asarray(Image.open(path).convert("RGB"), int) for path in (beside, alone)]
    assert abs(pixels[0] - pixels[1]).max() <= 1, "a picture does not depend on its batch, but for the last rounding"


def test_without_a_seed_one_is_drawn_and_told(draw):
    assert draw(seed=None).result.settings.seed != draw(seed=None).result.settings.seed


def test_another_size(draw):
    from PIL import Image

    with Image.open(draw(width=160, height=96).result.paths[0]) as image:
        assert image.size == (160, 96)


def test_steps_previews_and_an_estimate_are_told(service):
    job = service.generate(Settings.make(prompt="a cat", steps=60, engine="float"), "test")
    seen = list(job.updates())
    running = [update for update in seen if update.step and not update.final]
    assert running and all(update.steps == 60 and update.seconds_left >= 0 for update in running)
    assert any(update.preview is not None for update in running)
    assert seen[-1].state == "done" and seen[-1].preview is None


def test_comparison_has_float_first_and_numbers_beside_it(service):
    rows = (
        service.compare(Settings.make(prompt="a cat", steps=2, seed=3), ["openvino", "eager"], "test").wait(60).result
    )
    assert [row.engine for row in rows] == ["float", "openvino", "eager"]
    assert rows[0].psnr_db is None and all(10 < row.psnr_db < 100 and row.ssim > 0.3 for row in rows[1:])
    assert all(row.seconds_per_step > 0 and row.memory_bytes > 0 and row.size_bytes > 0 for row in rows)
    assert (
        rows[2].size_bytes < rows[0].size_bytes
    )  # the packed weights; a graph of this small model is larger than they are


@pytest.mark.slow
def test_bundled_models_need_no_run(make_service):
    service = make_service(runs=[])
    sources = service.sources.all()
    assert {source.family.name for source in sources} == {"pixart", "stable-diffusion", "wan"}
    for source in sources:
        assert [engine.name for engine in source.engines()] == ["float"]
        settings = Settings.make(prompt="a rocket on a blue background", model=source.name, steps=2)
        made = service.generate(settings, "test").wait(60).result
        assert made.settings.width == made.settings.height == 64 and "comes with qdiff" in made.note
    with pytest.raises(InputError, match="no quantized engine"):
        service.compare(Settings.make(prompt="a"), [], "test")


def test_a_cancelled_picture_frees_the_slot_within_one_step(service):
    job = service.generate(Settings.make(prompt="a cat", steps=100, width=256, height=256, engine="float"), "test")
    at = wait_until(lambda: job.update.step)
    service.cancel("test")
    assert job.wait(30).state == "cancelled" and job.update.step <= at + 2
    assert not service.busy or service.queue_length == 0


def test_the_wall_clock_holds(make_service):
    service = make_service(Limits(seconds=0.5))
    service.warm().wait(60)
    update = service.generate(Settings.make(prompt="a", steps=100, width=512, height=512), "test").wait(60)
    assert update.state == "failed" and "took longer than" in update.error.message


class Failing:
    """An engine whose call ``at`` raises; the calls after it work."""

    def __init__(self, runner, error: BaseException, at: int, times: int) -> None:
        self.runner, self.error, self.at, self.left = runner, error, at, times

    def __call__(self, inputs):
        self.at -= 1
        if self.at < 0 and self.left:
            self.left -= 1
            raise self.error
        return self.runner(inputs)

    def close(self) -> None:
        self.runner.close()


def spoil(service, engine: str, error: BaseException, at: int = 1, times: int = 1):
    """Makes a loaded engine fail."""
    loaded = service._pool._engines[service.sources[""].name, engine]
    stand_in = loaded.session._stand_in
    stand_in.runner = Failing(stand_in.runner, error, at, times)


def counted(service, name: str) -> float:
    """One counter of /metrics."""
    return sum(
        float(line.rpartition(" ")[2]) for line in service.metrics.text().decode().splitlines() if line.startswith(name)
    )


def test_memory_that_runs_out_in_the_middle_lets_the_others_go_and_tries_again(service, draw):
    import torch

    draw(engine="onnxruntime")
    draw(engine="openvino")
    spoil(service, "openvino", torch.OutOfMemoryError("CUDA out of memory"))
    before = counted(service, "qdiff_out_of_memory_total")
    assert draw(engine="openvino").state == "done"
    assert counted(service, "qdiff_out_of_memory_total") == before + 1
    assert [engine for _, engine in service._pool.loaded] == ["openvino"]


@pytest.mark.slow
def test_memory_that_stays_out_fails_the_request_and_not_the_service(service, draw):
    draw(engine="onnxruntime")
    draw(engine="openvino")
    spoil(service, "openvino", MemoryError(), times=2)
    update = draw(engine="openvino")
    assert update.state == "failed" and isinstance(update.error, MemoryExhaustedError) and update.error.fix
    assert service._pool.loaded == []
    assert draw(engine="openvino").state == draw(engine="float").state == "done"


def test_a_bug_is_a_number_here_and_a_traceback_in_the_log(service, draw, caplog):
    draw(engine="openvino")
    spoil(service, "openvino", ValueError("secret /etc/hostname"))
    with caplog.at_level(logging.ERROR, logger="qdiff.app"):
        error = draw(engine="openvino").error
    number = error.fix.split()[-1].rstrip(".")
    assert "secret" not in str(error) and number in caplog.text and "Traceback" in caplog.text
    assert draw(engine="openvino").state == "done"


def test_errors_name_no_path_of_this_machine(service, finished, draw):
    error = service.shown(InputError(f"{finished.path}/engines/x is broken", f"see {finished.path}"))
    assert str(finished.path) not in str(error) and "broken" in error.message and isinstance(error, InputError)


def test_a_changed_engine_is_refused(make_service, spoilt):
    from qdiff.runs.run import Run

    folder = spoilt / Run(spoilt).entry("build:openvino")["folder"]
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    service = make_service(runs=[spoilt])
    update = service.generate(Settings.make(prompt="a", engine="openvino", steps=1), "test").wait(60)
    assert update.state == "failed" and update.error.exit_code == 5 and str(spoilt) not in str(update.error)
    assert service.generate(Settings.make(prompt="a", engine="float", steps=1), "test").wait(60).state == "done"


@pytest.mark.slow
def test_engines_are_loaded_once_and_the_oldest_goes_first(make_service):
    service = make_service()
    for engine in ("openvino", "float", "openvino"):
        service.generate(Settings.make(prompt="a", steps=1, engine=engine), "test").wait(60)
    assert counted(service, "qdiff_engine_loads_total") == 2
    service._pool.budget_bytes = 0
    service.generate(Settings.make(prompt="a", steps=1, engine="onnxruntime"), "test").wait(60)
    assert [engine for _, engine in service._pool.loaded] == ["onnxruntime"]
    assert counted(service, "qdiff_engine_evictions_total") == 2


def test_old_pictures_are_removed(make_service):
    service = make_service(Limits(kept_pictures=2))
    for seed in range(4):
        service.generate(Settings.make(prompt="a", steps=1, seed=seed), "test").wait(60)
    assert len(list((service.folder / "pictures").iterdir())) <= 3


def test_nothing_is_left_after_closing(make_service):
    service = make_service()
    service.generate(Settings.make(prompt="a", steps=1), "test").wait(60)
    service.close()
    assert not service.folder.exists()


def test_the_preview_looks_like_its_picture():
    """Nearer to its own picture, made small, than another picture is."""
    import numpy as np

    from qdiff.app.previews import Previewer
    from qdiff.models import FAMILIES, Request

    model = FAMILIES["pixart"].load("bundled")
    previewer, seen = Previewer(model), []
    request = Request(["a rocket on a blue background"], [7], steps=6)
    (picture,) = model.generate(request, lambda step, timestep, latents: seen.append(previewer(latents)))
    (other,) = model.generate(Request(["a cheese wedge on a red background"], [7], steps=6))
    own, foreign = (np.asarray(image.convert("RGB").resize((16, 16)), float) for image in (picture, other))
    for preview in (seen[1], seen[-1]):
        assert abs(np.asarray(preview, float) - own).mean() < 0.5 * abs(own - foreign).mean()
