"""The kernel for Hopper as machine code, read without a GPU: bulk copies, tensor cores, shared-out registers, no spills."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this system")

from qdiff.attention.kernels import aot, gpu
from qdiff.attention.kernels.sparse_attention import Launch
from qdiff.attention.lists import Tiling
from qdiff.attention.numerics import NUMERICS
from qdiff.errors import InputError

TILING = Tiling(1000, 0, 128, 128)


def launch_of(numerics: str) -> Launch:
    constants = gpu.tuned(128, NUMERICS[numerics], TILING, gpu.HOPPER)
    return Launch(128, NUMERICS[numerics], 128, 128, **constants)


@pytest.mark.parametrize(("numerics", "threads"), [("int8_fp8", 256), ("bf16", 384)])
def test_a_warp_copies_and_warpgroups_multiply(numerics, threads, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launch = launch_of(numerics)
    assert gpu.in_gluon(launch)
    made = aot.compile_hopper(launch)
    kinds = {"int8_fp8": {"s32.s8.s8", "f32.e4m3.e4m3"}, "bf16": {"f32.bf16.bf16"}}[numerics]
    assert {name.split(".", 1)[1] for name in made.wgmma} == kinds and made.mma_sync == 0
    assert made.spilled == 0 and made.registers * threads <= 65536 // (2 if numerics == "int8_fp8" else 1)
    assert made.copies == 0 and len(re.findall(r"cp\.async\.bulk\.tensor", made.ptx)) >= 3
    assert re.search(r"setmaxnreg\.dec\S* \s*24;", made.ptx) and re.search(r"setmaxnreg\.inc\S* \s*2[34]\d;", made.ptx)
    programs = 2 if numerics == "int8_fp8" else 1
    assert programs * made.shared <= aot.SHARED_LIMITS[90]


def test_elsewhere_the_other_kernel_runs():
    assert not gpu.in_gluon(launch_of("fp8"))
    assert not gpu.in_gluon(Launch(64, NUMERICS["bf16"], 128, 128, queries=128, tile=128))
    assert not gpu.in_gluon(Launch(128, NUMERICS["bf16"], 128, 128, queries=128, tile=64))
    assert not gpu.in_gluon(Launch(128, NUMERICS["bf16"], 64, 128, tile=128))
    assert not gpu.in_gluon(Launch(128, NUMERICS["int8_fp8"], 128, 128, tile=128, matrix=True))
    assert gpu.tuned(128, NUMERICS["fp8"], TILING, (12, 0)) == {}, "nothing was measured there"


def test_it_is_for_hopper_alone():
    with pytest.raises(InputError, match="89"):
        aot.compile_hopper(launch_of("bf16"), capability=89)
