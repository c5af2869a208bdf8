"""Rounding a weight column by column, where each column's error is made up for by the columns after it.

Shapes: O out-features, I in-features. With ``H`` the mean of ``x x^T`` and ``U`` the upper factor of its inverse
(``H^-1 = U^T U``), the best change of the columns after ``i`` for an error ``e`` in column ``i`` is
``-e / U[i, i] * U[i, i + 1:]`` (Frantar et al. 2022, arXiv:2210.17323, eq. 3 and sec. 3.3).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST_DAMPING = 1.0
"""Share of the mean diagonal above which damping says nothing any more of how inputs go together."""


def inverse_factor(hessian: Tensor, damping: float = 0.01, order: Tensor | None = None) -> Tensor:
    """``U`` (I, I), upper triangular, with ``U^T U`` the inverse of the damped Hessian, float32.

    Inputs that are always zero count as uncorrelated with the others. Where rounding errors leave the Hessian without
    a factor, the damping grows tenfold until there is one; from ``MOST_DAMPING`` on only its diagonal is used.

    Args:
        hessian: mean of ``x x^T`` (I, I); not changed.
        damping: share of the mean of its diagonal that is added to the diagonal.
        order: int64 (I,), of the inputs in the factor; as they are where not given.
    """
    mean = float(hessian.diagonal().mean()) or 1.0
    added = 0.0

    def damped() -> Tensor:
        moved = hessian if order is None else hessian[order[:, None], order]
        # It is symmetric, so this is the matrix itself, column after column, as the factorisations want it.
        made = moved.to(torch.float32, copy=order is None).mT
        diagonal = made.diagonal()
        diagonal[diagonal == 0] = mean
        diagonal += added
        return made

    # Such a matrix can be a large part of all memory in use: each step is made in the place of the one before.
    while damping < MOST_DAMPING:
        added += damping * mean
        factor = damped()
        failed = torch.empty((), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed:
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
            if not failed and torch.isfinite(factor.sum()):
                return factor
        del factor
        damping *= 10
    return torch.diag(damped().diagonal().rsqrt())


def compensate_(
    weight: Tensor,
    factor: Tensor,
    round_columns: Callable[[slice, Tensor], Tensor],
    *,
    width: int = 1,
    block: int = 128,
) -> Tensor:
    """Round all columns of a weight in place, from the first to the last.

    Args:
        weight: float32 (O, I).
        factor: of ``inverse_factor``, in the same order of columns.
        round_columns: for a slice of columns and their numbers as they are by then, (O, width), what they become.
        width: columns that are rounded together.
        block: columns after which the changes reach the rest of the matrix; a multiple of the width.

    Returns:
        ``weight``.
    """
    columns = weight.shape[1]
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(weight[:, start:stop])
        for first in range(start, stop, width):
            own = slice(first, min(first + width, stop))
            rounded = round_columns(own, weight[:, own])
            difference = weight[:, own] - rounded
            if width == 1:
                error = difference / factor[first, first]
            else:
                error = torch.linalg.solve_triangular(factor[own, own], difference, upper=True, left=False)
            weight[:, own] = rounded
            weight[:, own.stop : stop].addmm_(error, factor[own, own.stop : stop], alpha=-1)
            errors[:, own.start - start : own.stop - start] = error
        weight[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return weight
