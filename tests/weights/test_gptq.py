"""GPTQ beside the plain algorithm, and what compensation is for."""

import pytest
import torch

from pintpot.weights.compensation import compensate_, inverse_factor
from pintpot.weights.formats import Grid
from pintpot.weights.gptq import GPTQ
from pintpot.weights.rtn import RTN
from pintpot.weights.statistics import InputStatistics

ROWS, COLUMNS = 24, 96


def inputs(tokens: int = 400) -> torch.Tensor:
    """Correlated inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator) / COLUMNS**0.5
    sizes = torch.exp(torch.randn(COLUMNS, generator=generator))
    return (torch.randn(tokens, COLUMNS, generator=generator) @ mix) * sizes


def statistics(rows: torch.Tensor) -> InputStatistics:
    seen = InputStatistics.empty(rows.shape[1], rows.device)
    for part in rows.split(100):
        seen.add_(part)
    return seen


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def plainly(dense: torch.Tensor, grid: Grid, hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """Optimal brain quantisation with a fixed order of columns, by the inverse itself and in float64."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    scale, zero = grid.fit(dense)
    left, moments = dense.double()[:, order], hessian.double()[order][:, order]
    moments = moments + damping * moments.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    codes = torch.empty(dense.shape, dtype=torch.uint8)
    for i in range(COLUMNS):
        inverse = torch.linalg.inv(moments[i:, i:])
        place = int(order[i])
        group = slice(place // grid.group_size, place // grid.group_size + 1)
        code = (left[:, i : i + 1] / scale[:, group] + zero[:, group]).round().clamp(0, 2**grid.bits - 1)
        error = left[:, i : i + 1] - (code - zero[:, group]) * scale[:, group]
        left[:, i:] -= error / inverse[0, 0] * inverse[0]
        codes[:, place] = code[:, 0].to(torch.uint8)
    return grid.value(codes, scale, zero)


@pytest.mark.parametrize("bits", [3, 4])
def test_finds_the_codes_of_the_plain_algorithm(bits):
    method, seen, dense = GPTQ(bits=bits, group_size=32), statistics(inputs()), weight()
    grid = method.terms("w", ROWS, COLUMNS, torch.float32)[0]
    found = grid.decode(method.find("w", dense, (grid,), seen)[0], COLUMNS, torch.float32)
    expected = plainly(dense, grid, seen.hessian, method.damping)
    assert ((found - expected).abs() < 1e-5).float().mean() > 0.99


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_loses_less_of_the_output_than_rounding_to_nearest(order, static):
    seen, dense, x = statistics(inputs()), weight(), inputs()
    errors = {}
    for method in (
        RTN(bits=3, group_size=32),
        GPTQ(bits=3, group_size=32, activation_order=order, static_groups=static),
    ):
        formats = method.terms("w", ROWS, COLUMNS, torch.float32)
        stored = method.find("w", dense, formats, seen)[0]
        errors[method.name] = float((x @ (dense - formats[0].decode(stored, COLUMNS, torch.float32)).T).norm())
    assert errors["gptq"] < (0.7 if order else 0.95) * errors["rtn"]


def test_each_error_is_made_up_for_by_the_columns_after_it():
    """With only the first column rounded, the rest becomes the least-squares fit."""
    dense, moments = weight().double(), statistics(inputs()).hessian.double()
    factor = inverse_factor(moments, damping=0.001).double()
    changed = compensate_(dense.clone(), factor, lambda own, numbers: numbers.round() if own.start == 0 else numbers)
    damped = moments + 0.001 * moments.diagonal().mean() * torch.eye(COLUMNS)
    error = (dense - changed)[:, :1]
    best = dense[:, 1:] + error @ torch.linalg.solve(damped[1:, 1:], damped[1:, :1]).T
    torch.testing.assert_close(changed[:, 1:], best, rtol=1e-3, atol=1e-3)


def test_columns_may_be_rounded_several_at_a_time():
    dense, factor = weight(), inverse_factor(statistics(inputs()).hessian)
    one = compensate_(dense.clone(), factor, lambda own, numbers: numbers, width=1)
    four = compensate_(dense.clone(), factor, lambda own, numbers: numbers, width=4)
    assert torch.equal(one, dense)
    assert torch.equal(four, dense)
    rounded = compensate_(dense.clone(), factor, lambda own, numbers: numbers.round(), width=4, block=32)
    assert torch.equal(rounded, rounded.round())


def test_inputs_that_are_always_zero_and_too_few_tokens():
    rows = inputs(tokens=5)
    rows[:, 7] = 0
    method, dense = GPTQ(bits=4, group_size=32), weight()
    formats = method.terms("w", ROWS, COLUMNS, torch.float32)
    stored = method.find("w", dense, formats, statistics(rows))[0]
    held = formats[0].decode(stored, COLUMNS, torch.float32)
    assert torch.isfinite(held).all()
    nothing = statistics(torch.zeros(3, COLUMNS))
    assert torch.isfinite(formats[0].decode(method.find("w", dense, formats, nothing)[0], COLUMNS, torch.float32)).all()


@pytest.mark.parametrize("static", [True, False])
def test_searched_ranges_lose_less_where_codes_are_few(static):
    seen, dense = statistics(inputs()), weight()
    errors = []
    for clip in (False, True):
        method = GPTQ(bits=2, group_size=32, activation_order=static, static_groups=static, clip=clip)
        (grid,) = method.terms("w", ROWS, COLUMNS, torch.float32)
        held = grid.decode(method.find("w", dense, (grid,), seen)[0], COLUMNS, torch.float32)
        errors.append(float(seen.error(dense - held).sum()))
    assert errors[1] < 0.8 * errors[0]
