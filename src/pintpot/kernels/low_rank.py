"""A product of two thin factors times a matrix, with only a little of what lies between them in memory.

Shapes: N rows of input, O out-features, I in-features, R rank; ``left`` (O, R), ``right`` (R, I).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.kernels import native
from pintpot.kernels.few_rows import serves_few

INNER_BYTES = 512 << 10
"""Most bytes of ``input @ right.T`` at a time (or one row's worth): it is used before it leaves the caches."""


def _tile_rows(rank: int, dtype: torch.dtype) -> int:
    return max(1, INNER_BYTES // (rank * dtype.itemsize))


def low_rank_workspace(
    out_features: int, in_features: int, rank: int, factor_dtype: torch.dtype, dtype: torch.dtype
) -> int:
    """Bytes of temporaries that ``low_rank_matmul`` needs for many rows of input: a tile, and factors that are cast.

    For few rows the compiled kernel needs none.
    """
    cast = 0 if dtype is factor_dtype else rank * (out_features + in_features) * dtype.itemsize
    return cast + _tile_rows(rank, dtype) * rank * dtype.itemsize


def low_rank_matmul(input: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``input @ right.T @ left.T``.

    For few rows of input the compiled kernel keeps the inner numbers in float32 in a buffer of its own. For more, tiles
    of rows go through both factors one after the other (the idea of FlashSVD, arXiv:2508.01506), unless a gradient
    wants all inner numbers anyhow.

    Args:
        input: (..., I) in float32, bfloat16 or float16; the product is computed in this dtype.
        left: float (O, R).
        right: float (R, I).

    Returns:
        (..., O) in the dtype of ``input``.
    """
    flat = input.reshape(-1, input.shape[-1])
    if left.dtype == right.dtype and left.dtype in native.DTYPES and serves_few(flat, left, right):
        out: Tensor = torch.ops.pintpot.low_rank_matmul(flat, left, right)
    else:
        out = low_rank_matmul_definition(flat, left, right)
    return out.reshape(*input.shape[:-1], left.shape[0])


def low_rank_matmul_definition(flat: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """What ``low_rank_matmul`` does, in plain torch, for (N, I)."""
    step = _tile_rows(right.shape[0], flat.dtype)
    wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (flat, left, right))
    if wants_gradient or flat.shape[0] <= step:
        return functional.linear(functional.linear(flat, right.to(flat.dtype)), left.to(flat.dtype))
    left, right = left.to(flat.dtype), right.to(flat.dtype)
    out = flat.new_empty((flat.shape[0], left.shape[0]))
    inner = flat.new_empty((step, right.shape[0]))
    for start in range(0, flat.shape[0], step):
        rows = flat[start : start + step]
        tile = torch.mm(rows, right.t(), out=inner[: rows.shape[0]])
        torch.mm(tile, left.t(), out=out[start : start + step])
    return out
