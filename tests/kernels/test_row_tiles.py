"""Tiles of rows: the grid's numbers bit for bit, and products near to float64."""

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import native, unpack
from pintpot.kernels.row_tiles import (
    by_rows,
    by_tiles,
    dequantize_row_tiles_definition,
    pack_row_tiles,
    row_tiles_matmul,
    row_tiles_shape,
    unpack_row_tiles,
)
from pintpot.weights.formats import Grid, RowTiles

BITS = range(1, 9)
SHAPES = ((40, 96, 32), (33, 70, -1), (64, 512, 128), (16, 300, 64), (70, 1000, -1), (1, 1, -1), (15, 320, 160))


def made(rows, columns, bits, group_size, *, symmetric=False, seed=0):
    """A grid, its stored tensors, and those of the tiles."""
    grid = Grid(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    stored = grid.encode(weight)
    held = RowTiles(bits=bits, group_size=group_size, symmetric=symmetric).relaid(stored, columns)
    return grid, stored, (held["tiles"], held["scale"], held.get("zero"))


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_undone(bits):
    for rows, columns, _ in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
        tiles = pack_row_tiles(codes, bits)
        assert tiles.shape == row_tiles_shape(rows, columns, bits)
        assert torch.equal(unpack_row_tiles(tiles, rows, columns), codes)


def test_a_lane_has_four_neighbouring_columns_of_a_row():
    codes = torch.zeros(16, 32, dtype=torch.uint8)
    codes[3, 4:8] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    lanes = pack_row_tiles(codes, 8)[0, 0, 1].view(16, 4)
    assert lanes[3].tolist() == [1, 2, 3, 4]
    assert int(lanes.sum()) == 10


def test_scales_lie_tile_by_tile():
    numbers = torch.arange(35 * 3).view(35, 3)
    assert torch.equal(by_rows(by_tiles(numbers), 3), numbers)
    assert by_tiles(numbers)[:17].tolist() == [*range(0, 48, 3), 1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_those_of_the_grid(isa, bits, dtype):
    for rows, columns, group_size in SHAPES:
        grid, stored, held = made(rows, columns, bits, group_size, symmetric=columns % 3 == 0)
        expected, group = grid.decode(stored, columns, dtype), grid.group(columns)
        assert torch.equal(torch.ops.pintpot.row_tiles_dequantize(*held, group, columns, dtype), expected)
        assert torch.equal(dequantize_row_tiles_definition(*held, group, columns, dtype), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_near_those_of_float64(isa, threads, bits, dtype):
    for rows, columns, group_size in SHAPES:
        grid, stored, held = made(rows, columns, bits, group_size, symmetric=columns % 3 == 0)
        x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        expected = x.double() @ grid.decode(stored, columns, torch.float64).T
        exact, short = (row_tiles_matmul(x, *held, group_size=grid.group(columns), digits=d) for d in (0, 1))
        # No number is larger than a code's greatest distance from zero.
        column = torch.arange(columns) // grid.group(columns)
        reach = x.double().abs() @ (stored["scale"].double()[:, column] * (1 << bits)).T
        error, rounded = (2.0**-16, 2.0**-8) if dtype is torch.bfloat16 else (2.0**-20, 0.0)
        assert ((exact.double() - expected).abs() <= error * reach + rounded * expected.abs() + 1e-6).all()
        assert ((short.double() - expected).abs() <= 2.0**-7 * reach + rounded * expected.abs()).all()


def test_a_product_depends_on_nothing_but_its_row_and_input(isa):
    tiles, scale, zero = made(200, 512, 4, 128)[2]
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(3))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(row_tiles_matmul(x, tiles, scale, zero, group_size=128))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)
    alone = torch.cat([row_tiles_matmul(row[None], tiles, scale, zero, group_size=128) for row in x])
    assert torch.equal(alone, results[0])
    part = RowTiles(group_size=128).rows({"tiles": tiles, "scale": scale, "zero": zero}, slice(16, 64))
    few = row_tiles_matmul(x, part["tiles"], part["scale"], part["zero"], group_size=128)
    assert torch.equal(few, results[0][:, 16:64])


def test_what_fixed_point_cannot_hold(isa):
    grid, stored, held = made(20, 128, 4, 64)
    dense = grid.decode(stored, 128, torch.float32)
    for odd in (torch.nan, torch.inf, 1e36):
        x = torch.ones(2, 128)
        x[0, 5] = odd
        found = row_tiles_matmul(x, *held, group_size=64)
        torch.testing.assert_close(found, x @ dense.T, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_what_does_not_belong_together_is_refused(compiled):
    _, _, (tiles, scale, zero) = made(32, 128, 4, 64)
    x = torch.ones(1, 128)
    for wrong in ((tiles[:1], scale, zero), (tiles, scale[:-1], zero), (tiles, scale, zero[:-2])):
        with pytest.raises(ShapeError):
            torch.ops.pintpot.row_tiles_matmul(x, *wrong, 64, 0)
    with pytest.raises(ShapeError, match="groups"):
        torch.ops.pintpot.row_tiles_matmul(x, tiles, scale, zero, 48, 0)
    with pytest.raises(ShapeError, match="digits"):
        row_tiles_matmul(x, tiles, scale, zero, group_size=64, digits=4)
    with pytest.raises(ShapeError, match="multiple of 32"):
        RowTiles(group_size=48)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: torch.ops.pintpot.row_tiles_matmul(row[None], tiles, scale, zero, 64, 0))(x)


def test_fake_tensors_and_counts(compiled):
    from torch.utils.flop_counter import FlopCounterMode

    _, _, held = made(40, 128, 3, 64)
    torch.library.opcheck(torch.ops.pintpot.row_tiles_matmul, (torch.ones(2, 128), *held, 64, 0))
    torch.library.opcheck(torch.ops.pintpot.row_tiles_dequantize, (*held, 64, 128, torch.float32))
    with FlopCounterMode(display=False) as counter:
        row_tiles_matmul(torch.ones(2, 128), *held, group_size=64)
    assert counter.get_total_flops() == 2 * 2 * 40 * 128


def test_a_weight_takes_it_by_itself_where_the_processor_has_it(compiled):
    layout = RowTiles(bits=4, group_size=64)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    stored = layout.encode(weight)
    assert layout.multiplies_packed() == (native.path() == "avx512")
    few = layout.multiply_few(torch.ones(2, 128), stored)
    assert (few is not None) == layout.multiplies_packed()
    product = layout.matmul(torch.ones(2, 128), stored)
    expected = layout.decode(stored, 128, torch.float32).sum(1).expand(2, -1)
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
    assert unpack(Grid(bits=4, group_size=64).encode(weight)["packed"], 4, 128).shape == weight.shape
