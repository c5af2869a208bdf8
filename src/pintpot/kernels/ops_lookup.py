"""The compiled operations on bit planes, which ``lookup.py`` defines. None keeps or changes its inputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pintpot.core.errors import ShapeError
from pintpot.kernels import native
from pintpot.kernels.layout import packed_size
from pintpot.kernels.lookup import planes_shape
from pintpot.kernels.ops_grid import Dequantize, PackedGrid, Product


def _check(planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> None:
    rows, groups = scale.shape[0], -(-columns // max(1, group_size))
    shaped = (
        columns > 0
        and group_size > 0
        and planes.shape == planes_shape(rows, columns, bits, group_size)
        and scale.shape == (rows, groups)
        and (zero is None or zero.shape == (rows, packed_size(groups, bits)))
    )
    in_bytes = all(tensor is None or tensor.dtype == torch.uint8 for tensor in (planes, zero))
    if not shaped or not in_bytes or scale.dtype not in native.DTYPES:
        raise ShapeError(
            f"{tuple(planes.shape)} and scales {tuple(scale.shape)} are no bit planes of {columns} columns,"
            f" {bits} bits and groups of {group_size}",
            hint="pass the tensors, bits and group size that were stored together",
        )


def _grid(planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> PackedGrid:
    pointers = planes.data_ptr(), scale.data_ptr(), None if zero is None else zero.data_ptr()
    return PackedGrid(*pointers, native.DTYPES[scale.dtype], scale.shape[0], columns, group_size, bits)


def _dequantize(
    planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    out = _dequantize_shape(planes, scale, zero, bits, group_size, columns, dtype)
    grid = _grid(planes, scale, zero, bits, group_size, columns)
    arguments = Dequantize(grid, out.data_ptr(), native.DTYPES[dtype], torch.get_num_threads())
    native.call("planes_dequantize", arguments)
    return out


def _dequantize_shape(
    planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    _check(planes, scale, zero, bits, group_size, columns)
    return planes.new_empty((scale.shape[0], columns), dtype=dtype)


def _matmul(input: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Tensor:
    out = _matmul_shape(input, planes, scale, zero, bits, group_size)
    grid = _grid(planes, scale, zero, bits, group_size, input.shape[-1])
    count = input.shape[:-1].numel()
    arguments = Product(
        grid, input.data_ptr(), out.data_ptr(), native.DTYPES[input.dtype], count, torch.get_num_threads(), 0
    )
    native.call("lut_matmul", arguments)
    return out


def _matmul_shape(
    input: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int
) -> Tensor:
    _check(planes, scale, zero, bits, group_size, input.shape[-1])
    if input.dtype not in native.DTYPES:
        raise ShapeError(f"inputs cannot be {input.dtype}", hint="use float32, bfloat16 or float16")
    return input.new_empty((*input.shape[:-1], scale.shape[0]))


native.register(
    "planes_dequantize(Tensor planes, Tensor scale, Tensor? zero, int bits, int group_size, int columns,"
    " ScalarType dtype) -> Tensor",
    _dequantize,
    _dequantize_shape,
)
native.register(
    "lut_matmul(Tensor input, Tensor planes, Tensor scale, Tensor? zero, int bits, int group_size) -> Tensor",
    _matmul,
    _matmul_shape,
)


@register_flop_formula(torch.ops.pintpot.lut_matmul)
def _matmul_flops(
    input: torch.Size, planes: torch.Size, scale: torch.Size, zero: object, bits: int, *rest: object, **named: object
) -> int:
    """A look-up and a sum for each quad of each plane, row and input."""
    return 2 * bits * planes[2] * scale[0] * (input.numel() // input[-1])
