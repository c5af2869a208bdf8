"""The compiled operations on factors and sparse weights, which ``low_rank.py``, ``sparse.py`` and ``tiled.py`` define.

Each checks the sizes of its tensors, since the library only has their addresses. None keeps or changes its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.layout import packed_size
from pintpot.kernels.ops_grid import INT64, POINTER, PackedGrid, check_grid, grid_arguments
from pintpot.kernels.tiled import MOST_PLACES


class _LowRank(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("left", "right", "input", "output")),
        *((name, INT64) for name in ("factor_dtype", "dtype", "rows", "rank", "columns", "count", "threads")),
    ]


class _Sparse(ctypes.Structure):
    _fields_ = [
        ("bitmap", POINTER),
        ("values", POINTER),
        ("grid", PackedGrid),
        *((name, INT64) for name in ("dtype", "held", "rows", "columns", "block_rows", "block_columns")),
    ]


class _SparseMatmul(ctypes.Structure):
    _fields_ = [
        ("weight", _Sparse),
        ("input", POINTER),
        ("output", POINTER),
        *((name, INT64) for name in ("dtype", "count", "threads")),
    ]


class _SparseDecode(ctypes.Structure):
    _fields_ = [("weight", _Sparse), ("output", POINTER), ("dtype", INT64), ("threads", INT64)]


class _Tiled(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("values", "places", "starts", "input", "output")),
        *((name, INT64) for name in ("value_dtype", "dtype", "held", "rows", "columns", "tile_rows", "tile_columns")),
        *((name, INT64) for name in ("count", "threads")),
    ]


def _refuse(what: str) -> ShapeError:
    return ShapeError(what, hint="pass the tensors and sizes that were stored together")


def _check_input(input: Tensor) -> None:
    if input.dim() != 2 or input.dtype not in native.DTYPES or input.shape[1] < 1:
        raise _refuse(f"the input must be (rows, in-features) of floats, not {tuple(input.shape)} of {input.dtype}")


def _low_rank(input: Tensor, left: Tensor, right: Tensor) -> Tensor:
    out = _low_rank_shape(input, left, right)
    pointers = left.data_ptr(), right.data_ptr(), input.data_ptr(), out.data_ptr()
    dtypes = native.DTYPES[left.dtype], native.DTYPES[input.dtype]
    sizes = left.shape[0], *right.shape, input.shape[0]
    native.call("low_rank_matmul", _LowRank(*pointers, *dtypes, *sizes, torch.get_num_threads()))
    return out


def _low_rank_shape(input: Tensor, left: Tensor, right: Tensor) -> Tensor:
    _check_input(input)
    shaped = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0] and right.shape[1] == input.shape[1]
    if not shaped or left.dtype != right.dtype or left.dtype not in native.DTYPES:
        raise _refuse(
            f"{tuple(left.shape)} ({left.dtype}) and {tuple(right.shape)} ({right.dtype}) are no factors for"
            f" {input.shape[1]} in-features"
        )
    return input.new_empty((input.shape[0], left.shape[0]))


def _sparse_matmul(
    input: Tensor,
    bitmap: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    block: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    out = _sparse_matmul_shape(input, bitmap, values, scale, zero, block, grid)
    columns = input.shape[1] // block[1]
    if scale is None:
        numbers = values.data_ptr(), PackedGrid(), native.DTYPES[values.dtype], values.numel()
    else:
        bits, group_size, width = grid
        held = values.shape[:-1].numel() * width
        numbers = values.data_ptr(), grid_arguments(values, scale, zero, bits, group_size, width), 0, held
    weight = _Sparse(bitmap.data_ptr(), *numbers, bitmap.shape[0], columns, *block)
    sizes = native.DTYPES[input.dtype], input.shape[0], torch.get_num_threads()
    native.call("sparse_matmul", _SparseMatmul(weight, input.data_ptr(), out.data_ptr(), *sizes))
    return out


def _sparse_matmul_shape(
    input: Tensor,
    bitmap: Tensor,
    values: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    block: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    _check_input(input)
    _check_bitmap(bitmap, block, input.shape[1])
    if scale is None:
        _check_numbers(values)
    else:
        check_grid(values, scale, zero, *grid)
    return input.new_empty((input.shape[0], bitmap.shape[0] * block[0]))


def _check_bitmap(bitmap: Tensor, block: Sequence[int], in_features: int) -> None:
    whole = len(block) == 2 and min(block) > 0 and in_features > 0 and in_features % block[1] == 0
    held = whole and bitmap.dim() == 2 and bitmap.shape[1] == packed_size(in_features // block[1], 1)
    if not held or bitmap.dtype != torch.uint8:
        raise _refuse(
            f"{tuple(bitmap.shape)} of {bitmap.dtype} is no bitmap of blocks {tuple(block)} for {in_features}"
            " in-features"
        )


def _check_numbers(values: Tensor) -> None:
    if values.dtype not in native.DTYPES:
        raise _refuse(f"kept numbers must be floats, not {values.dtype}")


def _sparse_decode(
    bitmap: Tensor, values: Tensor, block: Sequence[int], in_features: int, dtype: torch.dtype
) -> Tensor:
    out = _sparse_decode_shape(bitmap, values, block, in_features, dtype)
    numbers = values.data_ptr(), PackedGrid(), native.DTYPES[values.dtype], values.numel()
    weight = _Sparse(bitmap.data_ptr(), *numbers, bitmap.shape[0], in_features // block[1], *block)
    arguments = _SparseDecode(weight, out.data_ptr(), native.DTYPES[dtype], torch.get_num_threads())
    native.call("sparse_decode", arguments)
    return out


def _sparse_decode_shape(
    bitmap: Tensor, values: Tensor, block: Sequence[int], in_features: int, dtype: torch.dtype
) -> Tensor:
    _check_bitmap(bitmap, block, in_features)
    _check_numbers(values)
    if dtype not in native.DTYPES:
        raise _refuse(f"numbers cannot be decoded as {dtype}")
    return values.new_empty((bitmap.shape[0] * block[0], in_features), dtype=dtype)


def _tiled(
    input: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    out_features: int,
    tile_rows: int,
    tile_columns: int,
) -> Tensor:
    out = _tiled_shape(input, values, places, starts, out_features, tile_rows, tile_columns)
    pointers = (t.data_ptr() for t in (values, places, starts, input, out))
    dtypes = native.DTYPES[values.dtype], native.DTYPES[input.dtype]
    sizes = values.numel(), out_features, input.shape[1], tile_rows, tile_columns, input.shape[0]
    native.call("tiled_matmul", _Tiled(*pointers, *dtypes, *sizes, torch.get_num_threads()))
    return out


def _tiled_shape(
    input: Tensor,
    values: Tensor,
    places: Tensor,
    starts: Tensor,
    out_features: int,
    tile_rows: int,
    tile_columns: int,
) -> Tensor:
    _check_input(input)
    _check_numbers(values)
    sides = min(tile_rows, tile_columns, out_features) > 0 and tile_rows * tile_columns <= MOST_PLACES
    tiles = -(-out_features // max(1, tile_rows)) * -(-input.shape[1] // max(1, tile_columns))
    dtypes = places.dtype == torch.int16 and starts.dtype == torch.int32
    if not sides or not dtypes or values.dim() != 1 or places.shape != values.shape or starts.shape != (tiles + 1,):
        raise _refuse(
            f"numbers {tuple(values.shape)}, places {tuple(places.shape)} ({places.dtype}) and starts"
            f" {tuple(starts.shape)} ({starts.dtype}) are no tiles of {tile_rows} x {tile_columns} of a weight of"
            f" {out_features} x {input.shape[1]}"
        )
    return input.new_empty((input.shape[0], out_features))


_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "low_rank_matmul(Tensor input, Tensor left, Tensor right) -> Tensor": (_low_rank, _low_rank_shape),
    "sparse_matmul(Tensor input, Tensor bitmap, Tensor values, Tensor? scale, Tensor? zero, int[] block, int[] grid)"
    " -> Tensor": (_sparse_matmul, _sparse_matmul_shape),
    "sparse_decode(Tensor bitmap, Tensor values, int[] block, int in_features, ScalarType dtype) -> Tensor": (
        _sparse_decode,
        _sparse_decode_shape,
    ),
    "tiled_matmul(Tensor input, Tensor values, Tensor places, Tensor starts, int out_features, int tile_rows,"
    " int tile_columns) -> Tensor": (_tiled, _tiled_shape),
}

for _schema, (_run, _shape) in _OPERATIONS.items():
    native.register(_schema, _run, _shape)


@register_flop_formula(torch.ops.pintpot.low_rank_matmul)
def _low_rank_flops(input: torch.Size, left: torch.Size, right: torch.Size, **named: object) -> int:
    """A product and a sum for each number of the factors and each input."""
    return 2 * input[0] * (left.numel() + right.numel())


@register_flop_formula(torch.ops.pintpot.sparse_matmul)
def _sparse_flops(
    input: torch.Size,
    bitmap: torch.Size,
    values: torch.Size,
    scale: torch.Size | None,
    zero: torch.Size | None,
    block: Sequence[int],
    grid: Sequence[int],
    **named: object,
) -> int:
    """A product and a sum for each kept number and each input."""
    return 2 * input[0] * (values.numel() if scale is None else values[:-1].numel() * grid[2])


@register_flop_formula(torch.ops.pintpot.tiled_matmul)
def _tiled_flops(input: torch.Size, values: torch.Size, *rest: object, **named: object) -> int:
    """A product and a sum for each kept number and each input."""
    return 2 * input[0] * values.numel()
