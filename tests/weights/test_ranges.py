"""Ranges of groups: what is cut loses less, measured as the inputs weigh it."""

import pytest
import torch

from pintpot.weights.formats import Grid
from pintpot.weights.ranges import CUTS, NUMBERS_AT_ONCE, best_ranges

ROWS, COLUMNS = 12, 80


def weight() -> torch.Tensor:
    numbers = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    return numbers.sign() * numbers.abs() ** 1.5


def moments() -> torch.Tensor:
    tokens = torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(1))
    return tokens.T @ tokens / 200


def errors(dense: torch.Tensor, grid: Grid, second: torch.Tensor, low: torch.Tensor, high: torch.Tensor):
    """Of each row and group, plainly."""
    scale, zero = grid.settle(low, high)
    difference = dense - grid.value(grid.round(dense, scale, zero), scale, zero)
    own = [slice(at, at + grid.group_size) for at in range(0, dense.shape[1], grid.group_size)]
    return torch.stack([((difference[:, p] @ second[p, p]) * difference[:, p]).sum(1) for p in own], 1)


@pytest.mark.parametrize("group_size", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_has_the_best_of_the_ranges_that_are_tried(group_size, symmetric):
    grid, dense, second = Grid(bits=3, group_size=group_size, symmetric=symmetric), weight(), moments()
    parts = dense.split(group_size, 1)
    bottom = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    top = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    ends = torch.stack([part.abs().amax(1) for part in parts], 1)
    tried = [
        errors(dense, grid, second, bottom.maximum(-(1 - cut) * ends), top.minimum((1 - cut) * ends))
        for cut in CUTS
        if cut <= 0.6
    ]
    found = errors(dense, grid, second, *best_ranges(dense, grid, second, most_cut=0.6))
    torch.testing.assert_close(found, torch.stack(tried).amin(0))
    assert (found < tried[0]).float().mean() > 0.5


def test_mean_squares_are_second_moments_without_the_rest():
    grid, dense, squares = Grid(bits=3, group_size=32), weight(), moments().diagonal()
    one, other = best_ranges(dense, grid, squares), best_ranges(dense, grid, torch.diag(squares))
    torch.testing.assert_close(one, other)


def test_a_single_outlier_of_a_group_is_cut():
    dense = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    dense[:, 3] = 12.0
    squares = torch.ones(32)
    squares[3] = 1e-4  # its own input hardly ever is anything
    low, high = best_ranges(dense, Grid(bits=3, group_size=32), squares, most_cut=0.6)
    assert (high < 8).all()
    assert low.shape == high.shape == (4, 1)


def test_rows_are_searched_in_parts():
    grid, columns = Grid(bits=2, group_size=64), 256
    dense = torch.randn(NUMBERS_AT_ONCE // columns + 3, columns, generator=torch.Generator().manual_seed(2))
    low, high = best_ranges(dense, grid, torch.ones(columns))
    last = best_ranges(dense[-2:], grid, torch.ones(columns))
    torch.testing.assert_close((low[-2:], high[-2:]), last)
