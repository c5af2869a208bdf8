"""Grids of integers with a scale and a zero a group: back to numbers, and times a matrix in bounded memory.

Shapes: O out-features, I in-features, G group size, N = ceil(I / G) groups a row (the last may be shorter).
``packed`` uint8 (O, packed_size(I, bits)); ``scale`` float (O, N); ``zero`` uint8 (O, packed_size(N, bits)), or None
for a symmetric grid, whose zero is ``2 ** (bits - 1)``. A weight is ``(code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pintpot.core.values import has_values
from pintpot.kernels import gpu, native
from pintpot.kernels.packing import unpack

WORKSPACE_BYTES = 16 << 20
"""Most bytes of temporaries in ``grid_matmul`` (or one row's worth, where a row alone is more)."""

FEW_ROWS = 8
"""Up to so many rows of input the compiled product, which makes no row dense, is the faster."""


def _row_bytes(in_features: int, groups: int, itemsize: int) -> int:
    if native.built():
        return in_features * itemsize
    # At the peak, the codes (a byte each) and the numbers made from them are alive together, and for each group the
    # zero (a byte, and a number) and the scale.
    return in_features * (1 + itemsize) + groups * (1 + 2 * itemsize)


def _rows_at_once(in_features: int, groups: int, itemsize: int) -> int:
    return max(1, WORKSPACE_BYTES // _row_bytes(in_features, groups, itemsize))


def workspace_bytes(out_features: int, in_features: int, group_size: int, dtype: torch.dtype) -> int:
    """Bytes of temporaries that ``grid_matmul`` needs for a matrix of this shape in this dtype and many rows of input.

    For few rows the compiled kernel needs none.
    """
    groups = -(-in_features // group_size)
    rows = min(out_features, _rows_at_once(in_features, groups, dtype.itemsize))
    return rows * _row_bytes(in_features, groups, dtype.itemsize)


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers that a grid stands for; any leading dimensions in place of O.

    Returns:
        (..., I) in ``dtype``.
    """
    stored = packed, scale, zero
    if dtype in native.DTYPES and in_features and (native.serves(*stored) or gpu.serves(*stored)):
        dense: Tensor = torch.ops.pintpot.grid_dequantize(packed, scale, zero, bits, group_size, in_features, dtype)
        return dense
    return dequantize_definition(packed, scale, zero, bits, group_size, in_features, dtype)


def dequantize_definition(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    """What ``dequantize`` does, in plain torch."""
    groups = scale.shape[-1]
    offset = 1 << (bits - 1) if zero is None else unpack(zero, bits, groups).to(dtype)
    scale = scale.to(dtype)
    dense = unpack(packed, bits, in_features).to(dtype)
    whole = in_features // group_size
    if whole:
        main = dense[..., : whole * group_size].unflatten(-1, (whole, group_size))
        main -= offset if isinstance(offset, int) else offset[..., :whole, None]
        main *= scale[..., :whole, None]
    if whole < groups:
        tail = dense[..., whole * group_size :]
        tail -= offset if isinstance(offset, int) else offset[..., whole:]
        tail *= scale[..., whole:]
    return dense


class _GridMatmul(torch.autograd.Function):
    """Saves only the packed storage; backward makes the numbers again."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, layout: Any) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.layout = layout
        return _product(flat, packed, scale, zero, layout)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        packed, scale, zero = ctx.saved_tensors
        back = gradient.new_zeros((gradient.shape[0], ctx.layout["in_features"]))
        for rows in _strips(packed.shape[0], ctx.layout["in_features"], scale.shape[1], gradient):
            back.addmm_(gradient[:, rows], _rows(packed, scale, zero, rows, ctx.layout, gradient.dtype))
        return back, None, None, None, None


def _product(flat: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, layout: dict[str, int]) -> Tensor:
    """Few rows of input times packed storage as it is; many times strips of it that are made dense."""
    count, operands = flat.shape[0], (flat, packed, scale, zero)
    known = count and layout["in_features"] and flat.dtype in native.DTYPES
    on_cpu = count <= FEW_ROWS and native.serves(*operands)
    if known and (on_cpu or (count <= gpu.MOST_ROWS and gpu.serves(*operands))):
        bits, group_size = layout["bits"], layout["group_size"]
        product: Tensor = torch.ops.pintpot.grid_matmul(flat, packed, scale, zero, bits, group_size)
        return product
    out = flat.new_empty((flat.shape[0], packed.shape[0]))
    for rows in _strips(packed.shape[0], layout["in_features"], scale.shape[1], flat):
        torch.mm(flat, _rows(packed, scale, zero, rows, layout, flat.dtype).t(), out=out[:, rows])
    return out


def _strips(out_features: int, in_features: int, groups: int, operand: Tensor) -> Iterator[slice]:
    """Rows that are dense together. For an operand without values the first strip stands for all: they cost alike."""
    step = _rows_at_once(in_features, groups, operand.dtype.itemsize)
    starts = range(0, out_features, step)
    for start in starts if has_values(operand) else starts[:1]:
        yield slice(start, start + step)


def _rows(
    packed: Tensor, scale: Tensor, zero: Tensor | None, rows: slice, layout: dict[str, int], dtype: torch.dtype
) -> Tensor:
    return dequantize(packed[rows], scale[rows], None if zero is None else zero[rows], dtype=dtype, **layout)


def grid_matmul(
    input: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """``input @ weight.T`` for a weight stored as a grid, with at most ``WORKSPACE_BYTES`` of it dense at a time.

    Differentiable in ``input`` only: backward dequantises again and saves no dense weight.

    Args:
        input: (..., I) in float32, bfloat16 or float16; the product is computed in this dtype.
        packed: uint8 (O, packed_size(I, bits)).
        scale: float (O, N).
        zero: uint8 (O, packed_size(N, bits)), or None for a symmetric grid.
        bits: width of a code, 1 to 8.
        group_size: in-features that share a scale.

    Returns:
        (..., O) in the dtype of ``input``.
    """
    layout = {"bits": bits, "group_size": group_size, "in_features": input.shape[-1]}
    flat = input.reshape(-1, input.shape[-1])
    needs_gradient = torch.is_grad_enabled() and input.requires_grad
    out: Tensor = (_GridMatmul.apply if needs_gradient else _product)(flat, packed, scale, zero, layout)
    return out.reshape(*input.shape[:-1], packed.shape[0])
