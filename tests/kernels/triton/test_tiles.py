"""Products with grids in tiles on a GPU: near to float64 for every width and shape, and the same each time."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.kernels.packing import unpack_definition
from pintpot.kernels.tiles import pack_tiles
from tests.kernels.test_grid_compiled import dense64, make

pytest.importorskip("triton", reason="the kernels for GPUs need Triton (the extra gpu)")
from pintpot.kernels.triton import grid, tiles

SHAPES = ((40, 128, 64, 1), (130, 64, 64, 3), (7, 100, 100, 18), (33, 200, 128, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def relaid(device, rows, columns, bits, group, symmetric):
    """A grid, and the same numbers in tiles on the device."""
    packed, scale, zero = make(rows, columns, bits, group, symmetric=symmetric)
    held = pack_tiles(unpack_definition(packed, bits, columns), bits)
    return (packed, scale, zero), [None if t is None else t.to(device) for t in (held, scale, zero)]


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_float64(device, bits):
    for index in (bits, bits + 1):
        rows, columns, group, count = SHAPES[index % len(SHAPES)]
        dtype = DTYPES[bits % 3]
        stored, held = relaid(device, rows, columns, bits, group, index % 2 == 0)
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = tiles.matmul(x.to(device), *held, bits, group).cpu()
        expected = x.double() @ dense64(*stored, bits, group, columns).T
        assert found.dtype is dtype
        limit = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
        assert (found.double() - expected).norm() <= limit * expected.norm()


def test_parts_are_added_in_order(device, monkeypatch):
    _, held = relaid(device, 16, 256, 4, 64, False)
    x = torch.randn(1, 256, generator=torch.Generator().manual_seed(1)).to(device)
    split = tiles.matmul(x, *held, 4, 64)
    assert torch.equal(split, tiles.matmul(x, *held, 4, 64))
    monkeypatch.setattr(grid, "PROGRAMS", 1)
    torch.testing.assert_close(split, tiles.matmul(x, *held, 4, 64), rtol=1e-4, atol=1e-4)


def test_nothing_is_multiplied_and_wrong_sizes_are_refused(device):
    _, held = relaid(device, 16, 64, 3, 64, True)
    assert tiles.matmul(torch.zeros(0, 64, device=device), *held, 3, 64).shape == (0, 16)
    with pytest.raises(ShapeError, match="no tiles of 80 columns"):
        tiles.matmul(torch.zeros(1, 80, device=device), *held, 3, 64)
