"""The fast Walsh-Hadamard transform: a rotation that spreads every number over all of its block, in n log n steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pintpot.core.errors import ShapeError
from pintpot.kernels import native


def hadamard(numbers: Tensor, block: int) -> Tensor:
    """Blocks of the last dimension times the Hadamard matrix of Sylvester's order, divided by the root of its size.

    The matrix is symmetric and orthonormal, so that the transform is its own inverse, and its own gradient. Dtypes of
    16 bits are transformed in float32 and rounded once.

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
    through = torch.is_grad_enabled() and numbers.requires_grad
    mixed: Tensor = (_Hadamard.apply if through else _mixed)(numbers, block)
    return mixed


class _Hadamard(torch.autograd.Function):
    """Saves nothing: the matrix is its own transpose."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, block: int) -> Tensor:
        ctx.block = block
        return _mixed(numbers, block)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return hadamard(gradients[0], ctx.block), None


def _mixed(numbers: Tensor, block: int) -> Tensor:
    if numbers.device.type == "cpu":
        numbers = numbers.contiguous()
    if numbers.dtype in native.DTYPES and native.serves(numbers):
        mixed: Tensor = torch.ops.pintpot.hadamard(numbers, block)
        return mixed
    return hadamard_definition(numbers, block)


def hadamard_definition(numbers: Tensor, block: int) -> Tensor:
    """What ``hadamard`` does, in plain torch."""
    wide = torch.promote_types(numbers.dtype, torch.float32)
    mixed, half = numbers.to(wide) * block**-0.5, 1
    while half < block:
        first, second = mixed.unflatten(-1, (-1, 2, half)).unbind(dim=-2)
        mixed = torch.stack([first + second, first - second], dim=-2).flatten(-3)
        half *= 2
    return mixed.to(numbers.dtype)


def power_of_two(size: int) -> int:
    """The greatest power of 2 that divides a size."""
    return size & -size
