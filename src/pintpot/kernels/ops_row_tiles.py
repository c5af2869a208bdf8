"""The compiled operations on tiles of rows, which ``row_tiles.py`` defines. None keeps or changes its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.ops_grid import Dequantize, PackedGrid, Product
from pintpot.kernels.row_tiles import BLOCK, groups_of, row_tiles_shape


def _check(tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> None:
    groups, whole = -(-columns // max(1, group_size)), group_size % BLOCK == 0 or group_size >= columns
    shaped = (
        columns > 0
        and group_size > 0
        and whole
        and tiles.dim() == 4
        and 1 <= tiles.shape[2] <= 8
        and scale.dim() == 1
        and scale.shape[0] % groups == 0
        and tiles.shape == row_tiles_shape(scale.shape[0] // groups, columns, tiles.shape[2])
        and (zero is None or zero.shape == scale.shape)
    )
    in_bytes = all(tensor is None or tensor.dtype == torch.uint8 for tensor in (tiles, zero))
    if not shaped or not in_bytes or scale.dtype not in native.DTYPES:
        raise ShapeError(
            f"{tuple(tiles.shape)} and scales {tuple(scale.shape)} are no tiles of {columns} columns in groups of"
            f" {group_size}",
            hint=f"pass what was stored together; groups are multiples of {BLOCK}, or whole rows",
        )


def _grid(tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int) -> PackedGrid:
    pointers = tiles.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    rows = scale.shape[0] // groups_of(tiles, group_size)
    return PackedGrid(*pointers, native.DTYPES[scale.dtype], rows, columns, group_size, tiles.shape[2])


def _dequantize(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    out = _dequantize_shape(tiles, scale, zero, group_size, columns, dtype)
    grid = _grid(tiles, scale, zero, group_size, columns)
    arguments = Dequantize(grid, out.data_ptr(), native.DTYPES[dtype], torch.get_num_threads())
    native.call("row_tiles_dequantize", arguments)
    return out


def _dequantize_shape(
    tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    _check(tiles, scale, zero, group_size, columns)
    return tiles.new_empty((scale.shape[0] // groups_of(tiles, group_size), columns), dtype=dtype)


def _matmul(input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, digits: int) -> Tensor:
    out = _matmul_shape(input, tiles, scale, zero, group_size, digits)
    grid = _grid(tiles, scale, zero, group_size, input.shape[-1])
    sizes = native.DTYPES[input.dtype], input.shape[:-1].numel(), torch.get_num_threads(), digits
    native.call("row_tiles_matmul", Product(grid, input.data_ptr(), out.data_ptr(), *sizes))
    return out


def _matmul_shape(
    input: Tensor, tiles: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, digits: int
) -> Tensor:
    _check(tiles, scale, zero, group_size, input.shape[-1])
    if input.dtype not in native.DTYPES:
        raise ShapeError(f"inputs cannot be {input.dtype}", hint="use float32, bfloat16 or float16")
    return input.new_empty((*input.shape[:-1], scale.shape[0] // groups_of(tiles, group_size)))


native.register(
    "row_tiles_dequantize(Tensor tiles, Tensor scale, Tensor? zero, int group_size, int columns, ScalarType dtype)"
    " -> Tensor",
    _dequantize,
    _dequantize_shape,
)
native.register(
    "row_tiles_matmul(Tensor input, Tensor tiles, Tensor scale, Tensor? zero, int group_size, int digits) -> Tensor",
    _matmul,
    _matmul_shape,
)


@register_flop_formula(torch.ops.pintpot.row_tiles_matmul)
def _matmul_flops(input: torch.Size, *rest: object, out_shape: torch.Size, **named: object) -> int:
    """A product and a sum for each number of the matrix and each input."""
    return 2 * input.numel() * out_shape[-1]
