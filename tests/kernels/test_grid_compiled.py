"""Compiled packing, dequantisation and products: equal to their definitions, near to float64, and safe."""

import pytest
import torch

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import dequantize, grid_matmul, native, pack, packed_size, restore, unpack
from pintpot.kernels.grid import FEW_ROWS, dequantize_definition
from pintpot.kernels.packing import pack_definition, restore_definition, unpack_definition

BITS = range(1, 9)


def make(rows, columns, bits, group_size, *, symmetric=False, scale_dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(scale_dtype)
    zero = None if symmetric else pack_definition(zeros, bits)
    return pack_definition(codes, bits), scale, zero


def dense64(packed, scale, zero, bits, group_size, columns):
    """The numbers of a grid in float64, element by element."""
    codes = unpack_definition(packed, bits, columns).double()
    column = torch.arange(columns) // group_size
    zeros = (1 << (bits - 1)) if zero is None else unpack_definition(zero, bits, scale.shape[-1]).double()[:, column]
    return (codes - zeros) * scale.double()[:, column]


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_bit_for_bit_the_definition(isa, bits):
    generator = torch.Generator().manual_seed(bits)
    for count in (0, 1, 7, 8, 63, 64, 65, 200, 1031):
        codes = torch.randint(0, 1 << bits, (2, 3, count), dtype=torch.uint8, generator=generator)
        packed = torch.ops.pintpot.pack(codes, bits)
        assert torch.equal(packed, pack_definition(codes, bits))
        assert torch.equal(torch.ops.pintpot.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", BITS)
def test_short_rows_are_packed_and_unpacked_together(isa, threads, bits):
    generator = torch.Generator().manual_seed(bits)
    for rows, count in ((0, 8), (257, 32), (300, 20), (999, 8), (5000, 1), (70, 130)):
        codes = torch.randint(0, 1 << bits, (rows, count), dtype=torch.uint8, generator=generator)
        packed = torch.ops.pintpot.pack(codes, bits)
        assert torch.equal(packed, pack_definition(codes, bits))
        assert torch.equal(torch.ops.pintpot.unpack(packed, bits, count), codes)


def make_restorable(shape, bits, group_size, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    groups = (*shape[:-1], -(-shape[-1] // group_size))
    scale, low = (torch.randn(groups, generator=generator).to(dtype) for _ in range(2))
    return pack_definition(codes, bits), scale, low


RESTORED = [((2, 3, 129, 32), 32), ((0, 32), 32), ((300, 64), 32), ((7, 1), 1), ((200, 20), 8), ((3, 9000), 100)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restored_numbers_are_bit_for_bit_the_definition(isa, threads, bits, dtype):
    for shape, group_size in RESTORED:
        packed, scale, low = make_restorable(shape, bits, group_size, dtype)
        found = torch.ops.pintpot.restore(packed, scale, low, bits, group_size, shape[-1])
        assert torch.equal(found, restore_definition(packed, scale, low, bits, group_size, shape[-1]))


def test_the_definition_is_codes_times_scales_and_least_numbers():
    for shape, group_size in RESTORED:
        packed, scale, low = make_restorable(shape, 5, group_size)
        group = torch.arange(shape[-1]) // group_size
        codes = unpack_definition(packed, 5, shape[-1])
        expected = codes.double() * scale.double()[..., group] + low.double()[..., group]
        found = restore_definition(packed, scale, low, 5, group_size, shape[-1])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_part_of_a_block_is_restored_as_all_of_it(compiled):
    packed, scale, low = make_restorable((2, 4, 64, 32), 4, 16)
    whole = restore(packed, scale, low, bits=4, group_size=16, count=32)
    part = [stored[:, :, 8:40] for stored in (packed, scale, low)]
    assert not native.serves(*part)
    assert torch.equal(restore(*part, bits=4, group_size=16, count=32), whole[:, :, 8:40])


def test_restoring_refuses_what_does_not_belong_together(compiled):
    packed, scale, low = make_restorable((4, 64), 4, 32)
    for wrong in ((packed[:, 1:], scale, low), (packed, scale[:, :1], low), (packed, scale, low[:1])):
        stored = [tensor.contiguous() for tensor in wrong]
        with pytest.raises(ShapeError):
            torch.ops.pintpot.restore(*stored, 4, 32, 64)
        with pytest.raises(ShapeError):
            restore_definition(*stored, 4, 32, 64)
    with pytest.raises(ShapeError, match="least numbers"):
        torch.ops.pintpot.restore(packed, scale, low.float(), 4, 32, 64)
    with pytest.raises(ShapeError, match="9 bits"):
        restore(packed, scale, low, bits=9, group_size=32, count=64)
    with pytest.raises(ShapeError):
        restore(packed, scale, low, bits=4, group_size=0, count=64)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantisation_is_bit_for_bit_the_definition(isa, bits, dtype):
    for columns, group_size, symmetric in ((1, 1, False), (70, 32, False), (640, 640, True), (333, 128, True)):
        for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
            stored = make(5, columns, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype)
            found = torch.ops.pintpot.grid_dequantize(*stored, bits, group_size, columns, dtype)
            assert torch.equal(found, dequantize_definition(*stored, bits, group_size, columns, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_float64(isa, bits, dtype):
    shapes = ((1, 1, 1), (9, 200, 64), (6, 1500, 1500), (13, 2048, 128), (4, 96, 32), (5, 1088, 32), (3, 512, 16))
    for rows, columns, group_size in (*shapes, (6, 192, 4)):
        stored = make(rows, columns, bits, group_size, symmetric=columns % 3 == 0)
        x = torch.randn(1 + rows % 3, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
        found = torch.ops.pintpot.grid_matmul(x, *stored, bits, group_size)
        dense = dense64(*stored, bits, group_size, columns)
        # Sums of as many terms as there are columns, none larger than a code's greatest distance from zero.
        reach = x.double().abs() @ (dense.abs() + scale_of_each(stored[1], group_size, columns) * (1 << bits)).T
        # Fixed point holds 16 bits of a half-precision input, and sums round to 24; the result rounds to its dtype.
        error = 2.0**-16 if dtype.itemsize == 2 else 2.0**-20
        limit = error * reach + torch.finfo(dtype).eps * (x.double() @ dense.T).abs() + 1e-6
        assert ((found.double() - x.double() @ dense.T).abs() <= limit).all()


def scale_of_each(scale, group_size, columns):
    return scale.double()[:, torch.arange(columns) // group_size]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("columns", "group_size"), [(700, 64), (2048, 128), (1024, 1024), (1088, 64), (1088, 32), (512, 8)]
)
def test_a_product_depends_on_nothing_but_its_row_and_input(isa, bits, columns, group_size):
    """Neither on the number of threads, nor on what is multiplied beside it, nor on how codes are read."""
    stored = make(67, columns, bits, group_size)
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(3))
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.ops.pintpot.grid_matmul(x, *stored, bits, group_size))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)
    alone = torch.cat([torch.ops.pintpot.grid_matmul(row[None], *stored, bits, group_size) for row in x])
    assert torch.equal(alone, results[0])
    part = [t[8:20].contiguous() for t in stored]
    assert torch.equal(torch.ops.pintpot.grid_matmul(x, *part, bits, group_size), results[0][:, 8:20])


def test_what_fixed_point_cannot_hold(isa):
    stored = make(3, 128, 4, 64, symmetric=True)
    dense = dense64(*stored, 4, 64, 128).float()
    for odd in (torch.nan, torch.inf, -torch.inf, 1e36, 1e-38):
        x = torch.ones(2, 128)
        x[0] = odd if odd == 1e-38 else x[0]
        x[0, 5] = odd
        found = torch.ops.pintpot.grid_matmul(x, *stored, 4, 64)
        expected = x @ dense.T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-43, equal_nan=True)
    zeros = torch.ops.pintpot.grid_matmul(torch.zeros(1, 128), *stored, 4, 64)
    assert not zeros.any()


def test_each_group_has_its_own_fixed_point(isa):
    """What is small beside the inputs of another group keeps all its bits."""
    packed, scale, zero = make(4, 128, 8, 64)
    scale[:, 0] = 0
    x = torch.randn(1, 128, generator=torch.Generator().manual_seed(5))
    x[:, 64:] *= 1e-9
    found = torch.ops.pintpot.grid_matmul(x, packed, scale, zero, 8, 64)
    expected = x.double() @ dense64(packed, scale, zero, 8, 64, 128).T
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-13)


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_the_public_product_takes_few_and_many_rows_and_strided_ones(compiled, rows):
    stored = make(24, 128, 4, 64)
    dense = dense64(*stored, 4, 64, 128).float()
    x = torch.randn(rows, 2 * 128, generator=torch.Generator().manual_seed(6))[:, ::2]
    torch.testing.assert_close(grid_matmul(x, *stored, bits=4, group_size=64), x @ dense.T, rtol=1e-4, atol=1e-2)
    strided = [t.t().contiguous().t() for t in stored]
    assert not native.serves(*strided)
    torch.testing.assert_close(grid_matmul(x, *strided, bits=4, group_size=64), x @ dense.T, rtol=1e-4, atol=1e-2)


def test_gradients_reach_scales_by_way_of_the_definition():
    packed, scale, zero = make(4, 64, 4, 32)
    scale = scale.float().requires_grad_()
    dequantize(packed, scale, zero, bits=4, group_size=32, in_features=64, dtype=torch.float32).sum().backward()
    assert scale.grad is not None


def test_wrong_sizes_never_reach_the_library(compiled):
    packed, scale, zero = make(4, 64, 4, 32)
    x = torch.ones(1, 64)
    with pytest.raises(ShapeError, match="no grid"):
        torch.ops.pintpot.grid_matmul(x, packed[:, :-1].contiguous(), scale, zero, 4, 32)
    with pytest.raises(ShapeError, match="no grid"):
        torch.ops.pintpot.grid_matmul(x, packed, scale[:, :1].contiguous(), zero, 4, 32)
    with pytest.raises(ShapeError, match="no grid"):
        torch.ops.pintpot.grid_dequantize(packed, scale, zero, 4, 0, 64, torch.float32)
    with pytest.raises(ShapeError, match="codes of 4 bits"):
        torch.ops.pintpot.unpack(packed, 4, 65)
    with pytest.raises(ShapeError, match="uint8"):
        torch.ops.pintpot.pack(x, 4)


def test_vmap_is_refused(compiled):
    packed = pack(torch.zeros(3, 8, dtype=torch.uint8), 4)
    assert packed.shape[-1] == packed_size(8, 4)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: unpack(row, 4, 8))(packed)
    scale = torch.ones(3, 1)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row, step: torch.ops.pintpot.restore(row, step, step, 4, 8, 8))(packed, scale)


def test_products_are_counted(compiled):
    from torch.utils.flop_counter import FlopCounterMode

    stored = make(24, 128, 4, 64)
    with FlopCounterMode(display=False) as counter:
        grid_matmul(torch.ones(2, 128), *stored, bits=4, group_size=64)
    assert counter.get_total_flops() == 2 * 2 * 24 * 128
