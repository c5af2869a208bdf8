"""Grids whose codes lie in tiles of 16 rows, so that a vector of the processor has a row in each lane.

Shapes: O out-features, I in-features, G group size (a multiple of 32, or all of I), N = ceil(I / G) groups a row,
T = ceil(O / 16) tiles, B = ceil(I / 32) blocks of columns.

``tiles`` uint8 (T, B, bits, 64): a block is cut into eight *quads* of four columns, and a width into the fields of
``packing.py``. A vector of 64 bytes of a field of ``f`` bits holds ``8 / f`` quads, one after the other, lowest bits
first; byte ``4 r + c`` is of row ``r`` and column ``c`` of the quad. Rows and columns are padded with codes of 0.
``scale`` float (O * N,): those of a tile's 16 rows (of the last tile's, which may be fewer) in the first group, then in
the second; then the next tile. ``zero`` uint8 likewise, or None for a symmetric grid, whose zero is
``2 ** (bits - 1)``. A weight is ``(code - zero) * scale``, as in a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.few_rows import serves_few
from pintpot.kernels.layout import fields_of

ROWS, BLOCK, QUAD, VECTOR = 16, 32, 4, 64


def row_tiles_shape(rows: int, columns: int, bits: int) -> tuple[int, int, int, int]:
    """The shape of ``tiles`` for codes (O, I)."""
    return -(-rows // ROWS), -(-columns // BLOCK), bits, VECTOR


def pack_row_tiles(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 (O, I), each below ``2 ** bits``, as ``tiles``.

    Raises:
        ShapeError: when the width is not 1 to 8.
    """
    rows, columns = codes.shape
    tiles, blocks = row_tiles_shape(rows, columns, bits)[:2]
    padded = functional.pad(codes, (0, -columns % BLOCK, 0, -rows % ROWS))
    quads = padded.view(tiles, ROWS, blocks, BLOCK // QUAD, QUAD).permute(0, 2, 3, 1, 4).flatten(-2)
    vectors, shift = [], 0
    for field in fields_of(bits):
        part = quads if field == 8 else (quads >> shift) & ((1 << field) - 1)
        apart = part.unflatten(2, (field, 8 // field))
        whole = apart[:, :, :, 0].clone()
        for place in range(1, 8 // field):
            whole |= apart[:, :, :, place] << (place * field)
        vectors.append(whole)
        shift += field
    return torch.cat(vectors, dim=2)


def unpack_row_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """The codes (O, I), uint8, that ``pack_row_tiles`` stored."""
    count, blocks, bits, _ = tiles.shape
    quads = tiles.new_zeros((count, blocks, BLOCK // QUAD, VECTOR))
    first = shift = 0
    for field in fields_of(bits):
        whole, apart = tiles[:, :, first : first + field], quads.unflatten(2, (field, 8 // field))
        for place in range(8 // field):
            apart[:, :, :, place] |= ((whole >> (place * field)) & ((1 << field) - 1)) << shift
        first, shift = first + field, shift + field
    codes = quads.unflatten(-1, (ROWS, QUAD)).permute(0, 3, 1, 2, 4).reshape(count * ROWS, blocks * BLOCK)
    return codes[:rows, :columns]


def by_tiles(numbers: Tensor) -> Tensor:
    """What belongs to each row and group, (O, N), in the order of tiles: (O * N,)."""
    whole = numbers.shape[0] // ROWS * ROWS
    tiles = numbers[:whole].unflatten(0, (-1, ROWS)).transpose(1, 2)
    return torch.cat([tiles.flatten(), numbers[whole:].t().flatten()])


def by_rows(numbers: Tensor, groups: int) -> Tensor:
    """The inverse of ``by_tiles``: (O, N)."""
    rows = numbers.shape[0] // groups
    whole = rows // ROWS * ROWS
    tiles = numbers[: whole * groups].view(-1, groups, ROWS).transpose(1, 2).reshape(whole, groups)
    return torch.cat([tiles, numbers[whole * groups :].view(groups, rows - whole).t()])


def groups_of(tiles: Tensor, group_size: int) -> int:
    """N, for groups of multiples of 32 (or of a whole row)."""
    return -(-tiles.shape[1] * BLOCK // group_size) if group_size % BLOCK == 0 else 1


def dequantize_row_tiles(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The numbers (O, I) that tiles stand for, in ``dtype``; bit for bit those of the grid."""
    if dtype in native.DTYPES and in_features and native.serves(tiles, scale, zero):
        dense: Tensor = torch.ops.pintpot.row_tiles_dequantize(tiles, scale, zero, group_size, in_features, dtype)
        return dense
    return dequantize_row_tiles_definition(tiles, scale, zero, group_size, in_features, dtype)


def dequantize_row_tiles_definition(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """What ``dequantize_row_tiles`` does, in plain torch."""
    groups = groups_of(tiles, group_size)
    dense = unpack_row_tiles(tiles, scale.shape[0] // groups, in_features).to(dtype)
    each = torch.arange(in_features, device=tiles.device) // group_size
    dense -= 1 << (tiles.shape[2] - 1) if zero is None else by_rows(zero, groups).to(dtype)[:, each]
    dense *= by_rows(scale, groups).to(dtype)[:, each]
    return dense


def row_tiles_serve(flat: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None) -> bool:
    """Whether the compiled product takes these rows of input (N, I): it is fast where there are integer products."""
    return serves_few(flat, tiles, scale, zero) and native.path() == "avx512"


def row_tiles_matmul(
    flat: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, *, group_size: int, digits: int = 0
) -> Tensor:
    """Few rows of input times the transposed weight, where ``row_tiles_serve`` says so.

    Args:
        flat: (N, I) in float32, bfloat16 or float16.
        tiles: of the weight.
        scale: of the weight.
        zero: of the weight, or None.
        group_size: in-features that share a scale.
        digits: of 8 bits, that inputs are rounded to, relative to the largest of up to 128 columns: 1 to 3, or 0 for as
            many as their dtype has.

    Returns:
        (N, O) in the dtype of the input.

    Raises:
        ShapeError: when the sizes do not belong together.
    """
    if not 0 <= digits <= 3:
        raise ShapeError(f"inputs cannot have {digits} digits", hint="use 1 to 3, or 0 for all that there are")
    product: Tensor = torch.ops.pintpot.row_tiles_matmul(flat, tiles, scale, zero, group_size, digits)
    return product
