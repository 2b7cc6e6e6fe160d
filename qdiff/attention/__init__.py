"""Sparse attention: which key blocks each query block reads, in which number formats, and who computes it.

One head's tokens are put in an order in which related tokens are neighbours (PAROAttention, arXiv 2506.16054), cut into blocks,
and every block of queries reads the blocks of keys on its list. Order and lists are found once, offline, on the recorded
trajectory; the operator only follows them. A list that names every block is dense attention.

- :mod:`~qdiff.attention.lists`: the lists, and where tokens lie (:class:`Tiling`).
- :mod:`~qdiff.attention.packing`: queries, keys and values in that order and in the formats of a numerics.
- Executors that agree: :mod:`~qdiff.attention.oracle` (float64), :mod:`~qdiff.attention.emulator` (what the kernel computes, tile
  by tile), :mod:`~qdiff.attention.gathered` (blocks gathered, in torch), two kernels for GPUs
  (:mod:`~qdiff.attention.kernels.sparse_attention`, :mod:`~qdiff.attention.kernels.hopper`;
  :mod:`~qdiff.attention.kernels.gpu` packs and chooses), and the plain ONNX of ``export/translations/sparse_attention.py``.
- :mod:`~qdiff.attention.operator`: the custom op ``qdiff::sparse_attention`` that modules are written with.
"""
