"""The randomised subspace against the exact one, and where it takes its place."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.optim import GaLore
from pintpot.optim._leading import LeadingSubspace
from pintpot.optim._sketch import leading_vectors

RANK = 8


def decaying(shape: tuple[int, ...], power: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random singular vectors, and singular values that fall as a power of their number."""
    generator = torch.Generator().manual_seed(0)
    side, long = shape[-2:]
    left, right = (torch.linalg.qr(torch.randn(*shape[:-2], n, side, generator=generator))[0] for n in (side, long))
    return (left * torch.arange(1, side + 1).float() ** -power @ right.mT).to(dtype)


def overlaps(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Cosines of the principal angles of two subspaces."""
    return torch.linalg.svdvals(one.double().mT @ other.double())


def exact(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(matrix.double(), full_matrices=False)[0][..., :RANK]


@pytest.mark.parametrize(("power", "least"), [(1.0, 0.99), (2.0, 0.99999)])
@pytest.mark.parametrize("shape", [(120, 200), (3, 80, 90)])
def test_the_subspace_is_nearly_that_of_the_svd(shape, power, least):
    matrix = decaying(shape, power)
    found = leading_vectors(matrix, RANK, seed=1)
    assert found.shape == (*shape[:-1], RANK)
    torch.testing.assert_close(found.mT @ found, torch.eye(RANK).expand(*shape[:-2], -1, -1), rtol=0, atol=1e-5)
    assert float(overlaps(found, exact(matrix)).min()) > least
    # Not the subspace alone: the leading vectors one by one, in their order.
    cosines = (found.double() * exact(matrix)).sum(-2).abs()
    assert float(cosines[..., : RANK // 2].min()) > 0.999


def test_a_flat_tail_is_seen_through_by_power_iterations(monkeypatch):
    matrix = decaying((150, 300), 0.3)
    energy = {}
    for turns in (0, 2):
        monkeypatch.setattr("pintpot.optim._sketch.POWER_ITERATIONS", turns)
        energy[turns] = float((leading_vectors(matrix, RANK, seed=1).mT @ matrix).square().sum())
    best = float((exact(matrix).float().mT @ matrix).square().sum())
    assert energy[2] > 0.98 * best
    assert energy[2] > energy[0]


def test_bfloat16_strips_are_the_whole(monkeypatch):
    matrix = decaying((60, 300), 1.0, torch.bfloat16)
    whole = leading_vectors(matrix.float(), RANK, seed=1)
    monkeypatch.setattr("pintpot.optim._sketch.CHUNK_NUMEL", 60 * 64)
    assert float(overlaps(leading_vectors(matrix, RANK, seed=1), whole).min()) > 0.9999


def test_only_large_sides_with_low_ranks_are_sketched():
    project = LeadingSubspace(RANK, exact_side=64)
    assert [project._sketches(side) for side in (64, 65)] == [False, True]
    assert not LeadingSubspace(60, exact_side=64)._sketches(128)
    assert not LeadingSubspace(256)._sketches(1024)
    large = LeadingSubspace(256)
    assert large.refresh_flops(4096, 11008) < 0.2 * LeadingSubspace(256, exact_side=4096).refresh_flops(4096, 11008)
    assert large.workspace_numel(4096, 11008)[1] < LeadingSubspace(256, exact_side=4096).workspace_numel(4096, 11008)[1]


def test_galore_with_a_sketch_follows_exact_galore():
    runs = []
    for exact_side in (16, 1024):
        p = nn.Parameter(torch.zeros(60, 80))
        optimizer = GaLore([p], lr=0.1, rank=RANK, update_gap=3, exact_side=exact_side)
        for step in range(6):
            p.grad = decaying((60, 80), 2.0).roll(step, 0)
            optimizer.step()
        runs.append(p.detach())
    torch.testing.assert_close(runs[0], runs[1], rtol=0.02, atol=2e-3)


def test_the_seed_decides_and_zero_is_no_harm():
    matrix = decaying((60, 80), 1.0)
    assert torch.equal(leading_vectors(matrix, RANK, 1), leading_vectors(matrix, RANK, 1))
    assert not torch.equal(leading_vectors(matrix, RANK, 1), leading_vectors(matrix, RANK, 2))
    state = {}
    LeadingSubspace(RANK, exact_side=16).refresh_(state, torch.zeros(60, 80), 0, {})
    assert state["basis"].isfinite().all()
    with FakeTensorMode():
        assert leading_vectors(torch.empty(2, 60, 80, dtype=torch.bfloat16), RANK, 1).shape == (2, 60, RANK)
