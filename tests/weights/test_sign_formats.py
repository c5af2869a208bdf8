"""Signs with magnitudes of low rank, and ternary numbers: exact bytes, exact numbers, least error."""

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.weights.formats import SignRank, Ternary
from pintpot.weights.formats import sign_rank as module
from pintpot.weights.formats.sign_rank import leading_factors


def weight(rows: int = 24, columns: int = 40) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_signs_are_kept_and_magnitudes_are_the_nearest_of_their_rank():
    dense = weight()
    for rank in (1, 3):
        layout = SignRank(rank=rank)
        stored = layout.encode(dense)
        assert sum(t.nbytes for t in stored.values()) == 24 * 5 + 2 * rank * (24 + 40)
        held = layout.decode(stored, 40, torch.float32).double()
        left, values, right = torch.linalg.svd(dense.double().abs(), full_matrices=False)
        nearest = dense.double().sign() * ((left[:, :rank] * values[:rank]) @ right[:rank])
        # Factors are stored with 11 bits.
        assert (held - nearest).norm() < 1e-3 * nearest.norm()


def test_rank_one_keeps_every_sign():
    held = SignRank().decode(SignRank().encode(weight()), 40, torch.float32)
    assert torch.equal(held.sign(), weight().sign())


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_power_iteration_comes_near_the_exact_factors(shape, monkeypatch):
    matrix = weight(*shape).abs()
    exact = leading_factors(matrix, 2)
    monkeypatch.setattr(module, "EXACT_SIDE", 1)
    found = leading_factors(matrix, 2)
    best = (matrix - exact[0] @ exact[1]).norm()
    assert best <= (matrix - found[0] @ found[1]).norm() < 1.01 * best


def test_a_rank_that_the_shape_has_not_is_refused():
    with pytest.raises(ShapeError, match="no rank 9"):
        SignRank(rank=9).check(8, 100)


@pytest.mark.parametrize("per_byte", [4, 5])
@pytest.mark.parametrize("columns", [40, 43])
def test_ternary_numbers_come_back(per_byte, columns):
    layout = Ternary(group_size=16, per_byte=per_byte)
    values = torch.randint(-1, 2, (7, columns), generator=torch.Generator().manual_seed(1))
    values[:, ::16] = 1
    scale = torch.tensor([0.5, 2.0, 3.0])
    dense = values * layout.by_column(scale.expand(7, 3), columns)
    stored = layout.encode(dense)
    assert sum(t.nbytes for t in stored.values()) == 7 * (-(-columns // per_byte) + 2 * 3)
    assert torch.equal(layout.decode(stored, columns, torch.float32), dense)


def test_ternary_scales_have_the_least_error_of_all():
    dense = weight(6, 20)
    held = Ternary().decode(Ternary().encode(dense), 20, torch.float32)
    error = (held - dense).square().sum(1)
    for row in range(6):
        for scale in torch.linspace(0.05, 3, 400):
            ternary = scale * (dense[row] / scale).round().clamp(-1, 1)
            assert error[row] <= (ternary - dense[row]).square().sum() * 1.001


def test_ternary_refuses_what_a_byte_cannot_hold():
    with pytest.raises(ShapeError, match="4 or 5"):
        Ternary(per_byte=6)
    with pytest.raises(ShapeError, match="group_size"):
        Ternary(group_size=0)
