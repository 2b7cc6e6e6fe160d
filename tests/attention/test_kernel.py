"""The Triton kernel on this machine: its cases (kernel_cases.py) in the interpreter, and on a GPU where there is one; and how the
operator gets at it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this system")

from qdiff.attention import operator
from qdiff.attention.lists import BlockLists, Tiling

# On white noise; probabilities are rounded against another maximum than in host memory, which sees whole rows.
TOLERANCES = {"float": 1e-5, "bf16": 0.01, "int8_fp8": 0.03, "fp8": 0.03}
CASES = Path(__file__).with_name("kernel_cases.py")


def run_cases(interpret: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    command = [sys.executable, "-m", "pytest", str(CASES), "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_cases_in_the_interpreter():
    run_cases("1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_the_cases_on_a_gpu():
    run_cases("0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("numerics", ["float", "bf16", "int8_fp8", "fp8"])
def test_the_operator_on_a_gpu(numerics):
    """The same call in host memory and on the GPU, twice, so that the second takes the kept lists."""
    tiling = Tiling(500, 20)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, tiling.tokens, 64, generator=generator) for _ in range(3))
    order = torch.stack([torch.randperm(tiling.ordered, generator=generator) for _ in range(2)])
    lists = BlockLists.of_masks(torch.rand(2, tiling.rows, tiling.columns, generator=generator) < 0.6)
    host = (q, k, v, order, lists.blocks, lists.bounds)
    device = [x.cuda() for x in host]
    settings = (0, tiling.text, tiling.block_q, tiling.block_k, numerics, 0.125)
    reference = operator.sparse_attention(*host, *settings)
    for _ in range(2):
        ours = operator.sparse_attention(*device, *settings).cpu()
        assert float((ours - reference).norm() / reference.norm()) < TOLERANCES[numerics]


def rows_of(blocks, bounds, first: int, heads: int, tiling: Tiling):
    """The lists of ``heads`` heads in the kernel's form, as a call in host memory asks for them."""
    q, order = torch.empty(1, heads, tiling.tokens, 8), torch.zeros(heads, tiling.ordered, dtype=torch.int32)
    cut = (tiling.text, tiling.block_q, tiling.block_k)
    call = operator.AttentionCall(q, q, q, order, blocks, bounds, first, *cut, "bf16", 1.0)
    return operator._rows(call, call.tiling())


def test_the_kernels_lists_are_kept_while_they_are_the_same():
    tiling = Tiling(300, 17)
    lists = BlockLists.joined([BlockLists.full(2, tiling), BlockLists.full(1, tiling)])
    held, bounds = [lists.blocks], lists.bounds

    def rows(bounds=bounds, first=0, heads=2):
        return rows_of(held[0], bounds, first, heads, tiling)

    made = rows()
    assert rows() is made
    last = rows(first=2, heads=1)
    assert rows() is made and rows(first=2, heads=1) is last
    assert all(map(torch.equal, last, BlockLists.full(1, tiling).by_row(tiling)))
    held[0][0, 0] = -1  # the next step's lists, written in place
    changed = rows()
    assert changed is not made and len(changed[1]) == len(made[1]) - 1
    assert rows(bounds.clone()) is not changed
    kept = len(operator._KEPT)
    del lists
    held.clear()
    gc.collect()
    assert len(operator._KEPT) < kept


def test_lists_made_in_inference_mode_are_read_anew():
    tiling = Tiling(300)
    with torch.inference_mode():
        lists = BlockLists.full(1, tiling)
    made = rows_of(lists.blocks, lists.bounds, 0, 1, tiling)
    again = rows_of(lists.blocks, lists.bounds, 0, 1, tiling)
    assert made is not again and all(map(torch.equal, made, again))


def test_only_a_gpu_needs_triton():
    """The operator computes without it, and says what to install where it cannot."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from qdiff.attention import operator
from qdiff.attention.lists import BlockLists, Tiling
from qdiff.errors import MissingDependencyError
tiling = Tiling(100)
lists, x = BlockLists.full(1, tiling), torch.ones(1, 1, 100, 32)
out = operator.sparse_attention(x, x, x, torch.arange(100)[None], lists.blocks, lists.bounds, 0, 0, 64, 64, "float", 1.0)
assert torch.allclose(out, x)
try:
    operator._gpu()
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CASES.parents[2])
    assert done.returncode == 0, done.stderr
    assert "pip install 'qdiff-deploy[kernel]'" in done.stdout


def test_the_operator_has_a_kernel_for_gpus():
    assert "cuda" in operator.sparse_attention._backend_fns
