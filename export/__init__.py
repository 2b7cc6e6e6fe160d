"""Quantized torch module -> ONNX for a target, and the checks that the file holds what was asked."""
