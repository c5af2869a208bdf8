"""Ranges of groups by search: what is cut off at their ends makes the steps between finer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.weights.formats import Grid

CUTS = tuple(i / 20 for i in range(20))
"""Shares of a group's largest magnitude that are tried, as far as ``most_cut``."""

MOST_CUT = 0.5

NUMBERS_AT_ONCE = 1 << 18
"""Numbers of a weight whose ranges are searched at a time."""


def best_ranges(weight: Tensor, grid: Grid, moments: Tensor, most_cut: float = MOST_CUT) -> tuple[Tensor, Tensor]:
    """The lower and upper end of each group, float32 (O, N), with the least error of its part of the output.

    Args:
        weight: float32 (O, I).
        grid: what it will be rounded to.
        moments: of the inputs: their mean squares (I,), or their second moments (I, I).
        most_cut: the largest share of a group's largest magnitude that is cut off.
    """
    columns = weight.shape[1]
    size = grid.group(columns)
    pad = -columns % size
    if moments.dim() == 1:
        own = functional.pad(moments, (0, pad))
    else:
        squares = [moments[at : at + size, at : at + size] for at in range(0, columns, size)]
        own = torch.stack([functional.pad(square, (0, size - len(square)) * 2) for square in squares])
    step = max(1, NUMBERS_AT_ONCE // columns)
    rows = (functional.pad(part, (0, pad)) if pad else part for part in weight.split(step))
    parts = [_of_rows(part, grid, own, most_cut) for part in rows]
    lows, highs = zip(*parts, strict=True)
    return torch.cat(lows), torch.cat(highs)


def searching_bytes(out_features: int, in_features: int, group: int) -> int:
    """What ``best_ranges`` needs beside a weight of these sizes: six copies in 32 bits of the groups it is at."""
    columns = in_features + -in_features % group
    return 24 * columns * min(out_features, max(1, NUMBERS_AT_ONCE // in_features))


def _of_rows(weight: Tensor, grid: Grid, moments: Tensor, most_cut: float) -> tuple[Tensor, Tensor]:
    """Of rows of whole groups; ``moments`` (I,) or of each group (N, G, G)."""
    size = grid.group(weight.shape[1])
    groups = weight.unflatten(1, (-1, size))
    largest = groups.abs().amax(-1)
    bottom, top = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    low, high, least = bottom, top, torch.full_like(largest, torch.inf)
    for cut in CUTS:
        if cut > most_cut:
            break
        ends = largest * (1 - cut)
        lower, upper = bottom.maximum(-ends), top.minimum(ends)
        scale, zero = grid.settle(lower, upper)
        difference = weight - grid.value(grid.round(weight, scale, zero), scale, zero)
        error = _error(difference.unflatten(1, (-1, size)), moments)
        better = error < least
        least = torch.where(better, error, least)
        low, high = torch.where(better, lower, low), torch.where(better, upper, high)
    return low, high


def _error(difference: Tensor, moments: Tensor) -> Tensor:
    """Of groups (O, N, G), (O, N)."""
    if moments.dim() == 1:
        return difference.square_().mul_(moments.view(difference.shape[1:])).sum(-1)
    apart = difference.transpose(0, 1)
    return ((apart @ moments) * apart).sum(-1).t()
