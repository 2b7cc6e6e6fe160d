"""Codes as they are stored and exported: several to a byte where they are small.

The codes of the last axis form a bit stream, least significant bits first: code i takes the bits from ``bits * i`` on. So 4-bit
codes lie two to a byte, the even one in the low nibble, and four 6-bit codes lie in three bytes. That is the layout of ONNX's
INT4, FLOAT4E2M1 and FLOAT6 tensors (the packed bytes are their ``raw_data``), of TensorRT, and of ``torch.float4_e2m1fn_x2`` (as
which a packed tensor may be viewed). Rows begin on whole bytes, so packing works row by row. 8-bit codes are stored as they
are: int8 or torch's float8 types.

Integers are stored as two's complement, floats as sign, exponent, mantissa. Packing loses nothing: ``unpack(pack(codes))`` is
``codes`` for all codes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qdiff.errors import InputError
from qdiff.formats.table import Format


def pack(codes: Tensor, format: Format) -> Tensor:
    """Pack ``codes [..., n]`` (the format's storage dtype) to ``[..., n * bits / 8]`` uint8; 8-bit codes come back as
    they are.

    Raises:
        InputError: ``n`` does not fill whole bytes.
    """
    if format.bits >= 8:
        return codes
    format.packed_shape(tuple(codes.shape))  # refuses what does not fit
    count, size = _group(format.bits)
    fields = (codes.view(torch.uint8) & (2**format.bits - 1)).unflatten(-1, (-1, count)).unbind(-1)
    packed = [torch.zeros_like(fields[0]) for _ in range(size)]
    for field, byte, shift in _parts(format.bits):
        packed[byte] |= fields[field] << shift if shift >= 0 else fields[field] >> -shift
    return torch.stack(packed, dim=-1).flatten(-2)


def unpack(packed: Tensor, format: Format) -> Tensor:
    """Undo :func:`pack`: ``[..., n * bits / 8]`` to codes ``[..., n]`` in the format's storage dtype.

    Raises:
        InputError: the bytes are no whole number of groups of codes.
    """
    if format.bits >= 8:
        return packed
    count, size = _group(format.bits)
    if packed.shape[-1] % size:
        raise InputError(
            f"{packed.shape[-1]} bytes are no whole number of {format.name} codes, which take {size} bytes for {count}"
        )
    groups = packed.view(torch.uint8).unflatten(-1, (-1, size)).unbind(-1)
    fields = [torch.zeros_like(groups[0]) for _ in range(count)]
    for field, byte, shift in _parts(format.bits):
        fields[field] |= groups[byte] >> shift if shift >= 0 else groups[byte] << -shift
    codes = torch.stack(fields, dim=-1).flatten(-2) & (2**format.bits - 1)
    if format.kind == "integer":  # back from two's complement
        top = 2 ** (format.bits - 1)
        return (codes ^ top).view(torch.int8) - top
    return codes


def _group(bits: int) -> tuple[int, int]:
    """Return how many codes fill how many whole bytes: 2 and 1 for 4 bits, 4 and 3 for 6."""
    count = 8 // math.gcd(bits, 8)
    return count, count * bits // 8


def _parts(bits: int) -> list[tuple[int, int, int]]:
    """Return which code has bits in which byte of a group, and how far to the left of the byte's end they begin
    (negative: the code's first bits lie in the byte before). Shifts of uint8 drop what leaves the byte, which is what
    is wanted on both ways.
    """
    count, size = _group(bits)
    places = [(code, byte, bits * code - 8 * byte) for code in range(count) for byte in range(size)]
    return [(code, byte, shift) for code, byte, shift in places if -bits < shift < 8]
