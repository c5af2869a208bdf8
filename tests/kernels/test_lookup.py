"""Bit planes and products by look-up: the compiled ones are their definitions, and both are near to float64."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import dequantize_planes, lut_matmul, native, pack_planes, packed_size
from pintpot.kernels.grid import dequantize_definition
from pintpot.kernels.lookup import (
    dequantize_planes_definition,
    lookup_tables,
    lut_matmul_definition,
    planes_shape,
    quads_of,
    unpack_planes,
)
from pintpot.kernels.packing import pack_definition

BITS = range(1, 5)
SHAPES = ((1, 1, 1), (9, 200, 64), (70, 333, 128), (33, 1500, 1500), (64, 96, 6), (40, 130, 10), (32, 256, 32))


def make(rows, columns, bits, group_size, *, symmetric=False, scale_dtype=torch.float16, seed=0):
    """Codes, and the tensors of their planes."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).to(scale_dtype)
    zero = None if symmetric else pack_definition(zeros, bits)
    return codes, (pack_planes(codes, bits, group_size), scale, zero)


def inputs(count, columns, dtype=torch.float32, seed=1):
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense64(codes, scale, zero, bits, group_size):
    packed = pack_definition(codes, bits)
    columns = codes.shape[1]
    return dequantize_definition(packed, scale.float(), zero, bits, group_size, columns, torch.float32).double()


