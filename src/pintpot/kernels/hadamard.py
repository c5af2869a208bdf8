"""The fast Walsh-Hadamard transform: a rotation that spreads every number over all of its block, in n log n steps."""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError


def hadamard(numbers: Tensor, block: int) -> Tensor:
    """Blocks of the last dimension times the Hadamard matrix of Sylvester's order, divided by the root of its size.

    The matrix is symmetric and orthonormal, so that the transform is its own inverse.

    Args:
        numbers: (..., n), any float dtype.
        block: numbers that are mixed; a power of 2 that divides n.

    Returns:
        (..., n) in the dtype of ``numbers``, contiguous.

    Raises:
        ShapeError: when the block is no power of 2 or does not divide n.
    """
    if block < 1 or block & (block - 1) or numbers.shape[-1] % block:
        raise ShapeError(
            f"a Hadamard transform cannot have blocks of {block} in {numbers.shape[-1]} numbers",
            hint=f"use a power of 2 that divides it: {power_of_two(numbers.shape[-1])}",
        )
    mixed, half = numbers * block**-0.5, 1
    while half < block:
        first, second = mixed.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        mixed = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return mixed


def power_of_two(size: int) -> int:
    """The greatest power of 2 that divides a size."""
    return size & -size
