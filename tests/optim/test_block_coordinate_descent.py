"""Block coordinate descent: which block each rule trains, and that nothing else moves."""

import copy

import pytest
import torch

from pintpot.core.errors import ShapeError
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Pretrain
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.optim import BlockCoordinateDescent, BlockCoordinateDescentRule
from pintpot.optim._select import CyclicBlocks, GreedyBlocks
from pintpot.optim._tensors import mix_seed
from tests.architectures import tiny_config, tiny_model
from tests.optim.turns import DECAY, LR, Turns, backward, same_weights


def choices(rule: str):
    def choose(gradients: list[list[torch.Tensor]], turn: int) -> list[int]:
        if rule == "greedy":
            norms = [sum(float((g**2).sum()) for g in block) for block in gradients]
            return [max(range(len(norms)), key=norms.__getitem__)]
        if rule == "cyclic":
            return [turn % len(gradients)]
        generator = torch.Generator().manual_seed(mix_seed(0, turn))
        return [int(torch.randperm(len(gradients), generator=generator)[0])]

    return choose


def train(model, optimizer, steps: int) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", ["greedy", "cyclic", "random"])
def test_twenty_steps_are_those_of_the_float64_twin(rule):
    model = tiny_model("llama", dtype=torch.float64)
    twin = Turns(model, 3, choices(rule))
    optimizer = BlockCoordinateDescent(model, lr=LR, weight_decay=DECAY, rule=rule, interval_steps=3)
    for number in range(20):
        train(model, optimizer, 1)
        twin.step(number)
    same_weights(model, twin.model)


def test_the_greedy_rule_chooses_by_the_gradients_of_the_step_itself():
    model = tiny_model("gemma3")
    optimizer = BlockCoordinateDescent(model, lr=1e-2, interval_steps=2)
    layers = model.model.layers
    for block in (1, 2, 0):
        for p in model.parameters():
            assert p.requires_grad
            p.grad = torch.full_like(p, 1e-3)
        for p in layers[block].parameters():
            p.grad *= 2
        before = [copy.deepcopy(layer.state_dict()) for layer in layers]
        optimizer.step()
        moved = [
            any(not torch.equal(p, before[i][n]) for n, p in layer.named_parameters()) for i, layer in enumerate(layers)
        ]
        assert moved == [i == block for i in range(3)]
        assert [p.grad is not None for layer in layers for p in layer.parameters()] == [
            i == block for i, layer in enumerate(layers) for _ in layer.parameters()
        ]
        assert set(optimizer.state) & set(layers.parameters()) == set(layers[block].parameters())
        optimizer.zero_grad()
        # The second step of the turn trains the same block, whatever the gradients.
        assert [next(layer.parameters()).requires_grad for layer in layers] == [i == block for i in range(3)]
        backward(model)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("rule", ["greedy", "cyclic", "random"])
def test_resuming_within_and_between_turns_is_exact(rule):
    settings = {"lr": 1e-2, "rule": rule, "interval_steps": 3}
    for steps in (3, 4, 5):
        whole, parted = tiny_model("llama"), tiny_model("llama")
        train(whole, BlockCoordinateDescent(whole, **settings), 9)
        early = BlockCoordinateDescent(parted, **settings)
        train(parted, early, steps)
        saved = unflatten_state(*copy.deepcopy(flatten_state(early.state_dict())))
        late = BlockCoordinateDescent(parted.requires_grad_(), **settings)
        late.load_state_dict(saved)
        train(parted, late, 9 - steps)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parted.parameters(), strict=True))


def test_with_released_gradients_the_looking_step_notes_norms_and_moves_no_block():
    model, plain = tiny_model("llama"), tiny_model("llama")
    optimizer = BlockCoordinateDescent(model, lr=1e-2, interval_steps=2, release_gradients=True)
    other = BlockCoordinateDescent(plain, lr=1e-2, interval_steps=2)
    before = copy.deepcopy(model.model.layers.state_dict())
    backward(model)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.model.layers.named_parameters())
    train(plain, other, 1)
    assert optimizer.selection.active == other.selection.active
    train(model, optimizer, 1)
    (active,) = optimizer.selection.active
    moved = {n.split(".")[0] for n, p in model.model.layers.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {str(active)}


def test_a_skipped_look_looks_again():
    model = tiny_model("llama")
    optimizer = BlockCoordinateDescent(model, lr=1e-2, interval_steps=2, nonfinite="skip")
    backward(model)
    next(model.parameters()).grad[0] = float("nan")
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.selection.looking
    assert all(p.requires_grad for p in model.parameters())
    train(model, optimizer, 1)
    assert len(optimizer.selection.active) == 1
    assert not optimizer.selection.looking


def test_rules():
    blocks = [[torch.ones(2)] for _ in range(5)]
    cyclic = CyclicBlocks(2, 1)
    assert [cyclic.choose(blocks, turn, [], {}) for turn in range(4)] == [[0, 1], [2, 3], [0, 4], [1, 2]]
    assert CyclicBlocks(9, 1).choose(blocks, 3, [], {}) == [0, 1, 2, 3, 4]
    assert GreedyBlocks(2, 1).choose(blocks, 0, [1.0, 3.0, 2.0, 3.0, 0.0], {}) == [1, 3]
    with pytest.raises(ShapeError, match="greedy, cyclic, random"):
        BlockCoordinateDescentRule(rule="gready").check()


def test_only_a_rule_that_does_not_look_saves_gradients():
    shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
    plain = Ledger(
        "predicted",
        tuple(
            Moment(phase, {(Account.GRADIENTS, Tier.DEVICE): shape.weight_bytes})
            for phase in ("load", "forward", "backward", "step")
        ),
    )
    peaks = {
        rule: BlockCoordinateDescentRule(rule=rule).predict(plain, shape, Pretrain()).phase("backward")
        for rule in ("greedy", "cyclic")
    }
    assert peaks["greedy"].of(Account.GRADIENTS) == shape.weight_bytes
    assert peaks["cyclic"].of(Account.GRADIENTS) < 0.9 * shape.weight_bytes
