"""The kernel's machine code, read without a GPU: tensor cores are used as intended, and nothing spills.

Both products start from zeros in every FP8 kernel; what that is worth is in qdiff/attention/emulator.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this system")

from qdiff.attention.kernels import aot
from qdiff.attention.kernels.sparse_attention import Launch
from qdiff.attention.numerics import NUMERICS
from qdiff.errors import InputError, IntegrityError

pytestmark = pytest.mark.slow

DEFAULT = Launch(128, NUMERICS["int8_fp8"], 128, 128)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def compiled(launch: Launch, **options):
    return aot.compile_kernel(launch, **options)


def accumulators(ttgir: str) -> list[bool]:
    """Of every product in order, whether it starts from zeros."""
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0(?:\.0+e\+00)?> : tensor<\d+x\d+x(?:f32|i32)", ttgir))
    starts = re.findall(r"(?:ttng\.warp_group_dot|tt\.dot) %[\w#]+, %[\w#]+, (%[\w#]+)", ttgir)
    return [start in zeros for start in starts]


def label(launch: Launch) -> str:
    return f"{launch.size}-{launch.numerics.name}-{launch.block_q}x{launch.block_k}-{launch.keys}"


@pytest.mark.parametrize("launch", aot.SHIPPED, ids=label)
def test_what_ships_runs_on_tensor_cores_and_spills_nothing(launch):
    made = compiled(launch)
    first = {"int8": "s32.s8.s8", "fp8": "f32.e4m3.e4m3", "bfloat16": "f32.bf16.bf16"}[launch.numerics.scores]
    second = {"fp8": "f32.e4m3.e4m3", "bfloat16": "f32.bf16.bf16"}[launch.numerics.output]
    kinds = {name.split(".", 1)[1] for name in made.wgmma}
    assert kinds == {first, second}
    step = 32 if launch.numerics.coded else 16
    count = lambda width: -(-width // step)  # noqa: E731
    channels, outputs = {64: (64, [64]), 72: (96 if step == 32 else 80, [64, 16]), 128: (128, [128])}[launch.size]
    wanted = {f"m64n{launch.keys}k{step}.{first}": count(channels)}
    for width in outputs:
        name = f"m64n{width}k{step}.{second}"
        wanted[name] = wanted.get(name, 0) + count(launch.keys)
    assert made.wgmma == wanted
    assert made.mma_sync == 0 and made.spilled == 0
    assert made.registers <= 255 and made.registers * made.threads <= 65536
    assert made.shared <= aot.SHARED_LIMITS[90]
    assert made.global_scratch == made.profile_scratch == 0
    assert made.threads == 2 * launch.rows
    assert made.parameters == len(made.arguments) + aot.HIDDEN == 16
    assert made.copies >= 9, "loads are not asynchronous"
    if launch.numerics.coded:
        # Of two parts, the scores of the second go onto those of the first.
        assert accumulators(made.ttgir) == ([True, False, True, True] if launch.size == 72 else [True, True])


def test_arguments_are_pointers_then_integers_then_the_output():
    arguments = compiled(DEFAULT).arguments
    assert arguments[:3] == ("q", "k", "v") and arguments[-4:] == ("tokens", "text", "pitch", "out")


@pytest.mark.parametrize("size", [72, 128])
def test_stripped_of_the_hidden_parameters_it_still_assembles(size):
    made = compiled(Launch(size, NUMERICS["int8_fp8"], 128, 128))
    bare = aot.stripped(made)
    assert bare.parameters == len(made.arguments) == 14
    assert (bare.registers, bare.spilled) == (made.registers, made.spilled)
    assert f"{made.name}_param_13" in bare.ptx and f"{made.name}_param_14" not in bare.ptx
    with pytest.raises(IntegrityError, match="hidden"):
        aot.stripped(bare)


def test_scratch_memory_is_not_stripped():
    with pytest.raises(InputError, match="384 and 0 bytes"):
        aot.stripped(dataclasses.replace(compiled(DEFAULT), global_scratch=384))
    reads = compiled(DEFAULT).ptx.replace("ret;", f"ld.param.b64 %rd1, [{compiled(DEFAULT).name}_param_15];\n ret;")
    with pytest.raises(IntegrityError, match="reads the hidden"):
        aot.stripped(dataclasses.replace(compiled(DEFAULT), ptx=reads))


def test_broken_ptx_is_refused():
    ptx = compiled(DEFAULT).ptx
    with pytest.raises(IntegrityError, match="ptxas refuses"):
        aot.assemble(ptx.replace(".reg .b32", ".reg .b31", 1))


def test_the_version_of_the_ptx_can_be_capped():
    assert ".version 8.5" in compiled(DEFAULT, ptx_version=85).ptx


def test_pointers_without_a_promise_cost_the_copies():
    assert compiled(DEFAULT, aligned=False).copies < compiled(DEFAULT).copies / 2


def test_full_blocks_need_no_mask():
    whole = compiled(dataclasses.replace(DEFAULT, partial=False))
    assert whole.spilled == 0 and whole.registers < compiled(DEFAULT).registers
    assert whole.shared == compiled(DEFAULT).shared, "fewer stages"


@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("numerics", ["int8_fp8", "bf16"])
def test_other_gpus_have_synchronous_products_and_separate_accumulators(capability, numerics):
    made = compiled(Launch(72, NUMERICS[numerics], 128, 128), capability=capability)
    assert made.wgmma == {} and made.mma_sync > 0 and made.spilled == 0
    assert made.shared <= 99 * 1024
    if numerics == "int8_fp8":
        assert accumulators(made.ttgir) == [True, False, True, True]


def test_unknown_targets_are_refused():
    with pytest.raises(InputError, match="75"):
        aot.compile_kernel(DEFAULT, capability=75)
    with pytest.raises(InputError, match="float64"):
        aot.compile_kernel(DEFAULT, out="float64")
