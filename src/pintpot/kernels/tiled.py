"""Weights in tiles, each kept number with its place in its tile, times a few rows of input as they are stored.

Shapes: N rows of input, O out-features, I in-features, n kept numbers. Tiles of ``tile_rows x tile_columns`` lie row by
row, T in all; ``values`` (n,), ``places`` int16 (n,) in their tiles, and ``starts`` int32 (T + 1,), where each tile's
numbers begin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.kernels import native
from pintpot.kernels.few_rows import serves_few

MOST_PLACES = 1 << 15
"""Numbers in a tile that 16 bits with a sign can tell apart."""


def tiled_matmul_serves(input: Tensor, values: Tensor, places: Tensor, starts: Tensor) -> bool:
    """Whether ``tiled_matmul`` is compiled: for few rows of input, where there is a library."""
    flat = input.reshape(-1, input.shape[-1])
    return values.dtype in native.DTYPES and serves_few(flat, values, places, starts)


def tiled_matmul(
    input: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    *,
    out_features: int,
    tile_rows: int,
    tile_columns: int,
) -> Tensor:
    """``input @ weight.T`` for a weight in tiles, of which none is made dense.

    Args:
        input: (..., I) in float32, bfloat16 or float16.
        values: the kept numbers.
        places: of each in its tile, row by row.
        starts: of the tiles.
        out_features: O.
        tile_rows: out-features of a tile.
        tile_columns: in-features of a tile.

    Returns:
        (..., O) in the dtype of ``input``.

    Raises:
        ShapeError: when places or starts are none of the tiles.
    """
    flat = input.reshape(-1, input.shape[-1])
    sizes = out_features, tile_rows, tile_columns
    if tiled_matmul_serves(input, values, places, starts):
        out: Tensor = torch.ops.pintpot.tiled_matmul(flat, values, places, starts, *sizes)
    else:
        out = tiled_matmul_definition(flat, values, places, starts, *sizes)
    return out.reshape(*input.shape[:-1], out_features)


def tiled_matmul_definition(
    flat: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    out_features: int,
    tile_rows: int,
    tile_columns: int,
) -> Tensor:
    """What ``tiled_matmul`` does, in plain torch, for (N, I) and finite numbers: a product for each kept number."""
    across = -(-flat.shape[1] // tile_columns)
    tiles = torch.repeat_interleave(torch.arange(starts.shape[0] - 1, device=flat.device), starts.diff())
    rows = tiles // across * tile_rows + places // tile_columns
    columns = tiles % across * tile_columns + places % tile_columns
    out = flat.new_zeros((flat.shape[0], out_features))
    return out.index_add_(1, rows, flat[:, columns] * values.to(flat.dtype))
