"""Clips that say where they came from: MP4 with their settings inside, and strips of frames for pages and tickets.

H.264 in 4:2:0 halves the colour's resolution, so clips smaller than :data:`SMALLEST` are enlarged by whole pixels; what is
compared are always the frames themselves, before any codec. Settings are JSON in the container's ``comment`` tag, the prompt is
its ``title``. Reading them decodes nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from qdiff.errors import InputError, IntegrityError, MissingDependencyError
from qdiff.evaluation.images import MAX_METADATA_BYTES, PictureInfo, parse_info
from qdiff.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST = 256  # pixels on the shorter side of an MP4's frame
STRIP = 9  # frames in a strip
CRF = 14  # x264's quality: visually lossless


@dataclass(frozen=True)
class Clip:
    """Frames uint8 ``[T, H, W, 3]`` at ``fps`` a second."""

    frames: np.ndarray
    fps: int = 16

    @property
    def size(self) -> tuple[int, int]:
        """Return the width and height in pixels, as of a picture."""
        return self.frames.shape[2], self.frames.shape[1]

    def strip(self, count: int = STRIP) -> Image:
        """Return ``count`` frames from the first to the last, side by side."""
        from PIL import Image

        which = np.linspace(0, len(self.frames) - 1, min(count, len(self.frames))).round().astype(int)
        return Image.fromarray(np.concatenate(list(self.frames[which]), axis=1))


def _av() -> ModuleType:
    try:
        import av
    except ImportError:
        raise MissingDependencyError("writing MP4 needs PyAV", "pip install av") from None
    return av


def save_mp4(path: Path, clip: Clip, info: PictureInfo) -> None:
    """Write ``clip`` with its metadata, whole or not at all.

    Raises:
        InputError: no frames, sides that are odd, or metadata longer than :data:`qdiff.evaluation.images.MAX_METADATA_BYTES`.
        MissingDependencyError: PyAV is not installed.
    """
    av = _av()
    frames = clip.frames
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise InputError(f"a clip is uint8 [T, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    text = json.dumps(asdict(info), allow_nan=False)
    if len(text) > MAX_METADATA_BYTES:
        raise InputError(f"the prompt of {path.name} is too long for its metadata", "shorten it")
    factor = max(1, -(-SMALLEST // min(clip.size)))
    enlarged = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    if enlarged.shape[1] % 2 or enlarged.shape[2] % 2:
        raise InputError(f"{path.name}: H.264 takes even sides, not {clip.size[0]} x {clip.size[1]}")

    def write(temporary: Path) -> None:
        with av.open(
            str(temporary), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}
        ) as container:
            container.metadata.update({"title": info.prompt[:1000], "comment": text})
            stream = container.add_stream("libx264", rate=clip.fps)
            stream.height, stream.width = enlarged.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": str(CRF), "x264-params": "threads=1"}  # the same bytes from the same frames
            for frame in enlarged:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())

    write_atomically(path, write)


def read_metadata(path: Path) -> PictureInfo | None:
    """Return what :func:`save_mp4` wrote into ``path``, or ``None`` for an MP4 of somebody else.

    Raises:
        InputError: there is no such file.
        IntegrityError: no MP4, or its metadata is damaged.
    """
    av = _av()
    if not path.is_file():
        raise InputError(f"there is no video at {path}")
    try:
        with av.open(str(path)) as container:
            text = container.metadata.get("comment")
    except (av.FFmpegError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is no readable video: {error}", "make it again") from None
    return None if text is None else parse_info(text, path)
