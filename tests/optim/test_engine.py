"""What the engine adds to every rule: blocks trained in turn, and gradients released as they arrive."""

import copy

import pytest
import torch
from torch import nn

from pintpot.core.errors import CompositionError, TrainingError, UnsupportedModel
from pintpot.optim import AdamW, Apollo, Lisa
from tests.architectures import tiny_model

IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))


def backward(model: nn.Module) -> None:
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_lisa_trains_exactly_the_sampled_blocks_and_what_is_outside():
    model = tiny_model("llama")
    optimizer = Lisa(model, lr=1e-2, active_blocks=1, interval_steps=2, seed=1)
    seen = []
    for _ in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (active,) = optimizer.selection.active
        seen.append(active)
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        outside = {name for name in before if ".layers." not in name}
        block = {name for name in before if f".layers.{active}." in name}
        assert moved(model, before) == outside | block
        frozen = [p for name, p in model.named_parameters() if ".layers." in name and name not in block]
        kept = {id(p) for number in optimizer.selection.active for p in optimizer.selection.blocks[number]}
        assert all(p.grad is None and (p not in optimizer.state or id(p) in kept) for p in frozen)
    assert seen[::2] == seen[1::2]
    assert len(set(seen)) == 2


def test_a_selection_resumes_where_it_stood():
    def run(model, optimizer, steps):
        for _ in range(steps):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()

    settings = {"lr": 1e-2, "active_blocks": 1, "interval_steps": 3}
    whole, parted = tiny_model("llama"), tiny_model("llama")
    run(whole, Lisa(whole, **settings), 10)
    early = Lisa(parted, **settings)
    run(parted, early, 4)
    saved = copy.deepcopy(early.state_dict())
    late = Lisa(parted.requires_grad_(), **settings)
    late.load_state_dict(saved)
    run(parted, late, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_a_selection_needs_a_model_with_blocks():
    with pytest.raises(CompositionError, match="model"):
        Lisa([nn.Parameter(torch.ones(3))])
    with pytest.raises(UnsupportedModel, match="blocks"):
        Lisa(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("kind", [AdamW, Apollo])
def test_released_gradients_give_the_same_update_and_are_gone(kind):
    held, released = tiny_model("llama"), tiny_model("llama")
    one, two = kind(held, lr=1e-2), kind(released, lr=1e-2, release_gradients=True)
    norms = []
    for _ in range(3):
        backward(held)
        norms.append(float(nn.utils.get_total_norm([p.grad for p in held.parameters()])))
        one.step()
        one.zero_grad()
        backward(released)
        assert all(p.grad is None for p in released.parameters())
        assert two.gradient_norm() == pytest.approx(norms[-1], rel=1e-5)
        two.step()
        assert two.gradient_norm() == 0.0
    # Batches of tensors are summed in another order, no more.
    for a, b in zip(held.parameters(), released.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_at_most_one_gradient_lives_at_a_time():
    model = tiny_model("llama")
    optimizer = AdamW(model, release_gradients=True)
    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    backward(model)
    assert max(alive) == 0
    # An optimizer that is gone releases nothing more.
    del optimizer
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model)
    assert all(p.grad is not None for p in model.parameters())
    assert not moved(model, before)


def test_a_released_gradient_that_is_not_finite():
    p = nn.Parameter(torch.ones(3))
    skipping = AdamW([p], release_gradients=True, nonfinite="skip")
    (p.sum() * float("nan")).backward()
    assert torch.equal(p.detach(), torch.ones(3))
    assert not skipping.state
    q = nn.Parameter(torch.ones(3))
    raising = AdamW([q], release_gradients=True)
    with pytest.raises(TrainingError, match="NaN"):
        (q.sum() * float("nan")).backward()
    assert torch.equal(q.detach(), torch.ones(3))
    assert not raising.state
