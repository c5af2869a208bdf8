"""Grids of 1 to 4 bits as bit planes, and their products with few inputs by looking sums of inputs up.

Shapes: B inputs, O out-features, I in-features, G group size, N = ceil(I / G) groups a row, Q quads a row: four columns
each, the last of a group padded, ``(N - 1) * ceil(G / 4) + ceil(last / 4)``.

``planes`` uint8 (ceil(O / 32), bits, Q, 16): byte ``j`` of a quad holds a bit each of four columns of row ``j`` of 32
in its lower half, the first column in the lowest bit, and those of row ``j + 16`` in its upper half. ``scale`` and
``zero`` are those of a grid (``grid.py``), and so is what they mean: a weight is ``(code - zero) * scale``.

The product is that of T-MAC (Wei et al. 2024, arXiv:2407.00088). A bit of 0 or 1 is taken for a sign, so that four bits
of a plane are the number of one of 16 signed sums of four inputs; as those of a number and of its complement are
opposite, 8 are computed. Sums are rounded to 8 bits relative to the largest possible one of 64 columns, and looked up.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.packing import unpack

MOST_BITS = 4
TILE_ROWS = 32
"""Rows whose codes lie together: a shuffle of 16 bytes looks up half of them."""
QUAD = 4
ENTRIES = 16
TABLE_COLUMNS = 64
"""Columns whose sums share a step, unless their group ends before."""
MOST_ENTRY = 127
SMALLEST = 1e-30
"""Inputs whose sums are smaller count as zero in the tables."""
DEFINITION_BYTES = 16 << 20
"""Most bytes of what the definition looks up at a time."""


def quads_of(columns: int, group_size: int) -> int:
    """Q, for rows of this length."""
    groups = -(-columns // group_size)
    return (groups - 1) * -(-group_size // QUAD) + -(-(columns - (groups - 1) * group_size) // QUAD)


def planes_shape(rows: int, columns: int, bits: int, group_size: int) -> tuple[int, int, int, int]:
    """The shape of ``planes`` for codes (O, I).

    Raises:
        ShapeError: when the width is not 1 to 4.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ShapeError(f"codes of {bits} bits are not kept as planes", hint=f"use 1 to {MOST_BITS} bits")
    return -(-rows // TILE_ROWS), bits, quads_of(columns, group_size), ENTRIES


def pack_planes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes as bit planes. On processors with the lowest byte first, as torch has them.

    Args:
        codes: uint8 (O, I), each below ``2 ** bits``.
        bits: width of a code, 1 to 4.
        group_size: columns that share a scale.

    Returns:
        uint8 ``planes``, with rows of zeros after the last.
    """
    rows, columns = codes.shape
    planes = codes.new_empty(planes_shape(rows, columns, bits, group_size))
    quads = planes.shape[2]
    whole = functional.pad(_padded(codes, group_size), (0, 0, 0, -rows % TILE_ROWS)).contiguous().view(torch.int32)
    lanes = whole.view(-1, 2, TILE_ROWS // 2, quads)
    for plane in range(bits):
        apart = (lanes >> plane) & 0x01010101
        apart |= apart >> 7
        nibbles = ((apart & 3) | ((apart >> 14) & 12)).to(torch.uint8)
        planes[:, plane] = (nibbles[:, 0] | (nibbles[:, 1] << 4)).transpose(1, 2)
    return planes


def unpack_planes(planes: Tensor, group_size: int, rows: int, columns: int) -> Tensor:
    """The codes (O, I), uint8, that ``pack_planes`` stored."""
    bits, quads = planes.shape[1:3]
    codes = planes.new_zeros((planes.shape[0] * TILE_ROWS, quads), dtype=torch.int32)
    for plane in range(bits):
        nibbles = _nibbles(planes, plane).to(torch.int32)
        halves = (nibbles & 3) | ((nibbles & 12) << 14)
        codes |= ((halves | (halves << 7)) & 0x01010101) << plane
    numbers = codes[:rows].contiguous().view(torch.uint8)
    if group_size % QUAD == 0 or group_size >= columns:
        return numbers[:, :columns]
    column = torch.arange(columns, device=planes.device)
    return numbers[:, column // group_size * (-(-group_size // QUAD) * QUAD) + column % group_size]


def _padded(numbers: Tensor, group_size: int) -> Tensor:
    """Numbers (..., I) with zeros after each group, so that groups begin new quads: (..., 4 * Q)."""
    columns = numbers.shape[-1]
    if group_size % QUAD == 0 or group_size >= columns:
        return functional.pad(numbers, (0, -columns % QUAD))
    groups = functional.pad(numbers, (0, -columns % group_size)).unflatten(-1, (-1, group_size))
    return functional.pad(groups, (0, -group_size % QUAD)).flatten(-2)[..., : QUAD * quads_of(columns, group_size)]


def _nibbles(planes: Tensor, plane: int) -> Tensor:
    """The four bits of each row and quad in one plane, uint8 (rows of whole tiles, Q)."""
    bytes_ = planes[:, plane].transpose(1, 2)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=1).flatten(0, 1)


def dequantize_planes(
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers (O, I) that bit planes stand for, in ``dtype``; bit for bit those of the grid."""
    if dtype in native.DTYPES and in_features and native.serves(planes, scale, zero):
        dense: Tensor = torch.ops.pintpot.planes_dequantize(planes, scale, zero, bits, group_size, in_features, dtype)
        return dense
    return dequantize_planes_definition(planes, scale, zero, bits, group_size, in_features, dtype)


def dequantize_planes_definition(
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """What ``dequantize_planes`` does, in plain torch."""
    rows, groups = scale.shape
    dense = unpack_planes(planes, group_size, rows, in_features).to(dtype)
    zeros = _zeros(zero, bits, groups, dtype)
    each = torch.arange(in_features, device=planes.device) // group_size
    dense -= zeros if isinstance(zeros, int) else zeros[:, each]
    dense *= scale.to(dtype)[:, each]
    return dense


def _zeros(zero: Tensor | None, bits: int, groups: int, dtype: torch.dtype) -> Tensor | int:
    return 1 << (bits - 1) if zero is None else unpack(zero, bits, groups).to(dtype)


def lookup_tables(input: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sums that are looked up.

    Args:
        input: (B, I), any float dtype.
        group_size: columns that share a scale.

    Returns:
        float32 ``tables`` (B, Q, 16), integers from -127 to 127; ``steps`` (B, S), what they are multiplied by in each
        of S segments of at most 64 columns; ``sums`` (B, N) of the inputs of each group. A segment with an input that
        is not finite, or whose sums are not, has a step that is not a number.
    """
    numbers = input.float()
    quads = _padded(numbers, group_size).unflatten(-1, (-1, QUAD))
    segment, count = _segments(quads.shape[1], input.shape[1], group_size, input.device)
    first, *others = quads.abs().unbind(-1)
    for other in others:
        first = first + other
    infinite = torch.full_like(first, torch.inf)
    size = torch.where(first.isfinite(), first, infinite)
    most = size.new_zeros((size.shape[0], count)).scatter_reduce(1, segment.expand_as(size), size, "amax")
    held = most.isfinite() & (most >= SMALLEST)
    inverse = torch.where(held, MOST_ENTRY / most, 0.0)[:, segment, None]
    signs = torch.arange(ENTRIES, device=input.device)[:, None] >> torch.arange(QUAD, device=input.device)
    entries = quads.new_zeros(())
    for index, sign in enumerate((2.0 * (signs & 1) - 1.0).unbind(-1)):
        entries = entries + quads[..., index, None] * sign
    tables = torch.where(held[:, segment, None], (entries * inverse).round(), 0.0)
    steps = torch.where(most.isfinite(), torch.where(held, most / MOST_ENTRY, 0.0), torch.nan)
    groups = -(-input.shape[1] // group_size)
    group = torch.arange(input.shape[1], device=input.device) // group_size
    sums = numbers.new_zeros((input.shape[0], groups), dtype=torch.float64)
    return tables, steps, sums.index_add_(1, group, numbers.double()).float()


def _segments(quads: int, columns: int, group_size: int, device: torch.device) -> tuple[Tensor, int]:
    """The segment that each quad is in, int64 (Q,), and how many there are."""
    in_group, in_table = -(-group_size // QUAD), TABLE_COLUMNS // QUAD
    place = torch.arange(quads, device=device)
    each = -(-group_size // TABLE_COLUMNS)
    groups = -(-columns // group_size)
    last = -(-(columns - (groups - 1) * group_size) // TABLE_COLUMNS)
    return place // in_group * each + place % in_group // in_table, (groups - 1) * each + last


def lut_matmul(
    input: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """``input @ weight.T`` for few inputs and a weight of bit planes, by tables of 8-bit sums. Not differentiable.

    The tables cost accuracy: about 0.7 % of the product's size for inputs from a normal distribution, and more (some
    percent) where zeros are far from the middle of the codes, as in asymmetric grids of 1 bit: parts then cancel.

    Args:
        input: (..., I), float; none of it is saved.
        planes: uint8 (ceil(O / 32), bits, Q, 16).
        scale: float (O, N).
        zero: uint8 (O, packed_size(N, bits)), or None for ``2 ** (bits - 1)``.
        bits: width of a code, 1 to 4.
        group_size: in-features that share a scale.

    Returns:
        (..., O) in the dtype of ``input``. An input that is not finite makes all numbers of its row NaN.
    """
    if input.numel() and input.dtype in native.DTYPES and native.serves(input, planes, scale, zero):
        product: Tensor = torch.ops.pintpot.lut_matmul(input, planes, scale, zero, bits, group_size)
        return product
    flat = input.reshape(-1, input.shape[-1])
    out = lut_matmul_definition(flat, planes, scale, zero, bits, group_size)
    return out.reshape(*input.shape[:-1], scale.shape[0])


def lut_matmul_definition(
    input: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    """What ``lut_matmul`` does, in plain torch, for inputs (B, I)."""
    rows, groups = scale.shape
    tables, steps, sums = lookup_tables(input, group_size)
    quads = planes.shape[2]
    segment, count = _segments(quads, input.shape[1], group_size, input.device)
    group_of = torch.div(
        torch.arange(count, device=input.device), -(-group_size // TABLE_COLUMNS), rounding_mode="floor"
    )
    out = input.new_empty((input.shape[0], rows))
    for tiles in _tiles(planes, input.shape[0] * quads):
        here = slice(tiles.start * TILE_ROWS, min(rows, tiles.stop * TILE_ROWS))
        totals = _totals(tables, planes[tiles], segment, count)[:, : here.stop - here.start]
        weights = scale[here].float()
        offset = ((1 << bits) - 1) / 2 - _zeros(None if zero is None else zero[here], bits, groups, torch.float32)
        parts = totals * (0.5 * steps[:, None]) * weights[:, group_of]
        out[:, here] = (parts.sum(-1) + sums @ (weights * offset).T).to(out.dtype)
    return out


def _totals(tables: Tensor, planes: Tensor, segment: Tensor, count: int) -> Tensor:
    """Sums over planes and quads of ``2 ** plane`` times what each row looks up, (B, rows of the tiles, S)."""
    flat = tables.flatten(1)
    start = ENTRIES * torch.arange(planes.shape[2], device=planes.device)
    totals = tables.new_zeros((tables.shape[0], planes.shape[0] * TILE_ROWS, count))
    for plane in range(planes.shape[1]):
        found = flat[:, _nibbles(planes, plane).long() + start]
        totals.index_add_(2, segment, found * 2.0**plane)
    return totals


def _tiles(planes: Tensor, looked_up: int) -> Iterator[slice]:
    """Tiles whose look-ups are in memory together: about 16 bytes for each."""
    step = max(1, DEFINITION_BYTES // max(1, 16 * TILE_ROWS * looked_up))
    for start in range(0, planes.shape[0], step):
        yield slice(start, min(start + step, planes.shape[0]))
