"""Rotated numbers on a grid that is best for the normal distribution: pairs of them share a code.

Source:  Malinovskii et al. 2024, "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem",
         arXiv:2411.17525 (HIGGS): a Hadamard transform makes any numbers nearly normal, and a grid of points in the
         plane that has the least mean squared error for the normal distribution rounds them.
Shapes:  C numbers of a token, in groups of G (a power of 2), each with a scale; a code for every 2 numbers.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pintpot.cache.packed import scale_dtype
from pintpot.kernels import pack, packed_size, unpack
from pintpot.kernels.hadamard import hadamard, power_of_two

GREATEST_GROUP = 1024
"""Numbers that are mixed and share a scale, at most."""

DISTANCES_AT_ONCE = 1 << 18
"""Distances between numbers and grid points (float32) that are held at once."""

REACH, NODES, ROUNDS = 5.0, 120, 40
"""The plane is looked at as far as this many standard deviations, at this many places each way, this often."""


def group_of(numbers: int) -> int:
    """Numbers that are mixed: the greatest power of 2 that divides them, up to 1,024."""
    return min(GREATEST_GROUP, power_of_two(numbers))


@lru_cache(maxsize=4)
def normal_grid(bits: int) -> Tensor:
    """The ``4 ** bits`` points of the plane that the normal distribution is best rounded to: float32 (points, 2).

    Lloyd's algorithm on a lattice of places weighted by the density, from points drawn with a fixed seed.
    """
    line = torch.linspace(-REACH, REACH, NODES)
    places = torch.cartesian_prod(line, line)
    weights = places.square().sum(dim=-1).mul(-0.5).exp()
    # Of many points, those of the best grid lie as densely as the root of the density: twice its variance.
    points = torch.randn(4**bits, 2, generator=torch.Generator().manual_seed(0)) * 2**0.5
    for _ in range(ROUNDS):
        nearest = torch.cdist(places, points).argmin(dim=-1)
        mass = torch.zeros(len(points)).index_add_(0, nearest, weights)
        moved = torch.zeros_like(points).index_add_(0, nearest, places * weights[:, None])
        points = torch.where(mass[:, None] > 0, moved / mass.clamp_min(1e-30)[:, None], points)
    return points


def code_bytes(numbers: int, bits: int) -> int:
    """Bytes of a token's codes."""
    return packed_size(numbers // 2, 2 * bits)


def encode(numbers: Tensor, grid: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round numbers.

    Args:
        numbers: (..., C), any float dtype; C even.
        grid: (4 ** bits, 2), bits at most 4.
        dtype: of the numbers as they came, which says what scales are kept in.

    Returns:
        Packed codes uint8 (..., bytes), and scales (..., C / G): the root mean square of each group.
    """
    size = group_of(numbers.shape[-1])
    groups = numbers.float().unflatten(-1, (-1, size))
    kept = scale_dtype(dtype)
    scale = groups.square().mean(dim=-1).sqrt_().clamp_max_(torch.finfo(kept).max).to(kept)
    steps = scale.float()[..., None]
    normal = hadamard(groups, size) / torch.where(steps > 0, steps, torch.ones_like(steps))
    pairs = normal.reshape(-1, 2)
    points = grid.float()
    offset = points.square().sum(dim=-1) / 2
    some = max(1, DISTANCES_AT_ONCE // len(points))
    nearest = [torch.addmm(-offset, part, points.T).argmax(dim=-1).to(torch.uint8) for part in pairs.split(some)]
    codes = torch.cat(nearest) if nearest else pairs.new_empty(0, dtype=torch.uint8)
    bits = (len(points).bit_length() - 1) // 2
    return pack(codes.reshape(*numbers.shape[:-1], -1), 2 * bits), scale


def decode(codes: Tensor, scale: Tensor, grid: Tensor, numbers: int) -> Tensor:
    """The numbers (..., C) in float32 that ``encode`` rounded."""
    bits = (len(grid).bit_length() - 1) // 2
    places = unpack(codes, 2 * bits, numbers // 2).long()
    groups = grid.float()[places].flatten(-2).unflatten(-1, (scale.shape[-1], -1))
    return hadamard(groups * scale.float()[..., None], groups.shape[-1]).flatten(-2)