@pytest.mark.parametrize("bits", BITS)
def test_a_bit_of_each_code_is_where_the_layout_says(bits):
    for rows, columns, group_size in SHAPES:
        codes, (planes, *_) = make(rows, columns, bits, group_size)
        assert planes.shape == planes_shape(rows, columns, bits, group_size)
        assert planes.numel() == -(-rows // 32) * 16 * bits * quads_of(columns, group_size)
        assert torch.equal(unpack_planes(planes, group_size, rows, columns), codes)
        row, column = rows - 1, columns - 1
        quad = column // group_size * -(-group_size // 4) + column % group_size // 4
        for plane in range(bits):
            byte = int(planes[row // 32, plane, quad, row % 16])
            bit = byte >> (4 * (row % 32 // 16) + column % group_size % 4) & 1
            assert bit == int(codes[row, column]) >> plane & 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantisation_is_bit_for_bit_that_of_the_grid(isa, threads, bits, dtype):
    for rows, columns, group_size in SHAPES:
        for scale_dtype in (torch.float16, torch.bfloat16, torch.float32):
            codes, stored = make(rows, columns, bits, group_size, symmetric=rows % 2 == 0, scale_dtype=scale_dtype)
            found = torch.ops.pintpot.planes_dequantize(*stored, bits, group_size, columns, dtype)
            packed = pack_definition(codes, bits)
            assert torch.equal(found, dequantize_definition(packed, *stored[1:], bits, group_size, columns, dtype))
            assert torch.equal(found, dequantize_planes_definition(*stored, bits, group_size, columns, dtype))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_those_of_the_definition(isa, threads, bits, dtype):
    """The tables are the same to the bit; what is left is the order of sums over segments, in float32."""
    for rows, columns, group_size in SHAPES:
        _, stored = make(rows, columns, bits, group_size, symmetric=rows % 2 == 0)
        x = inputs(1 + rows % 3, columns, dtype)
        found = torch.ops.pintpot.lut_matmul(x, *stored, bits, group_size)
        expected = lut_matmul_definition(x, *stored, bits, group_size)
        assert found.dtype is dtype
        # Sums of `columns` terms, of which none is larger than an input times the largest weight.
        reach = x.double().abs().sum(1, keepdim=True) * (1 << bits) * 1.1
        assert (
            (found.double() - expected.double()).abs()
            <= 2.0**-20 * reach + torch.finfo(dtype).eps * 8 * expected.double().abs()
        ).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_tables_of_eight_bits_cost_less_than_a_hundredth(bits, symmetric):
    """Against float64. With tables of numbers that 8 bits hold there is no error at all."""
    codes, stored = make(256, 1024, bits, 128, symmetric=symmetric)
    dense = dense64(codes, *stored[1:], bits, 128)
    for dtype in (torch.float32, torch.bfloat16):
        x = inputs(4, 1024, dtype)
        exact = x.double() @ dense.T
        error = lut_matmul(x, *stored, bits=bits, group_size=128).double() - exact
        assert 1e-4 * exact.norm() < error.norm() < 1e-2 * exact.norm()
    whole = torch.randint(-31, 32, (2, 1024), generator=torch.Generator().manual_seed(2)).float()
    # Each segment's largest sum is 127: a step is 1.
    whole.unflatten(1, (-1, 64))[..., :4] = torch.tensor([32.0, 32.0, 32.0, 31.0])
    found = lut_matmul(whole, *stored, bits=bits, group_size=128)
    torch.testing.assert_close(found.double(), whole.double() @ dense.T, rtol=1e-5, atol=1e-2)


def test_a_table_holds_every_signed_sum_of_four_inputs():
    x = inputs(1, 8)
    tables, steps, sums = lookup_tables(x, 8)
    for quad in range(2):
        for entry in range(16):
            total = sum((1 if entry >> i & 1 else -1) * float(x[0, 4 * quad + i]) for i in range(4))
            assert abs(float(tables[0, quad, entry] * steps[0, 0]) - total) <= 0.5001 * float(steps[0, 0])
    assert torch.equal(tables, -tables.flip(-1))
    assert tables.abs().max() == 127
    torch.testing.assert_close(sums, x.sum(1, keepdim=True))


def test_a_product_depends_on_nothing_but_its_row_and_input(isa):
    _, stored = make(100, 700, 3, 64)
    x = inputs(3, 700)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.ops.pintpot.lut_matmul(x, *stored, 3, 64))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)
    alone = torch.cat([torch.ops.pintpot.lut_matmul(row[None], *stored, 3, 64) for row in x])
    assert torch.equal(alone, results[0])
    part = [t.contiguous() for t in (stored[0][1:2], stored[1][32:64], stored[2][32:64])]
    assert torch.equal(torch.ops.pintpot.lut_matmul(x, *part, 3, 64), results[0][:, 32:64])


def test_odd_inputs_are_not_hidden(isa):
    codes, stored = make(40, 128, 4, 64)
    for odd in (torch.nan, torch.inf, -torch.inf, 3e38):
        x = torch.ones(2, 128)
        x[0, 5:8] = odd
        found = torch.ops.pintpot.lut_matmul(x, *stored, 4, 64)
        assert found[0].isnan().all()
        assert torch.equal(found[1], torch.ops.pintpot.lut_matmul(torch.ones(1, 128), *stored, 4, 64)[0])
        assert torch.equal(found.isnan(), lut_matmul_definition(x, *stored, 4, 64).isnan())
    assert not torch.ops.pintpot.lut_matmul(torch.zeros(1, 128), *stored, 4, 64).any()
    small = torch.full((1, 128), 1e-35)
    assert torch.ops.pintpot.lut_matmul(small, *stored, 4, 64).abs().max() < 1e-30
    large = inputs(1, 128) * 1e35
    exact = large.double() @ dense64(codes, *stored[1:], 4, 64).T
    assert (torch.ops.pintpot.lut_matmul(large, *stored, 4, 64).double() - exact).norm() < 0.01 * exact.norm()


def test_each_segment_has_its_own_step(isa):
    """What is small beside the inputs of another segment keeps its bits."""
    codes, stored = make(8, 128, 2, 128, symmetric=True)
    x = inputs(1, 128)
    x[:, 64:] *= 1e-6
    other = x.clone()
    other[:, :64] = 0
    dense = dense64(codes, *stored[1:], 2, 128)
    exact = other.double() @ dense.T
    found = torch.ops.pintpot.lut_matmul(other, *stored, 2, 128)
    assert (found.double() - exact).norm() < 0.02 * exact.norm()
    assert torch.equal(lookup_tables(x, 128)[0][:, 16:], lookup_tables(other, 128)[0][:, 16:])


def test_unaligned_starts_are_read_as_others(isa):
    _, stored = make(32, 130, 3, 10)
    x = inputs(1, 130)
    expected = torch.ops.pintpot.lut_matmul(x, *stored, 3, 10)
    moved = [torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape) for t in (x, *stored)]
    assert torch.equal(torch.ops.pintpot.lut_matmul(*moved, 3, 10), expected)


def test_the_public_functions_take_the_definition_elsewhere(compiled):
    _, stored = make(24, 128, 4, 64)
    x = inputs(3, 128)
    strided = [t.mT.contiguous().mT for t in stored]
    assert not native.serves(*strided)
    expected = lut_matmul(x, *stored, bits=4, group_size=64)
    torch.testing.assert_close(lut_matmul(x, *strided, bits=4, group_size=64), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(lut_matmul(x[None], *stored, bits=4, group_size=64)[0], expected)
    layout = {"bits": 4, "group_size": 64, "in_features": 128}
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(
            dequantize_planes(*stored, dtype=dtype, **layout), dequantize_planes(*strided, dtype=dtype, **layout)
        )


def test_shapes_without_values(compiled):
    _, stored = make(40, 128, 4, 64)
    arguments = (inputs(2, 128), *stored, 4, 64)
    torch.library.opcheck(torch.ops.pintpot.lut_matmul, arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = (*stored, 4, 64, 128, torch.bfloat16)
    torch.library.opcheck(torch.ops.pintpot.planes_dequantize, arguments, test_utils=("test_schema", "test_faketensor"))


def test_wrong_sizes_never_reach_the_library(compiled):
    _, (planes, scale, zero) = make(40, 128, 4, 64)
    x = inputs(1, 128)
    for wrong in ((planes[:1], scale, zero), (planes, scale[:, :1], zero), (planes, scale, zero[:5])):
        with pytest.raises(ShapeError, match="no bit planes"):
            torch.ops.pintpot.lut_matmul(x, *(t.contiguous() for t in wrong), 4, 64)
    with pytest.raises(ShapeError, match="no bit planes"):
        torch.ops.pintpot.planes_dequantize(planes, scale, zero, 4, 0, 128, torch.float32)
    with pytest.raises(ShapeError, match="5 bits"):
        torch.ops.pintpot.lut_matmul(x, planes, scale, zero, 5, 64)
    with pytest.raises(ShapeError, match="5 bits"):
        pack_planes(torch.zeros(4, 4, dtype=torch.uint8), 5, 4)
    with pytest.raises(ShapeError, match="float64"):
        torch.ops.pintpot.lut_matmul(x.double(), planes, scale, zero, 4, 64)
    assert zero.shape[1] == packed_size(2, 4)


def test_vmap_is_refused(compiled):
    _, stored = make(40, 128, 4, 64)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: torch.ops.pintpot.lut_matmul(row, *stored, 4, 64))(inputs(2, 128))


def test_look_ups_are_counted(compiled):
    _, stored = make(64, 128, 3, 64)
    with FlopCounterMode(display=False) as counter:
        lut_matmul(inputs(2, 128), *stored, bits=3, group_size=64)
    assert counter.get_total_flops() == 2 * 2 * 3 * 32 * 64
