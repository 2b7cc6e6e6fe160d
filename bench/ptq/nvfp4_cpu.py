"""NVFP4 for ModelOpt on a CPU. Its own fake quantizers of that format are CUDA kernels.

**What is ModelOpt's:** everything that decides. Which tensors have quantizers, what they observe, the tensor scales (amax,
from its calibrators), the search of weights' block scales (``mse``, ``local_hessian``), AWQ's and SVDQuant's factors, GPTQ's
updates. All of it is its Python code, run through ``modelopt.torch.quantization.quantize``.

**What is ours:** the arithmetic of one function, "these values, this amax, to NVFP4 and back":

- *Dynamic blocks* (activations always, weights by default): a backend under ModelOpt's public ``register_quant_backend``,
  which a quantizer's config names. It computes tensor scale = amax / (6 · 448), block scale = E4M3(amax of the block / 6 /
  tensor scale) and the nearest E2M1 code by :mod:`qdiff.formats.dynamic`. A test compares it bit for bit with ModelOpt's
  own storage class for NVFP4 (``NVFP4QTensor``), which does run on a CPU but takes several times as long.
- *Static blocks* (weights under ``mse``, ``local_hessian`` and the published GPTQ recipe): a promoted quantizer does not ask
  for a backend, it calls the Triton kernel ``static_blockwise_fp4_fake_quant``. :func:`install` puts a function of that name
  and signature where the kernel would be imported. The scales in it are ModelOpt's own ``scaled_e4m3_impl``, with the same
  operands in the same order as the kernel's wrapper; the rounding to E2M1 is :mod:`qdiff.formats.elements`.

One difference to the kernels is known and kept: where a dynamic block's scale is below 2^-9 tensor scales, the kernel rounds
it to zero, the storage class and we to 2^-9. Nothing but values below 1 / 100,000 of the tensor's largest is touched by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdiff.formats import elements
from qdiff.formats.dynamic import quantize_dequantize_blocks
from qdiff.formats.scales import choose_tensor_scale
from qdiff.formats.table import ELEMENTS, format_named

BACKEND = "qdiff_nvfp4_cpu"
E4M3_MAX, E2M1_MAX = 448.0, 6.0


def dynamic_blocks(inputs: Tensor, quantizer: Any) -> Tensor:
    """Return the registered backend: ``inputs [..., n]`` to NVFP4 and back, under the quantizer's calibrated amax.

    Without one (a weight whose scaling is being searched) the amax is the tensor's own, as in ModelOpt.
    """
    amax = quantizer.amax
    amax = inputs.abs().amax() if amax is None else amax.amax()
    format = format_named("nvfp4")
    return quantize_dequantize_blocks(inputs, format, choose_tensor_scale(amax.float(), format))


def static_blocks(
    x: Tensor,
    amax: Tensor,
    global_amax: Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return stands for ModelOpt's Triton kernel of the same signature: ``x`` in blocks, each under its own given
    amax.
    """
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

    amax = amax.float()
    scale = amax / E2M1_MAX
    if quantize_block_scales:
        largest = (amax.amax() if global_amax is None else global_amax).float()
        scale = scaled_e4m3_impl(scale, largest * (E4M3_MAX / fp8_max_for_normalization) / E2M1_MAX)
    scale = scale.reshape(-1, 1)
    blocks = x.float().reshape(len(scale), -1)
    zero = scale == 0
    values = elements.round_to_grid(blocks / torch.where(zero, 1.0, scale), ELEMENTS["e2m1"]) * scale
    return values.reshape(x.shape).to(out_dtype or x.dtype)


def install() -> None:
    """Register the backend, and the stand-in where ModelOpt has no kernel. Does nothing the second time."""
    from modelopt.torch.kernels.quantization import gemm
    from modelopt.torch.quantization.nn.modules import tensor_quantizer as quantizers

    if not quantizers.is_registered_quant_backend(BACKEND):
        quantizers.register_quant_backend(BACKEND, dynamic_blocks)
    if not gemm.IS_AVAILABLE:
        gemm.static_blockwise_fp4_fake_quant = static_blocks
        gemm.IS_AVAILABLE = True
