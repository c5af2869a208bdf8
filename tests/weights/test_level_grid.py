"""Tables of levels: the minifloats, powers of two and normal quantiles that they are, packed, and offsets a group."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.weights.formats import Grid, GroupOffset, LevelGrid
from pintpot.weights.formats.level_grid import levels_of


def weight(rows: int = 12, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def minifloat(exponent: int, mantissa: int) -> set[float]:
    """Every pattern of bits by the definition of floating point with the usual bias."""
    bias, found = (1 << (exponent - 1)) - 1, set()
    for code in range(1 << (exponent + mantissa)):
        e, m = code >> mantissa, code & ((1 << mantissa) - 1)
        fraction = m / (1 << mantissa)
        found.add(fraction * 2.0 ** (1 - bias) if e == 0 else (1 + fraction) * 2.0 ** (e - bias))
    return found | {-number for number in found}


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (3, 0), (1, 2), (2, 3), (4, 3), (5, 2), (1, 0)])
def test_minifloats_are_those_of_the_definition(exponent, mantissa):
    numbers = minifloat(exponent, mantissa)
    largest = max(numbers)
    assert set(levels_of(f"e{exponent}m{mantissa}")) == {number / largest for number in numbers}


def test_e2m1_and_nf4_are_the_published_tables():
    assert [6 * level for level in levels_of("e2m1")][7:] == pytest.approx([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    # Dettmers et al. 2023, arXiv:2305.14314, appendix E.
    nf4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
    assert levels_of("nf4")[:5] == pytest.approx(nf4, abs=1e-6)
    assert levels_of("nf4")[8] == pytest.approx(0.07958029955625534, abs=1e-6)
    assert 0.0 in levels_of("nf4")
    assert len(levels_of("nf4")) == 16


def test_powers_of_two_with_and_without_zero():
    assert levels_of("pow3") == (-1.0, -0.5, -0.25, -0.125, 0.125, 0.25, 0.5, 1.0)
    with_zero = levels_of("e3m0")
    assert 0.0 in with_zero
    assert all(level == 0 or torch.tensor(abs(level)).log2() % 1 == 0 for level in with_zero)


@pytest.mark.parametrize("levels", ["e2m1", "e3m0", "e2m3", "e4m3", "pow4", "nf4", "nf3", "int4"])
@pytest.mark.parametrize("group_size", [24, 40, -1])
def test_each_number_goes_to_the_nearest_level_of_its_group(levels, group_size):
    grid, dense = LevelGrid(levels=levels, group_size=group_size), weight()
    stored = grid.encode(dense)
    assert stored["packed"].dtype is torch.uint8
    assert sum(t.nbytes for t in stored.values()) == grid.nbytes(*dense.shape)
    back = grid.decode(stored, 96, torch.float64)
    points = torch.tensor(levels_of(levels), dtype=torch.float64)
    scale = grid.by_column(stored["scale"].double(), 96)
    nearest = (points * scale[..., None] - dense.double()[..., None]).abs().amin(-1)
    torch.testing.assert_close((back - dense).abs(), nearest, rtol=1e-5, atol=1e-6)


def test_bits_and_bytes_by_the_formula():
    assert [LevelGrid(levels=name).bits for name in ("e2m1", "e3m0", "e4m3", "pow2", "nf4", "e1m0")] == [
        4,
        4,
        8,
        2,
        4,
        2,
    ]
    assert LevelGrid(levels="e2m1", group_size=32).nbytes(10, 128) == 10 * (64 + 4 * 2)
    assert GroupOffset(group_size=32).nbytes(10, 128) == 10 * 4 * 2


@pytest.mark.parametrize("levels", ["e0m3", "e5m3", "nf9", "pow1", "int1", ""])
def test_unknown_tables_are_refused(levels):
    with pytest.raises(ShapeError, match="no table"):
        LevelGrid(levels=levels)


def test_groups_are_checked():
    for kind in (LevelGrid, GroupOffset, Grid):
        with pytest.raises(ShapeError, match="group_size"):
            kind(group_size=0)
        with pytest.raises(ShapeError, match="stored as"):
            kind(scale_dtype="int8")


def test_an_offset_is_the_mean_of_its_group():
    layout, dense = GroupOffset(group_size=40), weight()
    back = layout.decode(layout.encode(dense), 96, torch.float32)
    expected = torch.cat([part.mean(1, keepdim=True).expand_as(part) for part in dense.split(40, 1)], 1)
    torch.testing.assert_close(back, expected, rtol=1e-3, atol=1e-3)
