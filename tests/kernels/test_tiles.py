"""Grids in tiles: every code is in the place of its thread, and the numbers are bit for bit those of the grid."""

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import dequantize_tiles, pack_tiles, tiles_matmul
from pintpot.kernels.grid import dequantize_definition
from pintpot.kernels.packing import unpack_definition
from pintpot.kernels.tiles import tiles_shape, unpack_tiles
from tests.kernels.test_grid_compiled import make


def random_codes(rows, columns, bits):
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_is_undone_and_takes_no_more_bytes(bits):
    for rows, columns in ((32, 48), (5, 3), (17, 70)):
        codes = random_codes(rows, columns, bits)
        tiles = pack_tiles(codes, bits)
        assert tuple(tiles.shape) == tiles_shape(rows, columns, bits)
        assert torch.equal(unpack_tiles(tiles, bits, columns)[:rows], codes)
    assert pack_tiles(random_codes(32, 48, bits), bits).numel() == 32 * 48 * bits // 8


@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8])
def test_a_threads_codes_are_one_string_of_bits(bits):
    codes = random_codes(32, 48, bits)
    tiles = pack_tiles(codes, bits)
    for down, across, row, place in ((0, 0, 0, 0), (2, 1, 5, 3), (1, 0, 7, 2)):
        # The operand of a product of 16 by 8 numbers: a thread has a column, and two pairs of neighbours along it.
        held = [
            codes[16 * across + 8 * half + row, 16 * down + 8 * later + 2 * place + next_]
            for half in (0, 1)
            for later in (0, 1)
            for next_ in (0, 1)
        ]
        string = sum(int(code) << (bits * index) for index, code in enumerate(held))
        thread = 4 * row + place
        assert tiles[down, across, thread::32].tolist() == list(string.to_bytes(bits, "little"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_are_bit_for_bit_those_of_the_grid(bits):
    for rows, columns, group in ((20, 70, 32), (16, 128, 128)):
        packed, scale, zero = make(rows, columns, bits, group, symmetric=bits % 2 == 0)
        tiles = pack_tiles(unpack_definition(packed, bits, columns), bits)
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {"bits": bits, "group_size": group, "in_features": columns, "dtype": dtype}
            found = dequantize_tiles(tiles, scale, zero, **sizes)
            assert torch.equal(found, dequantize_definition(packed, scale, zero, bits, group, columns, dtype))


def test_the_operation_is_the_definition_where_there_is_no_gpu():
    packed, scale, zero = make(20, 128, 5, 64)
    tiles = pack_tiles(unpack_definition(packed, 5, 128), 5)
    x = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(1))
    found = torch.ops.pintpot.tiles_matmul(x, tiles, scale, zero, 5, 64)
    torch.testing.assert_close(found, x @ dequantize_definition(packed, scale, zero, 5, 64, 128, torch.float32).T)
    torch.library.opcheck(torch.ops.pintpot.tiles_matmul, (x, tiles, scale, zero, 5, 64), test_utils="test_faketensor")
    assert tiles_matmul(x, tiles, scale, zero, bits=5, group_size=64) is None


def test_what_does_not_belong_together_is_refused():
    packed, scale, zero = make(20, 128, 4, 64)
    tiles = pack_tiles(unpack_definition(packed, 4, 128), 4)
    x = torch.zeros(1, 128)
    for wrong in ((x[:, :100], tiles, scale), (x, tiles[:, :1], scale), (x, tiles, scale[:3]), (x, tiles.int(), scale)):
        with pytest.raises(ShapeError, match="no tiles"):
            torch.ops.pintpot.tiles_matmul(*wrong, None, 4, 64)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: torch.ops.pintpot.tiles_matmul(row, tiles, scale, zero, 4, 64))(x)
