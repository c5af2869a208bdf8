"""What every weight format must do, by itself and inside the formats that hold others."""

import json

import pytest
import torch

from pintpot.weights.formats import (
    FORMATS,
    BitPlanes,
    Codebook,
    Dense,
    Float8Input,
    Float8Scales,
    Format,
    Grid,
    GroupOffset,
    Leading,
    LevelGrid,
    LowRank,
    RegisterTiles,
    Rotated,
    RoundedInput,
    Routed,
    RowTiles,
    Scaled,
    SignedInput,
    SignRank,
    Signs,
    Sparse,
    Split,
    SplitInput,
    StaticInput,
    Ternary,
    Tiled,
    Transposed,
    format_from_dict,
)

ROWS, COLUMNS = 24, 64

EXAMPLES: tuple[Format, ...] = (
    Dense(dtype=torch.bfloat16),
    Grid(bits=3, group_size=32),
    Grid(bits=5, group_size=48, symmetric=True, scale_dtype="bfloat16"),
    BitPlanes(bits=4, group_size=32),
    BitPlanes(bits=3, group_size=24, symmetric=True, scale_dtype="bfloat16"),
    Scaled(inner=BitPlanes(bits=4, group_size=10)),
    RegisterTiles(bits=3, group_size=64),
    RowTiles(bits=3, group_size=32),
    RowTiles(bits=8, group_size=-1, symmetric=True, scale_dtype="bfloat16"),
    Scaled(inner=RowTiles(bits=6, group_size=64)),
    RegisterTiles(bits=5, group_size=48, symmetric=True, scale_dtype="bfloat16"),
    Scaled(inner=Grid(bits=4, group_size=32)),
    Scaled(inner=Dense()),
    Transposed(inner=Grid(bits=4, group_size=8), out_features_held=ROWS),
    GroupOffset(group_size=24),
    LevelGrid(levels="e2m1", group_size=24),
    LevelGrid(levels="pow4", group_size=-1, scale_dtype="bfloat16"),
    Codebook(vector_length=3, index_bits=5),
    Codebook(vector_length=2, index_bits=9, residual_bits=4, entry_dtype="bfloat16"),
    Transposed(inner=Codebook(vector_length=4, index_bits=6), out_features_held=ROWS),
    Leading(inner=Dense(), size=8, kept=3),
    Leading(inner=Grid(bits=4, group_size=8), size=16, kept=10, inputs=True),
    LowRank(rank=4),
    RoundedInput(inner=Grid(bits=4, group_size=32), bits=8),
    Float8Input(inner=Grid(bits=4, group_size=32)),
    Float8Scales(bits=4, group_size=24),
    Rotated(inner=Grid(bits=4, group_size=32), block=32),
    Rotated(inner=StaticInput(inner=Scaled(inner=Grid(bits=4, group_size=32))), block=64),
    StaticInput(inner=Grid(bits=4, group_size=32)),
    StaticInput(inner=Scaled(inner=Grid(bits=4, group_size=32)), bits=6, symmetric=False, per_channel=True),
    SignRank(),
    SignRank(rank=4, scale_dtype="bfloat16"),
    SignedInput(inner=SignRank(rank=2)),
    Signs(),
    Routed(tasks=("one", "other"), weights=(1.0, 0.0)),
    Routed(inner=SignRank(rank=4), tasks=("one", "other", "third"), weights=(0.5, 0.0, 0.5)),
    Ternary(),
    Ternary(group_size=24, per_byte=4),
    Sparse(kept_fraction=0.5),
    Sparse(kept_fraction=0.6, block_columns=8, values=Grid(bits=4, group_size=8)),
    Sparse(kept_fraction=0.4, block_rows=8, block_columns=4, balanced=False, values=Grid(bits=8, group_size=-1)),
    Sparse(kept_fraction=0.3, balanced=False, values=Dense(dtype=torch.bfloat16)),
    Tiled(out_features_held=ROWS, kept_fraction=0.3, tile_rows=16, tile_columns=24),
    LowRank(rank=8, factor=Grid(bits=8, group_size=8)),
    Split(parts=(Grid(bits=8, group_size=64), Grid(bits=4, group_size=32)), counts=(6, 18)),
    SplitInput(parts=(Codebook(vector_length=2), Grid(bits=4, group_size=32)), counts=(8, 56)),
    SplitInput(parts=(Transposed(inner=Codebook(vector_length=2), out_features_held=ROWS), Grid()), counts=(0, 64)),
    Split(parts=(Grid(bits=8, group_size=64), Grid(bits=4, group_size=32)), counts=(2, 22), first=(7, 3)),
    Scaled(inner=Split(parts=(Grid(bits=8, group_size=64), LowRank(rank=2)), counts=(4, 20))),
)


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_every_format_is_here():
    assert {example.kind for example in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize("layout", EXAMPLES, ids=str)
class TestFormat:
    def test_stores_what_it_says_and_no_more(self, layout):
        stored = layout.encode(weight())
        assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(ROWS, COLUMNS)
        assert sum(t.nbytes for t in stored.values()) == layout.nbytes(ROWS, COLUMNS)
        assert layout.out_features(stored) == ROWS

    def test_encoding_what_it_holds_changes_little(self, layout):
        held = layout.decode(layout.encode(weight()), COLUMNS, torch.float32)
        again = layout.decode(layout.encode(held), COLUMNS, torch.float32)
        assert held.shape == (ROWS, COLUMNS)
        assert (again - held).norm() < 0.15 * held.norm()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_multiplies_as_its_numbers_do(self, layout, dtype):
        stored = layout.encode(weight(dtype))
        dense = layout.decode(stored, COLUMNS, torch.float32).double()
        for shape in ((COLUMNS,), (3, COLUMNS), (2, 5, COLUMNS)):
            input = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            out = layout.matmul(input, stored)
            assert out.dtype is dtype
            rounds_input = isinstance(layout, RoundedInput | Float8Input) or "BitPlanes" in str(layout)
            limit = 1e-4 if dtype is torch.float32 and not rounds_input else 0.03
            assert (out.double() - input.double() @ dense.T).norm() < limit * (input.double().norm() * dense.norm())

    def test_decoding_changes_nothing_that_is_stored(self, layout):
        stored = layout.encode(weight())
        before = {name: tensor.clone() for name, tensor in stored.items()}
        for dtype in (torch.float16, torch.float32):
            layout.decode(stored, COLUMNS, dtype)
        assert all(torch.equal(tensor, before[name]) for name, tensor in stored.items())

    def test_gradients_reach_the_input(self, layout):
        stored = layout.encode(weight())
        dense = layout.decode(stored, COLUMNS, torch.float32)
        input = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(1), requires_grad=True)
        back = torch.randn(5, ROWS, generator=torch.Generator().manual_seed(2))
        (found,) = torch.autograd.grad(layout.matmul(input, stored), input, back)
        torch.testing.assert_close(found, back @ dense, rtol=1e-3, atol=1e-3)

    def test_is_written_down_and_read_again(self, layout):
        assert format_from_dict(json.loads(json.dumps(layout.to_dict()))) == layout

    def test_knows_its_sizes_without_numbers(self, layout):
        stored = {k: torch.empty(s, dtype=d, device="meta") for k, (s, d) in layout.storage(ROWS, COLUMNS).items()}
        assert layout.matmul(torch.empty(2, COLUMNS, device="meta"), stored).shape == (2, ROWS)
        assert layout.workspace(ROWS, COLUMNS, torch.float32) >= 0

    def test_zero_stays_zero(self, layout):
        held = layout.decode(layout.encode(torch.zeros(ROWS, COLUMNS)), COLUMNS, torch.float32)
        assert held.abs().max() < 1e-6
