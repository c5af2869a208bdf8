"""Formats that store part of a weight: what is kept, where it goes, and the bytes."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.weights.formats import Dense, Grid, Sparse, Tiled, _base
from pintpot.weights.formats.selection import largest


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


SHARED = Sparse(kept_fraction=0.3, balanced=False, values=Dense(dtype=torch.float32))


def test_keeps_the_largest_numbers_of_each_row():
    dense = weight(12, 40)
    layout = Sparse(kept_fraction=0.25, values=Dense(dtype=torch.float32))
    held = layout.decode(layout.encode(dense), 40, torch.float32)
    for row, kept in zip(dense, held, strict=True):
        largest = row.abs().argsort(descending=True)[:10]
        expected = torch.zeros(40)
        expected[largest] = row[largest]
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("layout", [SHARED, Tiled(out_features_held=50, kept_fraction=0.3, dtype=torch.float16)])
def test_keeps_the_largest_numbers_of_the_matrix(layout):
    dense = weight(50, 70).half().float()
    held = layout.decode(layout.encode(dense), 70, torch.float32)
    threshold = dense.abs().flatten().topk(1050).values[-1]
    kept = held != 0
    assert int(kept.sum()) == 1050
    assert torch.equal(held[kept], dense[kept])
    assert dense[kept].abs().min() >= threshold


def test_blocks_are_kept_or_cut_whole():
    dense = weight(16, 24)
    layout = Sparse(
        kept_fraction=0.25, block_rows=4, block_columns=8, balanced=False, values=Dense(dtype=torch.float32)
    )
    held = layout.decode(layout.encode(dense), 24, torch.float32)
    norms = torch.stack([torch.stack([part.norm() for part in row.split(8, 1)]) for row in dense.split(4, 0)])
    best = norms.flatten().topk(3).indices
    for index in range(12):
        at = slice(index // 3 * 4, index // 3 * 4 + 4), slice(index % 3 * 8, index % 3 * 8 + 8)
        assert torch.equal(held[at], dense[at] if index in best else torch.zeros(4, 8))


def test_groups_have_grids_of_their_own():
    dense = weight(6, 32) * torch.tensor([1.0, 100.0]).repeat_interleave(16)
    layout = Sparse(kept_fraction=1.0, block_columns=16, values=Grid(bits=8, group_size=16))
    held = layout.decode(layout.encode(dense), 32, torch.float32)
    # An error of half a step of a group's own range.
    for part, kept in ((dense[:, :16], held[:, :16]), (dense[:, 16:], held[:, 16:])):
        assert (part - kept).abs().max() <= 0.51 * (part.max() - part.min()) / 255 * 1.01


@pytest.mark.parametrize(
    "layout",
    [
        SHARED,
        Sparse(kept_fraction=0.4, values=Grid(bits=4, group_size=16)),
        Sparse(kept_fraction=0.4, block_rows=4, block_columns=4, balanced=False),
        Sparse(kept_fraction=0.3, block_columns=8, balanced=False, values=Grid(bits=4, group_size=8)),
        Tiled(out_features_held=64, kept_fraction=0.2, tile_rows=16, tile_columns=32),
    ],
    ids=str,
)
def test_strips_of_rows_give_the_same_product(layout, monkeypatch):
    stored = layout.encode(weight(64, 80))
    dense = layout.decode(stored, 80, torch.float64)
    input = weight(5, 80).requires_grad_()
    monkeypatch.setattr(_base, "STRIP_BYTES", 20 * layout.row_bytes(80, torch.float32))
    out = layout.matmul(input, stored)
    back = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    out.backward(back)
    torch.testing.assert_close(out.double(), input.double() @ dense.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(input.grad.double(), back.double() @ dense, rtol=1e-4, atol=1e-4)


def test_of_equal_numbers_the_first_are_the_largest():
    score = torch.tensor([[2.0, 1.0, 1.0], [3.0, 1.0, 0.0]])
    assert torch.equal(largest(score, 3), torch.tensor([[True, True, False], [True, False, False]]))
    assert int(largest(torch.zeros(4, 5), 7).sum()) == 7
    assert largest(score, 6).all()


def test_bytes_by_hand():
    # A bit a number, and two bytes for each that is kept.
    assert Sparse(kept_fraction=0.5).nbytes(128, 256) == 128 * 256 // 8 + 2 * 128 * 128
    shared = Sparse(kept_fraction=0.5, balanced=False)
    assert shared.nbytes(128, 256) == 128 * 256 // 8 + 2 * 128 * 128
    groups = Sparse(kept_fraction=0.5, block_columns=16, balanced=False, values=Grid(bits=4, group_size=16))
    assert groups.nbytes(128, 256) == 128 * 2 + 1024 * (8 + 2) + 1024 // 2
    # Two bytes for a number and two for its place; 4 tiles and where they begin.
    assert Tiled(out_features_held=128, kept_fraction=0.25).nbytes(128, 256) == 4 * 8192 + 4 * 5


def test_refuses_what_it_cannot_hold():
    with pytest.raises(ShapeError, match="do not divide 10 x 16"):
        Sparse(block_rows=4).check(10, 16)
    for fraction in (0.0, 1.5):
        with pytest.raises(ShapeError, match="share of the"):
            Sparse(kept_fraction=fraction)
        with pytest.raises(ShapeError, match="share of the"):
            Tiled(kept_fraction=fraction)
    with pytest.raises(ShapeError, match="apart"):
        Tiled(tile_rows=512, tile_columns=128)
    with pytest.raises(ShapeError, match="laid out for 8"):
        Tiled(out_features_held=8).check(16, 16)
    with pytest.raises(ShapeError, match="holds nothing"):
        Sparse(block_columns=0)
