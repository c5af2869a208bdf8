"""Natural GaLore against a float64 twin that inverts the whole Fisher matrix, and what the inverse does."""

import copy

import pytest
import torch
from torch import nn

from pintpot.core.errors import ShapeError
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import NaturalGaLore, _inner
from pintpot.optim._inner import FisherAdam
from tests.optim.test_projected import DECAY, GAP, LR, RANK, SHAPES, ByMatrix, adam, gradients, run, start

HISTORY, DAMPING = 3, 1e-3


def make(parameters: list[nn.Parameter], **more: object) -> NaturalGaLore:
    settings = {"lr": LR, "weight_decay": DECAY, "update_gap": GAP, "rank": RANK, "history": HISTORY, **more}
    return NaturalGaLore(parameters, **settings)


class Twin(ByMatrix):
    """The method as its paper writes it, one matrix at a time, the smaller side on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.basis, self.past = {}, {}

    def update(self, key: object, g: torch.Tensor, step: int) -> torch.Tensor:
        if (step - 1) % GAP == 0:
            u = torch.linalg.svd(g, full_matrices=False)[0][:, :RANK]
            self.basis[key] = u * u[u.abs().argmax(0), torch.arange(RANK)].sign()
        p = self.basis[key]
        small = (p.T @ g).flatten()
        self.past[key] = [*self.past.get(key, []), small][-HISTORY:]
        fisher = DAMPING * torch.eye(len(small), dtype=torch.float64)
        for old in self.past[key]:
            fisher += torch.outer(old, old)
        natural = torch.linalg.solve(fisher, small).view(RANK, -1)
        return 0.25 * p @ adam(self.moments, key, natural, step)


def test_twenty_steps_are_those_of_the_float64_twin():
    ours, twin = start(), Twin()
    weights = [p.detach().clone() for p in ours]
    optimizer = make(ours)
    for step in range(20):
        run(optimizer, ours, range(step, step + 1))
        weights = twin.step(weights, step + 1)
    for p, w in zip(ours, weights, strict=True):
        # The Fisher matrix has a condition number of about 1e5, which multiplies the rounding of 1e-16.
        torch.testing.assert_close(p.detach(), w, rtol=1e-7, atol=1e-7)


def natural(inner: FisherAdam, seen: list[torch.Tensor]) -> torch.Tensor:
    """The natural gradient of the last of these."""
    moments = [[torch.zeros(inner.shape_of(name, seen[0].shape, 8), dtype=seen[0].dtype)] for name in inner.moments]
    for step, gradient in enumerate(seen, 1):
        before = moments[0][0].clone()
        inner.directions([gradient], moments, [step])
    return (moments[0][0] - 0.9 * before) / 0.1


def test_what_was_seen_before_counts_less():
    old, new = torch.zeros(2, 3, 5, dtype=torch.float64)
    old[0, 0], new[2, 4] = 10.0, 10.0
    fresh = natural(FisherAdam(history=4), [new])
    torch.testing.assert_close(fresh, new / (1e-3 + 100))
    both = natural(FisherAdam(history=4), [old, old, old + new])
    # Along the old gradient the Fisher matrix is larger: the inverse turns the step away from it.
    assert both[0, 0] < 1e-3 * both[2, 4]
    forgotten = natural(FisherAdam(history=4), [old, old, new, new, new, old + new])
    assert forgotten[0, 0] > both[0, 0]


def test_the_history_is_a_ring_of_small_gradients():
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = NaturalGaLore([p], rank=RANK, history=HISTORY, update_gap=100)
    seen = []
    for step in range(5):
        p.grad = gradients(step)[0].float()
        optimizer.step()
        seen.append(optimizer.state[p]["basis"].T @ p.grad)
    past = optimizer.state[p]["past"]
    assert past.shape == (HISTORY, RANK, 24)
    torch.testing.assert_close(past, torch.stack([seen[3], seen[4], seen[2]]))


def test_strips_give_what_the_whole_gives(monkeypatch):
    seen = [g.bfloat16() for g in torch.randn(4, 3, 6, 20, generator=torch.Generator().manual_seed(0))]
    whole = natural(FisherAdam(history=3), seen)
    monkeypatch.setattr(_inner, "CHUNK_NUMEL", 9 * 7)
    # Only the order of float32 sums differs before the result is rounded to bfloat16.
    torch.testing.assert_close(natural(FisherAdam(history=3), seen), whole, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e6])
def test_zero_tiny_and_huge_equal_gradients_are_finite(scale):
    seen = [torch.full((4, 12), scale)] * 5
    found = natural(FisherAdam(history=4), seen)
    assert found.isfinite().all()
    assert (found.abs().max() > 0) == (scale > 0)


@pytest.mark.parametrize("bits", [32, 8])
def test_resuming_through_a_checkpoint_is_exact(bits):
    whole, parted = start(torch.float32), start(torch.float32)
    run(make(whole, state_bits=bits), whole, range(12))
    early = make(parted, state_bits=bits)
    run(early, parted, range(GAP - 1))
    saved = unflatten_state(*copy.deepcopy(flatten_state(early.state_dict())))
    late = make(parted, state_bits=bits)
    late.load_state_dict(saved)
    run(late, parted, range(GAP - 1, 12))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_a_packed_history_is_small():
    p = nn.Parameter(torch.zeros(64, 128))
    optimizer = NaturalGaLore([p], rank=8, history=20, state_bits=8)
    p.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert optimizer.state[p]["past"].dtype == torch.uint8
    assert optimizer.state[p]["past"].numel() == 20 * 8 * 128


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"history": 0}, {"damping": 0.0}):
        with pytest.raises(ShapeError, match="must be positive"):
            NaturalGaLore([nn.Parameter(torch.zeros(SHAPES[0]))], **settings)
