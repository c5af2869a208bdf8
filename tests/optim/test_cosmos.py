"""COSMOS against a plain float64 twin, and what it promises inside and outside the leading eigenspace."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from pintpot.core.errors import ShapeError
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import Cosmos
from pintpot.optim._leading import PowerSubspace
from pintpot.optim._residual import _orthogonal
from tests.optim.test_projected import DECAY, LR, RANK, ByMatrix, run, start

BETA1, BETA2, RATIO = 0.9, 0.96, 0.1


def make(parameters: list[nn.Parameter], **more: object) -> Cosmos:
    return Cosmos(parameters, **{"lr": LR, "weight_decay": DECAY, "rank": RANK, **more})


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """Gram and Schmidt's."""
    found: list[torch.Tensor] = []
    for column in columns.T:
        for _ in range(2):
            for other in found:
                column = column - (other @ column) * other
        found.append(column / column.norm())
    return torch.stack(found, dim=1)


class Twin(ByMatrix):
    """The algorithm as the paper writes it, one matrix at a time, the smaller side on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict = {}

    def update(self, key: object, g: torch.Tensor, step: int) -> torch.Tensor:
        """The update of one S x L matrix before the learning rate."""
        side, long = g.shape
        if key not in self.states:
            u = torch.linalg.svd(g, full_matrices=False)[0][:, :RANK]
            self.states[key] = (u, torch.zeros(RANK, RANK).double(), torch.zeros(RANK, long).double(), 0 * g)
        old, s, v, m = self.states[key]
        m = BETA1 * m + (1 - BETA1) * g
        average = BETA2 * old @ s @ old.T + (1 - BETA2) * g @ g.T
        # At the first step the power step would only turn the basis within its range.
        u = old if step == 1 else orthonormal(BETA2 * old @ s + (1 - BETA2) * g @ g.T @ old)
        s = u.T @ average @ u
        v = BETA2 * v + (1 - BETA2) * (u.T @ g) ** 2
        self.states[key] = (u, s, v, m)
        inside = (u.T @ m / (1 - BETA1**step)) / ((v / (1 - BETA2**step)).sqrt() + 1e-8)
        x = m - u @ u.T @ m
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        length = (side * long) ** 0.5
        whole = u @ inside + RATIO * length * x / x.norm()
        return RATIO * length * whole / whole.norm()


def test_twenty_steps_are_those_of_the_float64_twin():
    ours, twin = start(), Twin()
    weights = [p.detach().clone() for p in ours]
    optimizer = make(ours)
    for step in range(20):
        run(optimizer, ours, range(step, step + 1))
        weights = twin.step(weights, step + 1)
    for p, w in zip(ours, weights, strict=True):
        # Rounding of 1e-16, which Adam's division and the polynomial of Newton-Schulz magnify at each step.
        torch.testing.assert_close(p.detach(), w, rtol=1e-8, atol=1e-8)


def test_outside_the_subspace_all_directions_move_alike_and_the_whole_has_one_length():
    p = nn.Parameter(torch.zeros(16, 24, dtype=torch.float64))
    optimizer = Cosmos([p], lr=1.0, rank=RANK)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 16, generator=generator, dtype=torch.float64))[0] for n in (16, 24))
    p.grad = left @ torch.logspace(0, -1, 16, dtype=torch.float64).diag() @ right.T
    optimizer.step()
    state = optimizer.state[p]
    assert {k: tuple(v.shape) for k, v in state.items() if k != "step"} == {
        "exp_avg_sq": (RANK, 24),
        "momentum": (16, 24),
        "basis": (16, RANK),
        "average": (RANK, RANK),
    }
    moved = p.detach()
    assert moved.square().mean().sqrt() == pytest.approx(0.1)
    rest = moved - state["basis"] @ (state["basis"].T @ moved)
    spread = torch.linalg.svdvals(rest)[: 16 - RANK]
    before = torch.logspace(0, -1, 16)[RANK:]
    assert spread.max() / spread.min() < 1.8 < before.max() / before.min()
    inside = state["basis"].T @ moved
    # Adam's first step is the sign of the gradient, times one factor here.
    torch.testing.assert_close(inside.abs(), inside.abs().mean().expand_as(inside), rtol=1e-4, atol=0)


def test_the_basis_follows_the_leading_eigenvectors_of_the_average():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    state: dict = {"step": 0}
    project = PowerSubspace(4)
    exact = torch.zeros(32, 32)
    for step in range(120):
        strong = directions[:, :4] if step < 40 else directions[:, 4:8]
        noise = 0.1 * torch.randn(32, 48, generator=generator)
        gradient = strong @ torch.randn(4, 48, generator=generator) + noise
        project.refresh_(state, gradient, 0, {})
        exact = 0.96 * exact + 0.04 * gradient @ gradient.T
        if step in (39, 119):
            top = torch.linalg.eigh(exact)[1][:, -4:]
            overlaps = torch.linalg.svdvals(top.T @ state["basis"])
            assert overlaps.min() > 0.99
            torch.testing.assert_close(state["basis"].T @ state["basis"], torch.eye(4), rtol=0, atol=1e-5)
        if step == 39:
            # The average of 32 x 32 was never there, yet in the subspace it is known.
            known = state["basis"].T @ exact @ state["basis"]
            assert state["average"].trace() == pytest.approx(float(known.trace()), rel=0.02)


def test_newton_schulz_brings_singular_values_near_one():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = _orthogonal(matrices.clone())
    values = torch.linalg.svdvals(found)
    assert 0.6 < values.min() < values.max() < 1.3
    # The polynomial moves singular values alone.
    turned = left.mT @ found @ right.mT
    torch.testing.assert_close(turned, turned.diagonal(dim1=-2, dim2=-1).diag_embed())


def test_a_rank_of_the_whole_side_leaves_nothing_outside():
    p = nn.Parameter(torch.zeros(10, 30))
    optimizer = Cosmos([p], lr=1.0, rank=64, rest_weight=100.0)
    p.grad = torch.randn(10, 30, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].shape == (10, 30)
    inside = optimizer.state[p]["basis"].T @ p.detach()
    torch.testing.assert_close(inside.abs(), torch.full_like(inside, 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_gradients_and_recovery(dtype):
    parameters = start(dtype)
    optimizer = make(parameters, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    run(optimizer, parameters, range(2))
    assert all(p.isfinite().all() for p in parameters)
    assert all((a - p).abs().max() > 1e-3 for a, p in zip(before, parameters, strict=True))


@pytest.mark.parametrize("bits", [32, 8])
def test_resuming_through_a_checkpoint_is_exact(bits):
    whole, parted = start(torch.float32), start(torch.float32)
    run(make(whole, state_bits=bits), whole, range(8))
    early = make(parted, state_bits=bits)
    run(early, parted, range(5))
    saved = unflatten_state(*copy.deepcopy(flatten_state(early.state_dict())))
    late = make(parted, state_bits=bits)
    late.load_state_dict(saved)
    run(late, parted, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_a_packed_momentum_moves_the_weights_nearly_as_a_whole_one():
    whole, packed = start(torch.float32), start(torch.float32)
    first = [p.detach().clone() for p in whole]
    run(make(whole), whole, range(6))
    optimizer = make(packed, state_bits=8)
    run(optimizer, packed, range(6))
    assert optimizer.state[packed[0]]["momentum"].dtype == torch.uint8
    for a, b, c in zip(whole, packed, first, strict=True):
        assert (a - b).norm() < 0.2 * (a - c).norm()


def test_settings_that_make_no_sense_are_refused():
    p = nn.Parameter(torch.zeros(16, 24))
    for settings, name in (({"rest_weight": 0.0}, "rest_weight"), ({"decay": 1.0}, "decay")):
        with pytest.raises(ShapeError, match=name):
            Cosmos([p], **settings)


def test_updates_follow_a_steady_gradient():
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = Cosmos([p], lr=0.1, rank=RANK)
    target = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) / 10
    losses = []
    for _ in range(30):
        p.grad = p.detach() - target
        losses.append(float(p.grad.square().mean()))
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(b < a for a, b in pairwise(losses[:5]))
