"""Arithmetic of vision transformers in whole numbers alone: rescaling, softmax, GELU and layer normalisation.

A tensor of whole numbers stands for itself times a scale that is known before anything is computed. Everything here is
int64 with values that fit the widths that are stated, so that hardware with 32-bit registers (and a 64-bit product in
``rescale``) computes the same. Shapes: any, the last dimension is the one that is normalised.

The functions are those of I-ViT (Li and Gu 2022, arXiv:2207.01405): Shiftmax, ShiftGELU and I-LayerNorm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MULTIPLIER_BITS = 24
"""Width of the whole number by which a tensor is rescaled, before the shift."""

LARGEST = (1 << 31) - 1

EXPONENT_BITS = 22
"""Width that an exponential may have: a few hundred of them then add up in 31 bits, and their reciprocal keeps 8."""

FRACTION_BITS = 4
"""Bits by which numbers are moved to the left before their exponential, so that its whole-numbered unit is precise."""

COARSEST_UNIT = -(1 << 18)
"""Numbers of a scale so small that they need more steps for a power of 2 are all nearly zero."""


def dyadic(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers ``m`` and ``e`` (int32) with ``m / 2^e`` next to each ratio of scales."""
    mantissa, exponent = torch.frexp(ratio.double())
    shift = MULTIPLIER_BITS - exponent
    # A ratio so small that the shift has no room is one of fewer digits, and then zero.
    over = (shift - 62).clamp(min=0)
    multiplier = (mantissa * torch.exp2((MULTIPLIER_BITS - over).double())).round()
    return multiplier.to(torch.int32), (shift - over).to(torch.int32)


def rescale(numbers: Tensor, multiplier: Tensor, shift: Tensor, bits: int) -> Tensor:
    """Numbers (at most 38 bits) times ``multiplier / 2^shift``, rounded half up and cut to words of some bits."""
    shift = shift.long()
    half = torch.where(shift > 0, torch.ones_like(shift) << (shift - 1).clamp(min=0), torch.zeros_like(shift))
    product = numbers * multiplier.long()
    moved = torch.where(shift >= 0, (product + half) >> shift.clamp(min=0), product << (-shift).clamp(min=0))
    top = 1 << (bits - 1)
    return moved.clamp(-top, top - 1)


def shift_exponent(numbers: Tensor, unit: int, room: int) -> Tensor:
    """``e^(numbers * scale)`` times ``-unit * 2^room`` by shifts and sums, for numbers that are not positive.

    ``e^x`` is ``2^(x * 1.4375)``, whose fraction is taken to be linear.

    Args:
        numbers: int64, not positive, of the scale.
        unit: of ``unit_for``.
        room: bits by which results are moved to the left; results below 1 are zero.
    """
    numbers = numbers << FRACTION_BITS
    powers = numbers + (numbers >> 1) - (numbers >> 4)
    powers = powers.clamp(min=room * unit)
    whole = powers.neg() // -unit
    rest = powers - unit * whole
    return ((rest - 2 * unit) << (room - whole)) >> 1


def unit_for(scale: float) -> int:
    """How many steps of a scale, each in ``2^FRACTION_BITS`` parts, halve a power of 2, negative."""
    return max(math.floor(-(1 << FRACTION_BITS) / scale), COARSEST_UNIT)


def room_for(unit: int, most: int) -> int:
    """Bits to the left, at most so many, with which exponentials of a unit fit in ``EXPONENT_BITS``."""
    return max(1, min(most, EXPONENT_BITS - (-2 * unit).bit_length()))


def shiftmax(numbers: Tensor, scale: float, bits: int, most_room: int = 15) -> Tensor:
    """The softmax of ``numbers * scale``, times ``2^(bits - 1)``.

    Args:
        numbers: int64.
        scale: of the numbers; used for one constant only.
        bits: of the result, signed.
        most_room: digits of the exponentials, "sufficiently large" in the authors' code.
    """
    unit = unit_for(scale)
    exponents = shift_exponent(numbers - numbers.amax(-1, keepdim=True), unit, room_for(unit, most_room))
    factor = LARGEST // exponents.sum(-1, keepdim=True).clamp(1, LARGEST)
    return (exponents * factor) >> (32 - bits)


def shift_gelu(numbers: Tensor, scale: float, bits: int, most_room: int = 23) -> Tensor:
    """``x sigmoid(1.702 x)`` of ``x = numbers * scale``; the result's scale is ``scale / 2^(bits - 1)``.

    Args:
        numbers: int64.
        scale: of the numbers; used for one constant only.
        bits: of the sigmoid, signed.
        most_room: digits of the exponentials, "sufficiently large" in the authors' code.
    """
    unit = unit_for(1.702 * scale)
    room = room_for(unit, most_room)
    top = numbers.clamp(min=0)
    above = shift_exponent(numbers - top, unit, room)
    factor = LARGEST // (above + shift_exponent(-top, unit, room)).clamp(1, LARGEST)
    return numbers * ((above * factor) >> (32 - bits))


def integer_norm(numbers: Tensor, shift: Tensor, steps: int = 10) -> Tensor:
    """Numbers without their mean, over the root of their sum of squares, times ``2^30``, and ``shift`` added.

    Args:
        numbers: int64 (..., C), of 16 bits.
        shift: int64 (C,), the bias over the weight in the same unit.
        steps: of Newton's iteration for the root, which starts at ``2^16``.
    """
    count = numbers.shape[-1]
    mean = (2 * numbers.sum(-1, keepdim=True) + count) // (2 * count)
    centred = numbers - mean
    total = (centred * centred).sum(-1, keepdim=True)
    root = torch.full_like(total, 1 << 16)
    for _ in range(steps):
        root = (root + total // root) >> 1
    return ((centred * (LARGEST // root)) >> 1) + shift
