"""Weights of which only some blocks are stored: back to numbers, and times a few rows of input as they are stored.

Shapes: O out-features, I in-features; blocks of ``block_rows x block_columns`` numbers, R rows of them with C each.
``bitmap`` uint8 (R, packed_size(C, 1)) says which are kept (packed as codes of one bit). The numbers of the kept ones
lie one block after the other, each row by row, the blocks of a row of blocks in order of their columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.kernels import native
from pintpot.kernels.few_rows import serves_few
from pintpot.kernels.grid import dequantize
from pintpot.kernels.packing import unpack


@dataclass(frozen=True, kw_only=True)
class GridNumbers:
    """Kept numbers in the rows of a grid, one row after the other.

    Attributes:
        packed: uint8 (rows, packed_size(width, bits)).
        scale: float (rows, groups).
        zero: uint8 (rows, packed_size(groups, bits)), or None.
        bits: width of a code.
        group_size: numbers of a row that share a scale.
        width: numbers in a row.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    width: int


def sparse_matmul_serves(input: Tensor, bitmap: Tensor, values: Tensor | GridNumbers) -> bool:
    """Whether ``sparse_matmul`` makes no row of the weight dense: for few rows of input, where there is a library."""
    flat = input.reshape(-1, input.shape[-1])
    if isinstance(values, GridNumbers):
        return values.scale.dtype in native.DTYPES and serves_few(
            flat, bitmap, values.packed, values.scale, values.zero
        )
    return values.dtype in native.DTYPES and serves_few(flat, bitmap, values)


def sparse_matmul(
    input: Tensor, bitmap: Tensor, values: Tensor | GridNumbers, *, block_rows: int, block_columns: int
) -> Tensor:
    """``input @ weight.T`` for a weight of which some blocks are stored.

    Args:
        input: (..., I) in float32, bfloat16 or float16.
        bitmap: which blocks are kept.
        values: the kept numbers, of any shape, or where they are in a grid; some may be left over.
        block_rows: out-features of a block.
        block_columns: in-features of a block.

    Returns:
        (..., O) in the dtype of ``input``.

    Raises:
        ShapeError: when there are fewer numbers than the bitmap says.
    """
    if not sparse_matmul_serves(input, bitmap, values):
        return sparse_matmul_definition(input, bitmap, values, block_rows, block_columns)
    flat = input.reshape(-1, input.shape[-1])
    block = [block_rows, block_columns]
    out: Tensor
    if isinstance(values, GridNumbers):
        grid = [values.bits, values.group_size, values.width]
        out = torch.ops.pintpot.sparse_matmul(flat, bitmap, values.packed, values.scale, values.zero, block, grid)
    else:
        out = torch.ops.pintpot.sparse_matmul(flat, bitmap, values, None, None, block, [])
    return out.reshape(*input.shape[:-1], out.shape[-1])


def sparse_matmul_definition(
    input: Tensor, bitmap: Tensor, values: Tensor | GridNumbers, block_rows: int, block_columns: int
) -> Tensor:
    """What ``sparse_matmul`` does, in plain torch: with the whole weight dense."""
    if isinstance(values, GridNumbers):
        sizes = {"bits": values.bits, "group_size": values.group_size, "in_features": values.width}
        values = dequantize(values.packed, values.scale, values.zero, **sizes, dtype=input.dtype)
    sides = {"block_rows": block_rows, "block_columns": block_columns}
    return input @ sparse_decode_definition(bitmap, values, **sides, in_features=input.shape[-1], dtype=input.dtype).t()


def sparse_decode(
    bitmap: Tensor, values: Tensor, *, block_rows: int, block_columns: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The kept numbers at their places, and zeros.

    Args:
        bitmap: which blocks are kept.
        values: their numbers, of any shape; some may be left over.
        block_rows: out-features of a block.
        block_columns: in-features of a block.
        in_features: I.
        dtype: of the result.

    Returns:
        (O, I).

    Raises:
        ShapeError: when there are fewer numbers than the bitmap says.
    """
    if values.dtype in native.DTYPES and dtype in native.DTYPES and in_features and native.serves(bitmap, values):
        dense: Tensor = torch.ops.pintpot.sparse_decode(bitmap, values, [block_rows, block_columns], in_features, dtype)
        return dense
    sides = {"block_rows": block_rows, "block_columns": block_columns}
    return sparse_decode_definition(bitmap, values, **sides, in_features=in_features, dtype=dtype)


def sparse_decode_definition(
    bitmap: Tensor, values: Tensor, *, block_rows: int, block_columns: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """What ``sparse_decode`` does, in plain torch."""
    mask = unpack(bitmap, 1, in_features // block_columns).bool()
    numbers = values.to(dtype)
    blocks = numbers.new_zeros((*mask.shape, block_rows * block_columns))
    return in_order(blocks.masked_scatter_(mask[..., None], numbers), block_rows, block_columns)


def in_order(blocks: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Numbers by blocks (R, C, block_rows * block_columns) in the order of the weight, (O, I)."""
    rows, columns, _ = blocks.shape
    if block_rows == 1:
        return blocks.reshape(rows, columns * block_columns)
    parts = blocks.reshape(rows, columns, block_rows, block_columns)
    return parts.transpose(1, 2).reshape(rows * block_rows, columns * block_columns)
