"""Which directions of keys and values conversions keep, from covariances of activations or from weights.

Shapes: K key-value heads, D head dim, F = D/2 frequencies, f of them folded, G = F/f groups, P dimensions of the rotary
key, R rank; O and I rows and columns of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK_MULTIPLE = 8
"""Ranks that follow from the energy are rounded up to a multiple of this, as the authors' are."""


def rotate_heads(covariance: Tensor, heads: int, rope_dim: int, fold: int) -> tuple[Tensor, Tensor]:
    """Principal components of keys over their heads, frequency by frequency: orthogonal columns, float64.

    The same mixing is used for the real and the imaginary half of a frequency, so that it commutes with rotation.

    Args:
        covariance: of the keys before positions (K*D, K*D).
        heads: K.
        rope_dim: P, how many components keep their positions.
        fold: f, adjacent frequencies whose parts are mixed as if they were one.

    Returns:
        The components that keep positions, ordered as the rotary table (K*D, P), and the others (K*D, K*D - P).
    """
    half = len(covariance) // heads // 2
    groups, kept = half // fold, rope_dim * fold // (2 * half)
    parts = covariance.reshape(heads, 2, groups, fold, heads, 2, groups, fold)
    both = parts.diagonal(dim1=1, dim2=5).sum(-1).diagonal(dim1=1, dim2=4)  # (K, f, K, f, G)
    found = both.permute(4, 0, 1, 2, 3).reshape(groups, heads * fold, heads * fold)
    vectors = torch.linalg.eigh(found).eigenvectors.flip(-1).reshape(groups, heads, fold, heads * fold)
    basis = covariance.new_zeros(heads, 2, groups, fold, 2, groups, heads * fold)
    for side in range(2):
        for group in range(groups):
            basis[:, side, group, :, side, group] = vectors[group]
    basis = basis.reshape(heads * 2 * half, 2, groups, heads * fold)
    rotary = basis[..., :kept]
    if kept > fold:
        # Several components share each frequency: the table repeats as a whole.
        rotary = rotary.unflatten(-1, (-1, fold)).transpose(2, 3)
    return rotary.reshape(len(covariance), rope_dim), basis[..., kept:].reshape(len(covariance), -1)


def leading_directions(covariance: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, largest first: (O, R)."""
    return torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :rank]


def rotary_rows(head_dim: int, rope_dim: int) -> tuple[list[int], list[int]]:
    """The rows of a head that lose their positions, and those that keep them (both halves of every n-th frequency)."""
    frequencies = range(0, head_dim // 2, head_dim // rope_dim)
    rotary = [side * (head_dim // 2) + frequency for side in range(2) for frequency in frequencies]
    return [row for row in range(head_dim) if row not in rotary], rotary


def truncated(weight: Tensor, rank: int, energy: float = 0.0) -> tuple[Tensor, Tensor]:
    """The best factors of a rank: left singular vectors (O, R), and the scaled right ones (R, I).

    Args:
        weight: (O, I).
        rank: R.
        energy: where above 0, R is the most singular values whose squares sum to no more than this share of all.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    if energy:
        share = values.square().cumsum(0) / values.square().sum()
        within = max(1, int((share <= energy).sum()))
        rank = min(-(-within // RANK_MULTIPLE) * RANK_MULTIPLE, len(values))
    return left[:, :rank], values[:rank, None] * right[:rank]
