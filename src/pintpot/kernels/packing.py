"""Packing of small unsigned integers into bytes, for every width from 1 to 8 bits.

A width is cut into fields of 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1; 8 is a byte), stored
one after the other. A field of ``f`` bits holds ``8 / f`` codes in a byte, *planar*: with ``m`` bytes, byte ``b``
holds the codes ``b, b + m, b + 2 m, ...``, lowest bits first. Unpacking then writes contiguous runs, which is several
times faster than interleaving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.core.values import has_values
from pintpot.kernels import native
from pintpot.kernels.layout import field_bytes, fields_of, packed_size

__all__ = ["pack", "packed_size", "restore", "unpack"]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8 (..., n), each below ``2 ** bits``.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 (..., packed_size(n, bits)), contiguous.

    Raises:
        ShapeError: when the width is not 1 to 8, or the codes are not uint8.
    """
    fields_of(bits)
    if codes.dtype != torch.uint8:
        raise ShapeError(f"codes must be uint8, not {codes.dtype}", hint="round and clamp them, then .to(torch.uint8)")
    if native.serves(codes):
        packed: Tensor = torch.ops.pintpot.pack(codes, bits)
        return packed
    return pack_definition(codes, bits)


def pack_definition(codes: Tensor, bits: int) -> Tensor:
    """What ``pack`` does, in plain torch."""
    fields, count = fields_of(bits), codes.shape[-1]
    packed = codes.new_zeros((*codes.shape[:-1], packed_size(count, bits)))
    start = shift = 0
    for field in fields:
        width = field_bytes(count, field)
        target = packed[..., start : start + width]
        part = codes if field == 8 else (codes >> shift) & ((1 << field) - 1)
        for plane in range(8 // field):
            run = part[..., plane * width : (plane + 1) * width]
            target[..., : run.shape[-1]] |= run << (plane * field)
        start, shift = start + width, shift + field
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that ``pack`` stored.

    Args:
        packed: uint8 (..., packed_size(count, bits)).
        bits: width of a code, 1 to 8.
        count: number of codes in the last dimension.

    Returns:
        uint8 (..., count).

    Raises:
        ShapeError: when the packed size does not belong to ``count`` codes of ``bits`` bits.
    """
    if packed.shape[-1] != packed_size(count, bits):
        raise ShapeError(
            f"{count} codes of {bits} bits take {packed_size(count, bits)} bytes, not {packed.shape[-1]}",
            hint="unpack with the width and count that were packed",
        )
    if bits == 8:
        return packed.clone()
    if native.serves(packed):
        codes: Tensor = torch.ops.pintpot.unpack(packed, bits, count)
        return codes
    return unpack_definition(packed, bits, count)


def unpack_definition(packed: Tensor, bits: int, count: int) -> Tensor:
    """What ``unpack`` does, in plain torch."""
    codes = packed.new_empty((*packed.shape[:-1], count))
    if not has_values(packed):
        # The temporaries below are smaller than the codes' next form, so leaving them out moves no peak.
        return codes
    start = shift = 0
    for field in fields_of(bits):
        width = field_bytes(count, field)
        source = packed[..., start : start + width]
        for plane in range(8 // field):
            target = codes[..., plane * width : (plane + 1) * width]
            run = (source[..., : target.shape[-1]] >> (plane * field)) & ((1 << field) - 1)
            if shift:
                target |= run << shift
            else:
                target.copy_(run)
        start, shift = start + width, shift + field
    return codes


def restore(packed: Tensor, scale: Tensor, low: Tensor, *, bits: int, group_size: int, count: int) -> Tensor:
    """The numbers ``code * scale + low`` of packed codes, each group of a row with a scale and a least number.

    Not differentiable. The compiled kernel reads contiguous tensors; on the CPU others are copied first, still packed.

    Args:
        packed: uint8 (..., packed_size(count, bits)).
        scale: float (..., ceil(count / group_size)).
        low: as ``scale``.
        bits: width of a code, 1 to 8.
        group_size: codes that share a scale; the last group of a row may be shorter.
        count: number of codes in the last dimension.

    Returns:
        float32 (..., count), contiguous.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    if packed.device.type == "cpu":
        packed, scale, low = packed.contiguous(), scale.contiguous(), low.contiguous()
    if count and scale.dtype in native.DTYPES and scale.dtype == low.dtype and native.serves(packed, scale, low):
        numbers: Tensor = torch.ops.pintpot.restore(packed, scale, low, bits, group_size, count)
        return numbers
    return restore_definition(packed, scale, low, bits, group_size, count)


def restore_definition(packed: Tensor, scale: Tensor, low: Tensor, bits: int, group_size: int, count: int) -> Tensor:
    """What ``restore`` does, in plain torch."""
    if group_size < 1 or scale.shape != (*packed.shape[:-1], -(-count // group_size)) or low.shape != scale.shape:
        raise ShapeError(
            f"scales {tuple(scale.shape)} and least numbers {tuple(low.shape)} are not those of {count} codes in"
            f" {tuple(packed.shape)}, in groups of {group_size}",
            hint="pass the tensors and the group size that were stored together",
        )
    numbers = unpack(packed, bits, count).to(torch.float32)
    whole = count // group_size
    parts = [(numbers[..., : whole * group_size].unflatten(-1, (whole, group_size)), slice(0, whole))]
    parts.append((numbers[..., whole * group_size :].unsqueeze(-2), slice(whole, None)))
    for part, groups in parts:
        if part.numel():
            part.mul_(scale[..., groups, None].float()).add_(low[..., groups, None].float())
    return numbers
