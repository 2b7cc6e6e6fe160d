"""Kernels of block-sparse attention for GPUs, in Triton and Gluon.

:mod:`.sparse_attention` runs on every GPU of compute capability 8.9 and above, :mod:`.hopper` on Hopper alone; :mod:`.pack` and
:mod:`.moments` prepare their operands, :mod:`.gpu` starts the faster one, :mod:`.aot` compiles without a GPU.
"""
