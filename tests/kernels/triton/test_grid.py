"""Products with grids on a GPU: near to float64 for every layout, the same each time, and safe at the edges."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.kernels import gpu, grid_matmul
from pintpot.kernels.grid import dequantize_definition
from pintpot.weights.formats import Grid
from tests.kernels.test_grid_compiled import dense64, make

pytest.importorskip("triton", reason="the kernels for GPUs need Triton (the extra gpu)")
from pintpot.kernels.triton import grid

SHAPES = (  # rows of the weight, columns, group, rows of input
    (66, 256, 64, 1),
    (5, 70, 32, 1),
    (9, 128, 128, 3),
    (13, 104, 104, 17),
    (9, 48, 24, 5),
    (1, 1, 1, 2),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(rows, columns, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def on(device, tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("bits", range(1, 9))
def test_products_are_those_of_float64(device, bits):
    for index in (bits // 2, bits // 2 + 2, bits // 2 + 4):
        rows, columns, group, count = SHAPES[index % len(SHAPES)]
        dtype = DTYPES[(bits + index) % 3]
        stored = make(rows, columns, bits, group, symmetric=index % 2 == 0, scale_dtype=DTYPES[(bits + index) % 2])
        x = inputs(count, columns, dtype)
        found = grid.matmul(x.to(device), *on(device, stored), bits, group).cpu()
        expected = x.double() @ dense64(*stored, bits, group, columns).T
        assert found.dtype is dtype
        # Numbers of 16 bits are rounded at most twice: where groups do not fit tiles, and in the end.
        limit = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
        assert (found.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("bits", range(1, 9))
def test_dequantisation_is_bit_for_bit_the_definition(device, bits):
    for columns, group in ((70, 32), (1056, 128)):
        stored = make(3, columns, bits, group, symmetric=bits % 2 == 0)
        for dtype in (torch.float32, torch.float16):
            found = grid.dequantize(*on(device, stored), bits, group, columns, dtype).cpu()
            assert torch.equal(found, dequantize_definition(*stored, bits, group, columns, dtype))


def test_dequantisation_to_bfloat16(device):
    stored = make(3, 200, 5, 64)
    found = grid.dequantize(*on(device, stored), 5, 64, 200, torch.bfloat16).cpu()
    expected = dequantize_definition(*stored, 5, 64, 200, torch.bfloat16)
    # The interpreter does not round to the nearest.
    torch.testing.assert_close(found, expected, rtol=0 if device.type == "cuda" else 2**-6, atol=0)


@pytest.mark.parametrize("rows", [1, 4])
def test_parts_are_added_in_order(device, rows, monkeypatch):
    stored, x = make(64, 512, 4, 64), inputs(rows, 512)
    arguments = (x.to(device), *on(device, stored), 4, 64)
    split = grid.matmul(*arguments)
    assert torch.equal(split, grid.matmul(*arguments))
    monkeypatch.setattr(grid, "PROGRAMS", 1)
    whole = grid.matmul(*arguments)
    assert not torch.equal(split, whole)
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_what_lies_beside_is_not_read_and_rows_do_not_mix(device, rows):
    stored = make(5, 70, 3, 32, scale_dtype=torch.float32)
    x = inputs(rows, 70)

    def amid_other_things(tensor):
        room = torch.full((tensor.numel() + 512,), 255 if tensor.dtype == torch.uint8 else torch.nan).to(tensor.dtype)
        room[256:-256] = tensor.flatten()
        return room.to(device)[256:-256].view(tensor.shape)

    expected = grid.matmul(x.to(device), *on(device, stored), 3, 32)
    found = grid.matmul(*(amid_other_things(t) for t in (x, *stored)), 3, 32)
    assert torch.equal(found, expected)
    assert torch.isfinite(found).all()
    x[-1, 3] = torch.nan
    spoilt = grid.matmul(x.to(device), *on(device, stored), 3, 32)
    assert torch.isnan(spoilt[-1]).all()
    assert torch.equal(spoilt[:-1], expected[:-1])


def test_nothing_is_multiplied_and_wrong_sizes_are_refused(device):
    packed, scale, zero = on(device, make(4, 64, 4, 32))
    assert grid.matmul(torch.zeros(0, 64, device=device), packed, scale, zero, 4, 32).shape == (0, 4)
    assert grid.dequantize(packed[:0], scale[:0], zero[:0], 4, 32, 64, torch.float32).shape == (0, 64)
    with pytest.raises(ShapeError):
        grid.matmul(torch.zeros(1, 65, device=device), packed, scale, zero, 4, 32)
    with pytest.raises(ShapeError):
        grid.dequantize(packed, scale[:, :1].contiguous(), zero, 4, 32, 64, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 8, 500])
def test_a_grid_on_a_gpu_is_multiplied_there(rows):
    layout = Grid(bits=4, group_size=64)
    stored = {name: t.cuda() for name, t in layout.encode(inputs(96, 512)).items()}
    x = inputs(rows, 512, torch.float16).cuda()
    assert gpu.serves(x, *stored.values())
    expected = x.double() @ layout.decode(stored, 512, torch.float64).T
    assert (layout.matmul(x, stored).double() - expected).norm() < 2e-3 * expected.norm()
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        grid_matmul(moved, **stored, bits=4, group_size=64).sum().backward()
    assert moved.grad.isfinite().all()
