"""Ranks under a byte budget, and the factors that they are for."""

import pytest
import torch

from pintpot.core.errors import BudgetError
from pintpot.weights.factorised import leading_factors, output_factors
from pintpot.weights.ranks import Spectrum, energy_spectrum, parity_rank, ranks_for


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def spent(ranks: dict[str, int], spectra: dict[str, Spectrum]) -> int:
    return sum(rank * spectra[name].rank_bytes for name, rank in ranks.items())


def test_parity_is_the_last_rank_that_saves():
    for rows, columns in ((8, 8), (20, 128), (128, 4), (1, 9)):
        rank = parity_rank(rows, columns)
        assert rank * (rows + columns) < rows * columns <= (rank + 1) * (rows + columns)


def test_a_budget_goes_to_the_directions_that_are_worth_most():
    steep, flat = torch.tensor([9.0, 1.0, 0.1, 0.01]), torch.tensor([3.0, 2.9, 2.8, 2.7])
    spectra = {"steep": energy_spectrum(steep, 10, 4), "flat": energy_spectrum(flat, 10, 4)}
    assert ranks_for(spectra, 50) == {"steep": 1, "flat": 4}
    assert ranks_for(spectra, 20) == {"steep": 1, "flat": 1}
    assert ranks_for(spectra, 80) == {"steep": 4, "flat": 4}


@pytest.mark.parametrize("seed", range(6))
def test_a_budget_is_spent_to_the_last_byte_where_the_sizes_allow_it(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = {"q": 2 * 256, "k": 2 * 192, "up": 2 * 472, "down": 2 * 472}
    spectra = {
        name: energy_spectrum(torch.rand(60, generator=generator).sort(descending=True).values, cost, 60)
        for name, cost in costs.items()
    }
    # Bytes that some ranks take, though not those that the best directions alone would have.
    budget = 31 * costs["q"] + 17 * costs["k"] + 47 * costs["up"]
    ranks = ranks_for(spectra, budget)
    assert spent(ranks, spectra) == budget
    every = sorted(((float(g), s.rank_bytes) for s in spectra.values() for g in s.gains), reverse=True)
    bound, left = 0.0, budget
    for gain, cost in every:
        bound, left = bound + gain * min(cost, left), left - min(cost, left)
    worth = sum(float(spectra[n].gains[:r].sum()) * spectra[n].rank_bytes for n, r in ranks.items())
    # No choice can be worth more than whole and broken directions in order; exchanging a few costs next to nothing.
    assert 0.97 * bound < worth <= bound * (1 + 1e-9)


def test_what_cannot_be_spent_is_left_and_too_little_is_refused():
    spectra = {"a": energy_spectrum(torch.ones(4), 10, 4)}
    assert ranks_for(spectra, 25) == {"a": 2}
    assert ranks_for(spectra, 99) == {"a": 4}
    with pytest.raises(BudgetError, match="one direction of each"):
        ranks_for(spectra, 9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 5), (6, 6)])
def test_leading_factors_are_the_nearest_matrix_of_the_rank(shape):
    weight = matrix(*shape)
    rank = max(1, min(shape) // 2)
    left, right = leading_factors(weight, rank)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    torch.testing.assert_close((left @ right).double(), u[:, :rank] * s[:rank] @ v[:rank], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_factors_of_nothing_are_nothing():
    left, right = leading_factors(torch.zeros(4, 6), 2)
    assert torch.equal(left @ right, torch.zeros(4, 6))


def test_output_factors_lose_least_of_the_outputs():
    weight, root = matrix(24, 32), matrix(32, 32, seed=1) * torch.logspace(0, 2, 32)
    moments = root @ root.t() / 32
    left, right = output_factors(weight, moments, 8)

    def error(kept: torch.Tensor) -> float:
        difference = (weight - kept).double()
        return float(((difference @ moments.double()) * difference).sum())

    # By Eckart and Young no matrix of rank 8 comes nearer to W H^(1/2), whose Gram matrix is W H W^T.
    values = torch.linalg.eigvalsh(weight.double() @ moments.double() @ weight.double().t())
    assert error(left @ right) == pytest.approx(float(values[:-8].sum()), rel=1e-3)
    assert error(left @ right) < 0.7 * error(torch.linalg.multi_dot(leading_factors(weight, 8)))
    torch.testing.assert_close(left.t() @ left, torch.eye(8), rtol=0, atol=1e-5)
