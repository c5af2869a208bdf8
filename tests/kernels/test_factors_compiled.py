"""Compiled products of factors and sparse weights: near to float64, equal to their definitions, and safe."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import low_rank, low_rank_matmul, native, pack, sparse_decode
from pintpot.kernels.few_rows import serves_few
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.low_rank import low_rank_matmul_definition, low_rank_workspace
from pintpot.kernels.packing import pack_definition
from pintpot.kernels.sparse import GridNumbers, sparse_decode_definition, sparse_matmul
from pintpot.kernels.tiled import tiled_matmul, tiled_matmul_definition
from pintpot.weights.formats import Dense, Grid, LowRank, Sparse, Tiled
from tests.kernels.test_grid import LiveBytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, x, dense, dtype):
    """A product in float32, rounded once to ``dtype``, beside float64."""
    expected = x.double() @ dense.double().T
    reach = x.double().abs() @ dense.double().abs().T
    limit = 2.0**-20 * reach + torch.finfo(dtype).eps * expected.abs() + 1e-6
    assert found.dtype == dtype
    assert ((found.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_low_rank_products_are_those_of_float64(isa, dtype, stored):
    for rows, rank, columns, count in (
        (1, 1, 1, 1),
        (70, 3, 33, 2),
        (40, 37, 100, 5),
        (64, 16, 128, 8),
        (6, 1100, 2070, 3),
    ):
        left, right = randn(rows, rank).to(stored), randn(rank, columns, seed=1).to(stored)
        x = randn(count, columns, seed=2).to(dtype)
        found = torch.ops.pintpot.low_rank_matmul(x, left, right)
        reach = x.double().abs() @ right.double().abs().T @ left.double().abs().T
        expected = x.double() @ right.double().T @ left.double().T
        limit = 2.0**-19 * reach + torch.finfo(dtype).eps * expected.abs() + 1e-6
        assert ((found.double() - expected).abs() <= limit).all()


BLOCKS = [(1, 1), (1, 2), (1, 16), (1, 33), (4, 4), (16, 16), (3, 20), (32, 32), (5, 1)]


def mask_of(rows, columns, share, seed=0):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    mask[rows // 2] = False
    return mask


def make_sparse(rows, columns, block, stored, share=0.5):
    """Bitmap, numbers and the dense float64 weight of ``rows`` x ``columns`` blocks."""
    mask = mask_of(rows, columns, share)
    blocks = randn(rows, columns, block[0] * block[1], seed=3).to(stored) * mask[..., None]
    parts = blocks.reshape(rows, columns, *block).transpose(1, 2)
    dense = parts.reshape(rows * block[0], columns * block[1])
    return pack_definition(mask.to(torch.uint8), 1), blocks[mask].contiguous(), dense


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stored", FLOATS)
def test_sparse_products_are_those_of_float64(isa, block, stored):
    dtype = {torch.float32: torch.float32, torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[stored]
    long = 2070 // block[1]
    for rows, columns, count, share in (
        (2, long, 2, 0.6),
        (1, 1, 1, 1.0),
        (5, 9, 1, 0.2),
        (7, 131, 3, 0.5),
        (3, 210, 8, 0.5),
    ):
        bitmap, values, dense = make_sparse(rows, columns, block, stored, share)
        x = randn(count, dense.shape[1], seed=4).to(dtype)
        found = torch.ops.pintpot.sparse_matmul(x, bitmap, values, None, None, list(block), [])
        close(found, x, dense, dtype)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_decoded_numbers_are_bit_for_bit_the_definition(isa, threads, block, dtype):
    sides = {"block_rows": block[0], "block_columns": block[1]}
    for stored in FLOATS:
        for rows, columns, share in ((1, 1, 1.0), (5, 9, 0.2), (7, 131, 0.5), (2000 // (block[0] * block[1]), 70, 0.8)):
            bitmap, values, dense = make_sparse(rows, columns, block, stored, share)
            sizes = {**sides, "in_features": dense.shape[1], "dtype": dtype}
            found = sparse_decode(bitmap, values, **sizes)
            assert torch.equal(found, sparse_decode_definition(bitmap, values, **sizes))
            assert torch.equal(found, dense.to(dtype))


LAYOUTS = [
    Sparse(kept_fraction=0.5, values=Dense(dtype=torch.float32)),
    Sparse(kept_fraction=0.2, balanced=False, values=Dense(dtype=torch.bfloat16)),
    Sparse(kept_fraction=0.4, values=Grid(bits=3, group_size=16, symmetric=True)),
    Sparse(kept_fraction=0.5, balanced=False, values=Grid(bits=4, group_size=64)),
    Sparse(kept_fraction=0.3, block_columns=16, balanced=False, values=Grid(bits=4, group_size=16)),
    Sparse(kept_fraction=0.6, block_columns=5),
    Sparse(kept_fraction=0.5, block_rows=8, block_columns=16, balanced=False),
    Sparse(kept_fraction=0.5, block_rows=16, block_columns=16, values=Grid(bits=8, group_size=-1)),
    Tiled(out_features_held=96, kept_fraction=0.2, tile_rows=16, tile_columns=32),
    Tiled(out_features_held=96, kept_fraction=0.3, tile_rows=36, tile_columns=23, dtype=torch.bfloat16),
    LowRank(rank=7),
    LowRank(rank=7, factor=Dense(dtype=torch.bfloat16)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_formats_multiply_as_they_decode(isa, threads, layout):
    stored = layout.encode(randn(96, 240, seed=5))
    dense = layout.decode(stored, 240, torch.float64 if isinstance(layout, LowRank) else torch.float32)
    for count in (1, 4, 7, FEW_ROWS):
        x = randn(count, 240, seed=6)
        found = layout.matmul(x, stored)
        torch.testing.assert_close(found.double(), x.double() @ dense.double().T, rtol=1e-4, atol=1e-4)
    # A gradient to the input takes another way to the same.
    x.requires_grad_()
    torch.testing.assert_close(layout.matmul(x, stored), found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_product_depends_on_nothing_but_its_row_and_input(isa, layout):
    """Neither on the number of threads, nor on what is multiplied beside it."""
    stored = layout.encode(randn(96, 240, seed=5))
    x = randn(FEW_ROWS, 240, seed=6)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(layout.matmul(x, stored))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)
    assert torch.equal(torch.cat([layout.matmul(row[None], stored) for row in x]), results[0])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_not_finite_spreads_as_in_the_dense_product(isa, layout):
    stored = layout.encode(randn(96, 240, seed=5))
    x = randn(3, 240, seed=6)
    x[0, 17], x[2, 200] = torch.inf, torch.nan
    x[2, 3] = -torch.inf
    found = layout.matmul(x, stored)
    if isinstance(layout, LowRank):
        left, right = layout.factors(stored, 240, torch.float32)
        expected = x @ right.T @ left.T
    else:
        expected = x @ layout.decode(stored, 240, torch.float32).T
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_few_rows_need_no_workspace_and_many_what_is_forecast(compiled, layout):
    stored = layout.encode(randn(96, 240, seed=5))
    for count in (FEW_ROWS, FEW_ROWS + 1):
        x = randn(count, 240)
        with LiveBytes(x, *stored.values()) as tracked:
            out = layout.matmul(x, stored)
        temporaries = tracked.peak - out.nbytes
        if count <= FEW_ROWS:
            assert temporaries == 0
        else:
            assert temporaries <= layout.workspace(96, 240, torch.float32)
            # Inner numbers of so few rows are no whole tile.
            assert isinstance(layout, LowRank) or temporaries > 0.6 * layout.workspace(96, 240, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shapes_alone_take_the_same_way(compiled, layout):
    stored = layout.encode(randn(96, 240, seed=5))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in stored.items()}
        x = torch.empty(2, 3, 240, dtype=torch.bfloat16)
        with LiveBytes(x, *fake.values()) as tracked:
            out = layout.matmul(x, fake)
        assert out.shape == (2, 3, 96)
        assert out.dtype == torch.bfloat16
        assert tracked.peak == out.nbytes


def test_tiles_give_the_product_of_their_definition(isa, threads):
    for rows, columns, layout in (
        (300, 100, Tiled(out_features_held=300, kept_fraction=0.2)),
        (33, 1, Tiled(out_features_held=33, kept_fraction=0.5, tile_rows=7, tile_columns=3)),
        (20, 400, Tiled(out_features_held=20, kept_fraction=1.0, tile_rows=1, tile_columns=1000)),
        (40, 40, Tiled(out_features_held=40, kept_fraction=0.01, tile_rows=181, tile_columns=181)),
    ):
        stored = layout.encode(randn(rows, columns, seed=7))
        held = stored["values"], stored["places"], stored["starts"]
        sizes = {"tile_rows": layout.tile_rows, "tile_columns": layout.tile_columns}
        for count, dtype in ((1, torch.float32), (3, torch.bfloat16), (11, torch.float16)):
            x = randn(count, columns, seed=8).to(dtype)
            found = torch.ops.pintpot.tiled_matmul(x, *held, rows, *sizes.values())
            close(found, x, layout.decode(stored, columns, torch.float64), dtype)
            expected = tiled_matmul_definition(x.float(), *held, rows, *sizes.values())
            torch.testing.assert_close(found, expected.to(dtype), rtol=2e-2, atol=2e-2)


def test_low_rank_tiles_hold_little_of_the_inner_numbers(monkeypatch):
    monkeypatch.setattr(low_rank, "INNER_BYTES", 10 * 6 * 4)
    left, right, x = randn(50, 6), randn(6, 80, seed=1), randn(37, 80, seed=2)
    for stored in (torch.float32, torch.bfloat16):
        factors = left.to(stored), right.to(stored)
        with LiveBytes(x, *factors) as tracked:
            found = low_rank_matmul(x, *factors)
        assert tracked.peak == found.nbytes + low_rank_workspace(50, 80, 6, stored, torch.float32)
        expected = x.double() @ factors[1].double().T @ factors[0].double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    low_rank_matmul(x, left, right).sum().backward()
    torch.testing.assert_close(x.grad, (left @ right).sum(0).expand(37, -1), rtol=1e-4, atol=1e-4)


def test_numbers_left_over_are_not_read_and_missing_ones_are_noticed(isa):
    bitmap, values, dense = make_sparse(6, 100, (1, 1), torch.float32)
    sides = {"block_rows": 1, "block_columns": 1}
    more = torch.cat([values.flatten(), torch.full((3,), torch.nan)])
    assert torch.equal(sparse_decode(bitmap, more, **sides, in_features=100, dtype=torch.float32), dense)
    fewer = values.flatten()[:-1]
    with pytest.raises(ShapeError, match="contradict"):
        sparse_decode(bitmap, fewer, **sides, in_features=100, dtype=torch.float32)
    with pytest.raises(ShapeError, match="contradict"):
        sparse_matmul(torch.ones(1, 100), bitmap, fewer, **sides)


def test_damaged_tiles_are_noticed(isa):
    layout = Tiled(out_features_held=40, kept_fraction=0.3, tile_rows=16, tile_columns=32)
    stored = layout.encode(randn(40, 70))
    for name, place, wrong in (("places", 5, -1), ("places", 5, 512), ("starts", 2, -4), ("starts", -1, 1 << 20)):
        damaged = {key: tensor.clone() for key, tensor in stored.items()}
        damaged[name][place] = wrong
        with pytest.raises(ShapeError, match="contradict"):
            layout.matmul(torch.ones(1, 70), damaged)
        odd = torch.full((1, 70), torch.inf)
        with pytest.raises(ShapeError, match="contradict"):
            layout.matmul(odd, damaged)


def test_wrong_sizes_never_reach_the_library(compiled):
    ops = torch.ops.pintpot
    x, left, right = torch.ones(1, 64), torch.ones(8, 4), torch.ones(4, 64)
    for wrong in ((x, left, right[:, 1:]), (x, left[:, 1:], right), (x, left.half(), right), (x.double(), left, right)):
        with pytest.raises(ShapeError):
            ops.low_rank_matmul(*(t.contiguous() for t in wrong))
    bitmap, values = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(10)
    for arguments in (
        (x, bitmap[:, 1:].contiguous(), values, None, None, [1, 1], []),
        (x, bitmap.int(), values, None, None, [1, 1], []),
        (x, bitmap, values, None, None, [1, 3], []),
        (x, bitmap, values, None, None, [0, 1], []),
        (x, bitmap, values.double(), None, None, [1, 1], []),
        (x, bitmap, torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 2), None, [1, 1], [4, 16, 16]),
    ):
        with pytest.raises(ShapeError):
            ops.sparse_matmul(*arguments)
    with pytest.raises(ShapeError, match="decoded as"):
        ops.sparse_decode(bitmap, values, [1, 1], 64, torch.float64)
    places, starts = torch.zeros(10, dtype=torch.int16), torch.zeros(3, dtype=torch.int32)
    for arguments in (
        (x, values, places[1:].contiguous(), starts, 16, 16, 32),
        (x, values, places.int(), starts, 16, 16, 32),
        (x, values, places, starts, 17, 16, 32),
        (x, values, places, starts, 16, 0, 32),
    ):
        with pytest.raises(ShapeError, match="no tiles"):
            ops.tiled_matmul(*arguments)


def test_strided_and_many_rows_take_the_definition(compiled):
    left, right = randn(8, 4), randn(4, 64, seed=1)
    wide = randn(3, 128, seed=2)[:, ::2]
    assert not serves_few(wide, left, right)
    assert not serves_few(randn(FEW_ROWS + 1, 64), left, right)
    assert serves_few(randn(FEW_ROWS, 64), left, right)
    torch.testing.assert_close(low_rank_matmul(wide, left, right), low_rank_matmul_definition(wide, left, right))
    bitmap, values, dense = make_sparse(5, 64, (1, 1), torch.float32)
    product = sparse_matmul(wide, bitmap, values, block_rows=1, block_columns=1)
    torch.testing.assert_close(product, wide @ dense.T)


def test_grid_numbers_through_the_definition():
    layout = Sparse(kept_fraction=0.4, block_columns=8, balanced=False, values=Grid(bits=4, group_size=8))
    stored = layout.encode(randn(16, 64))
    inner = {name.removeprefix("values_"): tensor for name, tensor in stored.items()}
    numbers = GridNumbers(
        packed=inner["packed"], scale=inner["scale"], zero=inner["zero"], bits=4, group_size=8, width=256
    )
    x = randn(20, 64, seed=1)
    found = sparse_matmul(x, inner["bitmap"], numbers, block_rows=1, block_columns=8)
    torch.testing.assert_close(found, x @ layout.decode(stored, 64, torch.float32).T, rtol=1e-4, atol=1e-4)


def test_the_operations_are_registered_soundly(compiled):
    samples = {
        "low_rank_matmul": (torch.ones(2, 64), torch.ones(8, 4), torch.ones(4, 64)),
        "sparse_matmul": (torch.ones(2, 64), torch.ones(4, 8, dtype=torch.uint8), torch.ones(32), *[None] * 2, [1, 1]),
        "sparse_decode": (torch.ones(4, 8, dtype=torch.uint8), torch.ones(32), [1, 1], 64, torch.float16),
    }
    samples["sparse_matmul"] += ([],)
    layout = Tiled(out_features_held=40, tile_rows=16, tile_columns=32)
    samples["tiled_matmul"] = (torch.ones(2, 70), *layout.encode(randn(40, 70)).values(), 40, 16, 32)
    for name, arguments in samples.items():
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(torch.ops.pintpot, name).default, arguments, test_utils=checks)


def test_vmap_is_refused(compiled):
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: torch.ops.pintpot.low_rank_matmul(row, torch.ones(8, 4), torch.ones(4, 64)))(
            torch.ones(2, 3, 64)
        )


def test_products_are_counted(compiled):
    layouts = {Sparse(kept_fraction=0.5): 96 * 120, Tiled(out_features_held=96, kept_fraction=0.25): 96 * 60}
    layouts[Sparse(kept_fraction=0.5, values=Grid(group_size=40))] = 96 * 120
    layouts[LowRank(rank=4)] = 4 * (96 + 240)
    for layout, numbers in layouts.items():
        stored = layout.encode(randn(96, 240))
        with FlopCounterMode(display=False) as counter:
            layout.matmul(torch.ones(2, 240), stored)
        assert counter.get_total_flops() == 2 * 2 * numbers


def test_the_bits_of_padding_mean_nothing(isa):
    bitmap = pack(torch.ones(2, 9, dtype=torch.uint8), 1)
    assert bitmap.shape[1] == 2
    values = randn(18)
    sizes = {"block_rows": 1, "block_columns": 1, "in_features": 9, "dtype": torch.float32}
    assert torch.equal(sparse_decode(bitmap, values, **sizes), values.view(2, 9))
    assert native.path() == isa


def test_the_public_tiled_product_keeps_leading_dimensions(compiled):
    layout = Tiled(out_features_held=40, tile_rows=16, tile_columns=32)
    stored = layout.encode(randn(40, 70))
    sizes = {"out_features": 40, "tile_rows": 16, "tile_columns": 32}
    few, many = randn(2, 3, 70), randn(2, 9, 70)
    for x in (few, many):
        found = tiled_matmul(x, *stored.values(), **sizes)
        torch.testing.assert_close(found, x @ layout.decode(stored, 70, torch.float32).T, rtol=1e-4, atol=1e-4)
