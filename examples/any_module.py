"""Any torch module: quantize it from example calls, without a pipeline and without a run folder."""

import torch
from diffusers.models.attention import BasicTransformerBlock

import qdiff

torch.manual_seed(0)
module = BasicTransformerBlock(dim=64, num_attention_heads=4, attention_head_dim=16).eval()
calls = [torch.randn(2, 32, 64) for _ in range(16)]

for recipe, settings in (("int8", []), ("w4a8", ["scheme.weights=int4_g32"])):
    quantized = qdiff.quantize_module(module, calls, recipe, settings=settings)
    with torch.no_grad():
        expected, got = module(calls[0]), quantized(calls[0])
    sqnr = 10 * torch.log10(expected.square().mean() / (got - expected).square().mean())
    bits = sum(layer.weight_bits() for layer in quantized.qdiff_plan.quantized) / len(quantized.qdiff_plan.quantized)
    print(f"{recipe}: {len(quantized.qdiff_plan.quantized)} layers, {bits:.2f} bits a weight, {sqnr:.1f} dB SQNR")
