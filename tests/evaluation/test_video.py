"""Clips: drawn and found again, judged by how they move, written as MP4 with their settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from qdiff.errors import InputError, IntegrityError
from qdiff.evaluation.images import PictureInfo, to_pixels
from qdiff.evaluation.metrics import motion
from qdiff.evaluation.motion import EMOJI, MOTIONS, classify, default_prompts, draw, motion_accuracy, parse_motion
from qdiff.evaluation.prompt_accuracy import parse_prompt
from qdiff.evaluation.video import SMALLEST, Clip, read_metadata, save_mp4

INFO = PictureInfo(
    prompt='a "rocket", moving\nup 🚀', seed=7, steps=4, guidance=3.0, engine="float", model="wan (bundled)"
)


def clip(name: str, colour: str, kind: str, frames: int = 17) -> np.ndarray:
    return np.rint(draw(name, colour, kind, frames)).astype(np.uint8)


@pytest.mark.parametrize("kind", MOTIONS)
def test_a_drawn_clip_is_found_again(kind):
    names = EMOJI[:3]
    clips = np.stack([clip(name, "teal", kind) for name in names])
    found = classify(clips)
    assert [row[:3] for row in found] == [(name, "teal", kind) for name in names]
    assert all(row[3] < 1 for row in found)


def test_noise_and_a_blur_do_not_hide_what_moves_and_a_frozen_clip_is_not_right():
    clips = np.stack([clip("rocket", "black", "up"), clip("fish", "yellow", "left")])
    prompts = ["a rocket moves up on a black background", "a fish moving left on yellow"]
    noisy = (clips + np.random.default_rng(0).normal(0, 20, clips.shape)).clip(0, 255).astype(np.uint8)
    right = motion_accuracy(noisy, prompts)
    assert right["emoji"] == right["motion"] == right["background"] == 1 and right["n"] == 2
    frozen = np.repeat(clips[:, 8:9], 17, axis=1)
    assert motion_accuracy(frozen, prompts)["motion"] == 0


def test_words_of_motions_are_understood():
    for kind, known in MOTIONS.items():
        for words in known.words:
            assert parse_motion(f"the big cat {words} on a red background") == kind
    assert parse_motion("a cat on a red background") is None
    assert parse_motion("an upturned cup") is None, "words, not letters"


def test_default_prompts_ask_for_everything_once_and_can_be_judged():
    prompts = default_prompts(64, 3)
    assert len(set(prompts)) == 64 and default_prompts(10, 3) == prompts[:10] != default_prompts(10, 4)
    assert {parse_prompt(prompt)[0] for prompt in prompts} == set(EMOJI)
    assert all(parse_motion(prompt) and parse_prompt(prompt)[1] for prompt in prompts)


def test_clips_of_another_form_are_refused():
    with pytest.raises(InputError, match="clips must be uint8"):
        classify(np.zeros((1, 17, 32, 32, 3), np.uint8))
    with pytest.raises(InputError, match="one clip a prompt"):
        motion_accuracy(np.zeros((1, 17, 64, 64, 3), np.uint8), [])


def test_a_frozen_video_scores_badly_and_flicker_shows():
    moving = torch.from_numpy(np.stack([clip("star", "blue", "right"), clip("dog", "pink", "grow")]))
    same = motion(moving, moving)
    assert same.magnitude_ratio == 1 and same.change_psnr_db == 100 and same.steadiness == same.reference_steadiness
    frozen = motion(moving, moving[:, :1].expand_as(moving))
    assert frozen.magnitude_ratio == 0 and frozen.change_psnr_db < 40
    flickering = moving.clone()
    flickering[:, ::2] = (flickering[:, ::2].int() + 12).clamp(max=255).to(torch.uint8)
    seen = motion(moving, flickering)
    assert seen.magnitude_ratio > 1.5 and seen.steadiness > 1.2 * seen.reference_steadiness
    with pytest.raises(InputError, match="three frames"):
        motion(moving[:, :2], moving[:, :2])


def test_an_mp4_holds_its_frames_and_its_settings(tmp_path):
    import av

    frames = clip("rocket", "blue", "up")
    path = tmp_path / "rocket.mp4"
    save_mp4(path, Clip(frames), INFO)
    assert read_metadata(path) == INFO
    with av.open(str(path)) as container:
        assert container.metadata["title"] == INFO.prompt
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    factor = SMALLEST // 64
    assert decoded.shape == (17, SMALLEST, SMALLEST, 3)
    shrunk = decoded.reshape(17, 64, factor, 64, factor, 3).mean((2, 4))
    assert np.abs(shrunk - frames).mean() < 3
    save_mp4(tmp_path / "again.mp4", Clip(frames), INFO)
    assert (tmp_path / "again.mp4").read_bytes() == path.read_bytes()


def test_a_strip_shows_the_first_and_the_last_frame():
    frames = clip("cat", "red", "left")
    strip = np.asarray(Clip(frames).strip(5))
    assert strip.shape == (64, 5 * 64, 3)
    assert np.array_equal(strip[:, :64], frames[0]) and np.array_equal(strip[:, -64:], frames[-1])
    assert to_pixels([Clip(frames), Clip(frames)]).shape == (2, 17, 64, 64, 3)
    with pytest.raises(InputError, match="same number of frames"):
        to_pixels([Clip(frames), Clip(frames[:5])])


def test_bad_clips_and_bad_files_say_so(tmp_path):
    with pytest.raises(InputError, match="uint8"):
        save_mp4(tmp_path / "x.mp4", Clip(np.zeros((3, 8, 8, 3), np.float32)), INFO)
    with pytest.raises(InputError, match="even sides"):
        save_mp4(tmp_path / "x.mp4", Clip(np.zeros((3, 301, 300, 3), np.uint8)), INFO)
    with pytest.raises(InputError, match="too long"):
        save_mp4(tmp_path / "x.mp4", Clip(np.zeros((3, 64, 64, 3), np.uint8)), replace(INFO, prompt="a" * 600_000))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no video"):
        read_metadata(tmp_path / "x.mp4")
    (tmp_path / "x.mp4").write_bytes(b"not a video")
    with pytest.raises(IntegrityError, match="no readable video"):
        read_metadata(tmp_path / "x.mp4")
