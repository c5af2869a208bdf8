"""Which numbers of a weight matter least, and making up for those that are cut.

Shapes: O out-features, I in-features. ``H`` is the mean of ``x x^T`` over the layer's inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.statistics import InputStatistics

RISES = ((0.8, 0.002), (0.7, 0.007), (0.6, 0.021), (0.5, 0.09), (0.4, 0.28), (0.3, 0.88), (0.2, 4.4))
"""Share of a weight's numbers that is kept, and the relative rise of perplexity."""


def input_weighted_score(weight: Tensor, inputs: InputStatistics | None) -> Tensor:
    """Wanda's score ``|w_ij| * ||x_j||_2`` (Sun et al. 2023, arXiv:2306.11695, eq. 1); the magnitude without inputs.

    Args:
        weight: (O, I).
        inputs: of the layer, or None.

    Returns:
        float32 (O, I); the norm is of the mean square, which orders a row alike.
    """
    magnitude = weight.float().abs()
    return magnitude if inputs is None else magnitude.mul_(inputs.hessian.diagonal().sqrt())


def inverse_hessian_score(weight: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """``w_ij^2 / [H^-1]_jj^2``: large where cutting a number changes the output much, whatever the others do.

    Args:
        weight: float32 (O, I).
        hessian: (I, I).
        damping: share of the mean diagonal of H that is added to it.

    Returns:
        float32 (O, I).
    """
    # H^-1 = U^T U, so that its diagonal is the sum of squares of U's columns.
    return (weight / inverse_factor(hessian, damping).square().sum(0)).square()


def cut_with_compensation(weight: Tensor, mask: Tensor, hessian: Tensor, damping: float) -> Tensor:
    """The weight with what the mask leaves out at zero, and later columns changed to make up for it.

    This is the update of SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774) with a mask that is chosen before.

    Args:
        weight: float32 (O, I); not changed.
        mask: bool (O, I), true for what is kept.
        hessian: (I, I).
        damping: share of the mean diagonal of H that is added to it.
    """
    current = weight.clone()
    # In place, a column's mask is all that its numbers need.
    return compensate_(
        current, inverse_factor(hessian, damping), lambda own, numbers: numbers * mask[:, own].to(torch.float32)
    )
