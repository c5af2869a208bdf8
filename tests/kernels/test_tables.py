"""Compiled products and numbers of codebooks, signs and ternary numbers: near to float64, and those of the formats."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pintpot.core.errors import CompositionError, ShapeError
from pintpot.kernels import native, pack
from pintpot.kernels.grid import FEW_ROWS
from pintpot.kernels.tables import (
    Book,
    codebook_decode,
    codebook_decode_definition,
    codebook_matmul,
    sign_rank_decode_definition,
    ternary_decode_definition,
)
from pintpot.weights.formats import Codebook, Format, SignRank, Ternary, Transposed
from pintpot.weights.formats import _base as strips
from tests.kernels.test_grid import LiveBytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error of a sum in float32 (some hundreds of products), or of rounding it."""
CODEBOOKS = (
    *((1, bits, 0) for bits in (1, 2, 3, 4, 5, 8, 9)),
    *((2, 8, 0), (3, 6, 4), (4, 8, 0), (5, 12, 3), (6, 12, 12), (8, 8, 8), (8, 16, 0), (16, 7, 0), (1100, 3, 2)),
)
"""Vector length, bits of an index, bits of the residual's."""


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def book(rows, columns, vector, bits, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 1 << bits, (rows, -(-columns // vector)), generator=generator)
    entries = torch.randn(1 << bits, vector, generator=generator).to(dtype)
    high = pack((index >> 8).to(torch.uint8), bits - 8) if bits > 8 else None
    return Book(pack((index & 255).to(torch.uint8), min(bits, 8)), high, entries)


def books_of(rows, columns, vector, bits, residual, dtype=torch.float16):
    stages = [bits, residual] if residual else [bits]
    return [book(rows, columns, vector, b, dtype, seed) for seed, b in enumerate(stages)]


def flat(books):
    return [tensor for one in books for tensor in one]


def signs_of(rows, columns, rank, dtype=torch.float16):
    signs = pack((noise(rows, columns, seed=1) > 0).to(torch.uint8), 1)
    return signs, noise(rows, rank, seed=2).to(dtype), noise(rank, columns, seed=3).to(dtype)


def ternary_of(rows, columns, per_byte, group, dtype=torch.float16):
    layout = Ternary(per_byte=per_byte, group_size=group)
    values = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(4))
    stored = layout.store(values, noise(rows, -(-columns // group), seed=5))
    return stored["packed"], stored["scale"].to(dtype)


def near(found, x, dense, dtype):
    """As near as sums in float32 are to ``x @ dense``, in float64."""
    sizes = x.double().abs() @ dense.double().abs() + 1e-30
    assert found.dtype is dtype
    assert ((found.double() - x.double() @ dense.double()).abs() / sizes).max() < ROUNDED[dtype]


def each_case(columns=(1, 7, 64, 203, 1310)):
    """Operations on weights of many shapes: the operation, its stored arguments, and the dense weight."""
    for width in columns:
        for rank in (1, 3):
            stored = signs_of(5, width, rank)
            yield "sign_rank", stored, sign_rank_decode_definition(*stored, torch.float32)
        for per_byte, group in ((5, width), (4, width), (5, 48), (4, 33), (5, 1)):
            stored = *ternary_of(5, width, per_byte, group), per_byte, group
            yield "ternary", stored, ternary_decode_definition(*stored, width, torch.float32)


@pytest.mark.parametrize(("vector", "bits", "residual"), CODEBOOKS)
def test_codebook_products_are_those_of_float64(isa, vector, bits, residual):
    for columns in (1, vector, 203, 1310):
        stored = books_of(6, columns, vector, bits, residual)
        dense = codebook_decode_definition(stored, columns, torch.float64)
        for dtype, count in ((torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 8)):
            x, other = (noise(count, size, seed=9).to(dtype) for size in (columns, 6))
            near(torch.ops.pintpot.codebook_matmul(x, flat(stored)), x, dense.t(), dtype)
            near(torch.ops.pintpot.codebook_matmul_transposed(other, flat(stored), columns), other, dense, dtype)


@pytest.mark.parametrize(("vector", "bits", "residual"), CODEBOOKS)
def test_decoded_codebooks_are_bit_for_bit_the_definition(isa, vector, bits, residual):
    for entries in DTYPES:
        for columns in (1, 203, 1310):
            stored = books_of(3, columns, vector, bits, residual, entries)
            for dtype in DTYPES:
                found = torch.ops.pintpot.codebook_decode(flat(stored), columns, dtype)
                assert torch.equal(found, codebook_decode_definition(stored, columns, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_of_signs_and_ternary_numbers_are_those_of_float64(isa, dtype):
    for name, stored, dense in each_case():
        for count in (1, 2, 5, 8):
            x = noise(count, dense.shape[1], seed=9).to(dtype)
            near(getattr(torch.ops.pintpot, f"{name}_matmul")(x, *stored), x, dense.t(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", DTYPES)
def test_decoded_signs_and_ternary_numbers_are_the_definition(isa, dtype, scales):
    for columns in (1, 7, 203, 1310):
        for rank in (1, 3):
            stored = signs_of(3, columns, rank, scales)
            found = torch.ops.pintpot.sign_rank_decode(*stored, dtype)
            expected = sign_rank_decode_definition(*stored, dtype)
            # Of one product there is one rounding; sums of several may be rounded in another order.
            torch.testing.assert_close(found, expected, rtol=0 if rank == 1 else ROUNDED[dtype], atol=1e-6 * (rank > 1))
        for per_byte, group in ((5, columns), (4, columns), (5, 48), (4, 33)):
            stored = *ternary_of(3, columns, per_byte, group, scales), per_byte, group, columns, dtype
            assert torch.equal(torch.ops.pintpot.ternary_decode(*stored), ternary_decode_definition(*stored))


def test_results_do_not_depend_on_threads_rows_or_the_number_of_inputs(compiled):
    before = torch.get_num_threads()
    x, other = noise(5, 520), noise(5, 301)
    stored = books_of(301, 520, 6, 9, 4)
    signs, ternary = signs_of(301, 520, 2), (*ternary_of(301, 520, 5, 48), 5, 48)

    def products(x, other):
        return (
            torch.ops.pintpot.codebook_matmul(x, flat(stored)),
            torch.ops.pintpot.sign_rank_matmul(x, *signs),
            torch.ops.pintpot.ternary_matmul(x, *ternary),
            torch.ops.pintpot.codebook_matmul_transposed(other, flat(stored), 520),
            torch.ops.pintpot.codebook_decode(flat(stored), 520, torch.bfloat16),
        )

    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        runs.append(products(x, other))
    torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))
    alone = [products(x[i : i + 1], other[i : i + 1]) for i in range(5)]
    for k in range(4):
        assert torch.equal(torch.cat([each[k] for each in alone]), runs[0][k])
    part = [t if i % 3 == 2 else None if t is None else t[7:30] for i, t in enumerate(flat(stored))]
    assert torch.equal(torch.ops.pintpot.codebook_matmul(x, part), runs[0][0][:, 7:30])


def test_what_is_not_a_number_stays_where_it_is(isa):
    """An infinity in one column, row or entry reaches what is multiplied with it, and nothing else."""
    for name, stored, dense in each_case(columns=(203,)):
        for odd in (torch.inf, -torch.inf, torch.nan, 1e36):
            x = torch.ones(2, 203)
            x[1, 11] = odd
            found = getattr(torch.ops.pintpot, f"{name}_matmul")(x, *stored)
            torch.testing.assert_close(found, x @ dense.t(), rtol=1e-4, atol=1e-4, equal_nan=True)
        x = torch.full((2, 203), 1e-36)
        found = getattr(torch.ops.pintpot, f"{name}_matmul")(x, *stored)
        torch.testing.assert_close(found, x @ dense.t(), rtol=1e-3, atol=1e-40)
        assert not getattr(torch.ops.pintpot, f"{name}_matmul")(torch.zeros(1, 203), *stored).any()
    stored = books_of(6, 203, 6, 5, 0)
    stored[0].entries[3] = torch.inf
    dense = codebook_decode_definition(stored, 203, torch.float32)
    found = torch.ops.pintpot.codebook_decode(flat(stored), 203, torch.float32)
    assert torch.equal(found, dense)
    x = noise(1, 6)
    torch.testing.assert_close(
        torch.ops.pintpot.codebook_matmul_transposed(x, flat(stored), 203), x @ dense, rtol=1e-4, atol=1e-4
    )


LAYOUTS: tuple[Format, ...] = (
    Codebook(vector_length=3, index_bits=5, residual_bits=3),
    Transposed(inner=Codebook(vector_length=4, index_bits=6), out_features_held=24),
    SignRank(rank=2),
    Ternary(group_size=24),
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
class TestFormat:
    def test_few_and_many_rows_strided_ones_and_gradients(self, layout, compiled):
        stored = layout.encode(noise(24, 64))
        dense = layout.decode(stored, 64, torch.float32)
        for rows in (0, 1, FEW_ROWS, FEW_ROWS + 1):
            x = noise(rows, 2 * 64, seed=6)[:, ::2]
            torch.testing.assert_close(layout.matmul(x, stored), x @ dense.t(), rtol=1e-4, atol=1e-4)
            x = noise(rows, 64, seed=7).requires_grad_()
            out = layout.matmul(x, stored)
            torch.testing.assert_close(out, x @ dense.t(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], dense.sum(0).expand_as(x))

    def test_few_rows_make_no_temporaries_and_the_rehearsal_knows(self, layout, compiled):
        assert layout.multiplies_packed()
        stored = layout.encode(noise(24, 64))
        x = noise(2, 64)
        with LiveBytes(x, *stored.values()) as tracked:
            layout.matmul(x, stored)
        assert tracked.peak == 2 * 24 * 4
        with FakeTensorMode() as mode:
            x, stored = mode.from_tensor(x), {name: mode.from_tensor(t) for name, t in stored.items()}
            with LiveBytes(x, *stored.values()) as tracked:
                layout.matmul(x, stored)
        assert tracked.peak == 2 * 24 * 4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strips_take_the_workspace_that_was_predicted(self, layout, dtype, compiled, monkeypatch):
        monkeypatch.setattr(strips, "STRIP_BYTES", 2000)
        stored = layout.encode(noise(24, 64))
        x = noise(40, 64).to(dtype)
        with LiveBytes(x, *stored.values()) as tracked:
            layout.matmul(x, stored)
        assert tracked.peak == 40 * 24 * dtype.itemsize + layout.workspace(24, 64, dtype)

    def test_without_the_library_it_is_the_same(self, layout, compiled, monkeypatch):
        stored = layout.encode(noise(24, 64))
        x = noise(2, 64)
        found = layout.matmul(x, stored)
        monkeypatch.setattr(native, "library", lambda: None)
        torch.testing.assert_close(layout.matmul(x, stored), found, rtol=1e-4, atol=1e-4)


def test_gradients_reach_entries_by_way_of_the_definition():
    (stored,) = books_of(4, 24, 3, 4, 0, torch.float32)
    entries = stored.entries.requires_grad_()
    codebook_decode([stored], 24, torch.float32).sum().backward()
    assert entries.grad is not None
    x = noise(1, 24)
    torch.testing.assert_close(codebook_matmul(x, [stored]), x @ codebook_decode([stored], 24, torch.float32).t())


def test_wrong_sizes_never_reach_the_library(compiled):
    ops, x = torch.ops.pintpot, torch.ones(1, 64)
    index, high, entries = books_of(4, 64, 4, 9, 0)[0]
    for wrong in (
        (index[:, 1:], high, entries),
        (index, None, entries),
        (index, high[:2], entries),
        (index, high, entries[:100]),
        (index, high, entries.double()),
        (index, high, entries, index[:2], high[:2], entries),
        (index, high, entries, index, high, entries.float()),
        (index, high, entries, None, None, entries),
        (index, high),
    ):
        with pytest.raises(ShapeError):
            ops.codebook_matmul(x, [t if t is None else t.contiguous() for t in wrong])
    with pytest.raises(ShapeError, match="features"):
        ops.codebook_matmul_transposed(torch.ones(1, 5), [index, high, entries], 64)
    with pytest.raises(ShapeError, match="features"):
        ops.codebook_matmul(x.double(), [index, high, entries])
    signs, left, right = signs_of(4, 64, 2)
    for wrong in ((signs[:, 1:], left, right), (signs, left[:, :1], right), (signs, left.float(), right)):
        with pytest.raises(ShapeError, match="no factors"):
            ops.sign_rank_matmul(x, *(t.contiguous() for t in wrong))
    packed, scale = ternary_of(4, 64, 5, 32)
    for wrong in ((packed, scale, 4, 32), (packed, scale, 5, 0), (packed, scale[:, :1].contiguous(), 5, 32)):
        with pytest.raises(ShapeError, match="no ternary"):
            ops.ternary_matmul(x, *wrong)
    with pytest.raises(ShapeError, match="no ternary"):
        ops.ternary_decode(packed, scale, 3, 32, 64, torch.float32)


def test_torch_finds_no_fault_and_counts_the_products(compiled):
    ops, x = torch.ops.pintpot, torch.ones(2, 64)
    stored = flat(books_of(12, 64, 4, 9, 3))
    signs, ternary = signs_of(12, 64, 2), (*ternary_of(12, 64, 5, 32), 5, 32)
    calls = (
        (ops.codebook_matmul, (x, stored), 64),
        (ops.codebook_matmul_transposed, (torch.ones(2, 12), stored, 64), 64),
        (ops.sign_rank_matmul, (x, *signs), 64),
        (ops.ternary_matmul, (x, *ternary), 64),
        (ops.codebook_decode, (stored, 64, torch.bfloat16), 0),
        (ops.sign_rank_decode, (*signs, torch.float32), 0),
        (ops.ternary_decode, (*ternary, 64, torch.float16), 0),
    )
    for operation, arguments, features in calls:
        torch.library.opcheck(operation.default, arguments, test_utils=("test_schema", "test_faketensor"))
        with FlopCounterMode(display=False) as counter:
            operation(*arguments)
        assert counter.get_total_flops() == 2 * 2 * 12 * features


def test_vmap_is_refused(compiled):
    signs, left, right = signs_of(3, 8, 1)
    with pytest.raises(CompositionError, match="vmap"):
        torch.vmap(lambda row: torch.ops.pintpot.sign_rank_decode(row[None], left[:1], right, torch.float32))(signs)
