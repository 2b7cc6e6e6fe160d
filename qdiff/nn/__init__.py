"""Modules and functions that a quantized graph consists of.

:mod:`.ops` are the custom ops, :mod:`.quant_linear` the quantized layers, :mod:`.conv` convolutions as products,
:mod:`.rotations` Hadamard rotations, :mod:`.surgery` changes of a model before it is quantized.
"""
