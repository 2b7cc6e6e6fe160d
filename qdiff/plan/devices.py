"""GPUs with their published rates: what latency can be reckoned for without having one."""

from __future__ import annotations

from dataclasses import dataclass

from qdiff.errors import InputError, unknown_name


@dataclass(frozen=True)
class Device:
    """Published dense rates of a GPU, multiply and add counted as two.

    Args:
        title: name and document.
        rates: 10^12 operations a second by kind of arithmetic; kinds that are not there run at ``bf16``'s.
        bandwidth: of its memory, 10^9 bytes a second.
    """

    title: str
    rates: dict[str, float]
    bandwidth: float


DEVICES = {
    "rtx-5090": Device(
        "GeForce RTX 5090 (NVIDIA, RTX Blackwell GPU architecture; FP8 and BF16 with FP32 accumulation)",
        {"bf16": 209.5, "fp8": 419.0, "int8": 838.0, "fp4": 1676.0},
        1792.0,
    ),
    "rtx-4090": Device(
        "GeForce RTX 4090 (NVIDIA, Ada GPU architecture; FP8 and BF16 with FP32 accumulation)",
        {"bf16": 165.2, "fp8": 330.3, "int8": 660.6},
        1008.0,
    ),
    "h100": Device(
        "H100 SXM (NVIDIA, H100 datasheet; half of the rates with sparsity)",
        {"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
        3350.0,
    ),
    "b200": Device(
        "B200 (NVIDIA, HGX B200: dense rates by GPU)", {"bf16": 2250.0, "fp8": 4500.0, "int8": 4500.0, "fp4": 9000.0}, 8000.0
    ),
}  # fmt: skip


def device_named(name: str) -> Device:
    """Return a GPU of the table.

    Raises:
        InputError: unknown; names the known ones.
    """
    if name not in DEVICES:
        raise unknown_name("device", name, list(DEVICES), InputError)
    return DEVICES[name]
