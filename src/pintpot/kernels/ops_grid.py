"""The compiled operations on packed integers and grids, which ``packing.py`` and ``grid.py`` define.

Each checks the sizes of its tensors, since the library only has their addresses. None keeps or changes its inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.layout import packed_size

INT64 = ctypes.c_int64
POINTER = ctypes.c_void_p


class _Packing(ctypes.Structure):
    _fields_ = [
        ("packed", POINTER),
        ("codes", POINTER),
        *((name, INT64) for name in ("rows", "count", "bits", "threads")),
    ]


class _Restore(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("packed", "scale", "low", "output")),
        *((name, INT64) for name in ("dtype", "rows", "count", "group", "bits", "threads")),
    ]


class PackedGrid(ctypes.Structure):
    """``PintpotGrid``."""

    _fields_ = [
        *((name, POINTER) for name in ("packed", "scale", "zero")),
        *((name, INT64) for name in ("scale_dtype", "rows", "columns", "group", "bits")),
    ]


class Product(ctypes.Structure):
    """``PintpotGridMatmul``."""

    _fields_ = [
        ("grid", PackedGrid),
        ("input", POINTER),
        ("output", POINTER),
        *((name, INT64) for name in ("dtype", "count", "threads", "digits")),
    ]


class Dequantize(ctypes.Structure):
    """``PintpotGridDequantize``."""

    _fields_ = [("grid", PackedGrid), ("output", POINTER), *((name, INT64) for name in ("dtype", "threads"))]


def _rows_of(tensor: Tensor) -> int:
    return tensor.shape[:-1].numel()


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    codes = _unpack_shape(packed, bits, count)
    pointers = packed.data_ptr(), codes.data_ptr()
    native.call("unpack", _Packing(*pointers, _rows_of(packed), count, bits, torch.get_num_threads()))
    return codes


def _unpack_shape(packed: Tensor, bits: int, count: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_size(count, bits):
        raise ShapeError(f"{count} codes of {bits} bits are not in {tuple(packed.shape)}", hint="see packed_size")
    return packed.new_empty((*packed.shape[:-1], count))


def _pack(codes: Tensor, bits: int) -> Tensor:
    packed = _pack_shape(codes, bits)
    pointers = packed.data_ptr(), codes.data_ptr()
    native.call("pack", _Packing(*pointers, _rows_of(codes), codes.shape[-1], bits, torch.get_num_threads()))
    return packed


def _pack_shape(codes: Tensor, bits: int) -> Tensor:
    if codes.dtype != torch.uint8:
        raise ShapeError(f"codes must be uint8, not {codes.dtype}", hint="round and clamp them, then .to(torch.uint8)")
    return codes.new_empty((*codes.shape[:-1], packed_size(codes.shape[-1], bits)))


def _restore(packed: Tensor, scale: Tensor, low: Tensor, bits: int, group_size: int, count: int) -> Tensor:
    out = _restore_shape(packed, scale, low, bits, group_size, count)
    pointers = packed.data_ptr(), scale.data_ptr(), low.data_ptr(), out.data_ptr()
    sizes = _rows_of(packed), count, group_size, bits
    native.call("restore", _Restore(*pointers, native.DTYPES[scale.dtype], *sizes, torch.get_num_threads()))
    return out


def _restore_shape(packed: Tensor, scale: Tensor, low: Tensor, bits: int, group_size: int, count: int) -> Tensor:
    check_grid(packed, scale, None, bits, group_size, count)
    if low.shape != scale.shape or low.dtype != scale.dtype:
        raise ShapeError(
            f"least numbers {tuple(low.shape)} ({low.dtype}) are not those of scales {tuple(scale.shape)}"
            f" ({scale.dtype})",
            hint="pass the tensors that were stored together",
        )
    return packed.new_empty((*packed.shape[:-1], count), dtype=torch.float32)


def check_grid(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> None:
    """Refuse tensors that are no grid of so many columns, bits and groups of this size; ``columns`` may not be 0.

    Raises:
        ShapeError: naming the shapes.
    """
    rows, groups = packed.shape[:-1], -(-columns // max(1, group_size))
    shaped = (
        columns > 0
        and group_size > 0
        and packed.shape == (*rows, packed_size(columns, bits))
        and scale.shape == (*rows, groups)
        and (zero is None or zero.shape == (*rows, packed_size(groups, bits)))
    )
    in_bytes = all(tensor is None or tensor.dtype == torch.uint8 for tensor in (packed, zero))
    if not shaped or not in_bytes or scale.dtype not in native.DTYPES:
        raise ShapeError(
            f"{tuple(packed.shape)} and scales {tuple(scale.shape)} are no grid of {columns} columns,"
            f" {bits} bits and groups of {group_size}",
            hint="pass the tensors, bits and group size that were stored together",
        )


def grid_arguments(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int
) -> PackedGrid:
    """Addresses and sizes of a checked grid."""
    pointers = packed.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    return PackedGrid(*pointers, native.DTYPES[scale.dtype], _rows_of(packed), columns, group_size, bits)


def _dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    out = _dequantize_shape(packed, scale, zero, bits, group_size, columns, dtype)
    grid = grid_arguments(packed, scale, zero, bits, group_size, columns)
    arguments = Dequantize(grid, out.data_ptr(), native.DTYPES[dtype], torch.get_num_threads())
    native.call("grid_dequantize", arguments)
    return out


def _dequantize_shape(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    check_grid(packed, scale, zero, bits, group_size, columns)
    return packed.new_empty((*packed.shape[:-1], columns), dtype=dtype)


def _matmul(input: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    out = _matmul_shape(input, packed, scale, zero, bits, group_size)
    grid = grid_arguments(packed, scale, zero, bits, group_size, input.shape[-1])
    pointers = input.data_ptr(), out.data_ptr()
    arguments = Product(grid, *pointers, native.DTYPES[input.dtype], _rows_of(input), torch.get_num_threads(), 0)
    native.call("grid_matmul", arguments)
    return out


def _matmul_shape(
    input: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    check_grid(packed, scale, zero, bits, group_size, input.shape[-1])
    return input.new_empty((*input.shape[:-1], packed.shape[0]))


_OPERATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "unpack(Tensor packed, int bits, int count) -> Tensor": (_unpack, _unpack_shape),
    "pack(Tensor codes, int bits) -> Tensor": (_pack, _pack_shape),
    "restore(Tensor packed, Tensor scale, Tensor low, int bits, int group_size, int count) -> Tensor": (
        _restore,
        _restore_shape,
    ),
    "grid_dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, int group_size, int columns,"
    " ScalarType dtype) -> Tensor": (_dequantize, _dequantize_shape),
    "grid_matmul(Tensor input, Tensor packed, Tensor scale, Tensor? zero, int bits, int group_size) -> Tensor": (
        _matmul,
        _matmul_shape,
    ),
}

for _schema, (_run, _shape) in _OPERATIONS.items():
    native.register(_schema, _run, _shape)


@register_flop_formula(torch.ops.pintpot.grid_matmul)
def _matmul_flops(input: torch.Size, packed: torch.Size, *rest: object, **named: object) -> int:
    """A product and a sum for each number of the matrix and each input."""
    return 2 * input.numel() * packed[0]
