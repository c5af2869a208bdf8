"""Stochastic rounding: numbers go to the nearest ones above and below at random, so that on average none is lost.

Gupta et al. 2015, arXiv:1502.02551, sec. 3.1, for bfloat16 and float16 instead of fixed point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pintpot.optim._tensors import CHUNK_NUMEL, has_values

NARROW = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of a float32 that a dtype leaves out."""
SMALLEST_EXPONENT = -14
"""Of a normal float16 number; smaller ones are all 2**-24 apart."""


def is_narrow(tensor: Tensor) -> bool:
    """Whether numbers are rounded where they are put into a tensor."""
    return tensor.dtype in NARROW


def round_into_(target: Tensor, value: Tensor, seed: int) -> None:
    """Put float32 numbers into a narrow tensor; the probability of either neighbour is how near it is."""
    generator = torch.Generator(device=target.device).manual_seed(seed) if has_values(target) else None
    bits = NARROW[target.dtype]
    size, device = value.shape, value.device
    noise = torch.randint(1 << bits, size, generator=generator, device=device, dtype=torch.int32)
    # A carry into the kept bits is the step to the neighbour further from zero.
    rounded = (value.contiguous().view(torch.int32) + noise).bitwise_and_(-1 << bits).view(torch.float32)
    if target.dtype == torch.float16:
        steps = 2.0 ** (SMALLEST_EXPONENT - 10)
        even = torch.floor(value / steps + noise.float() / (1 << bits)) * steps
        rounded = torch.where(value.abs() < 2.0**SMALLEST_EXPONENT, even, rounded)
    target.copy_(rounded)


def move_(target: Tensor, update: Tensor, kept: float, seed: int) -> None:
    """``target = kept * target + update`` in float32, strip by strip, rounded once."""
    if target.is_contiguous() and update.is_contiguous():
        strips = zip(target.view(-1).split(CHUNK_NUMEL), update.view(-1).split(CHUNK_NUMEL), strict=True)
    else:
        rows = max(1, CHUNK_NUMEL * target.shape[0] // target.numel())
        strips = zip(target.split(rows), update.split(rows), strict=True)
    for number, (part, more) in enumerate(strips):
        round_into_(part, part.float().mul_(kept).add_(more), seed + number)
