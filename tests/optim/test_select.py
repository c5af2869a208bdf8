"""What holds for every rule that selects blocks."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pintpot.core.shape import ModelShape
from pintpot.ledger.steps import train_step
from pintpot.optim import BlockCoordinateDescentRule, LisaRule, OwLoreRule
from tests.architectures import tiny_config, tiny_model

TURN = {"active_blocks": 1, "interval_steps": 2}
RULES = (
    LisaRule(**TURN),
    OwLoreRule(**TURN, rank=4, update_gap=2),
    BlockCoordinateDescentRule(**TURN),
    BlockCoordinateDescentRule(**TURN, rule="cyclic"),
)
IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("extras", [{}, {"release_gradients": True}], ids=["held", "released"])
def test_a_run_on_shapes_alone_holds_what_a_real_one_does(rule, extras):
    shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = shape.build("cpu")
        optimizer = rule.optimizer(model, lr=1e-2, **extras)
        ids = torch.zeros(2, 8, dtype=torch.int64)
        for _ in range(3):
            train_step(model, optimizer, ids, ids)
        # The first block stands for any.
        assert optimizer.selection.active == [0]
        assert all(p.grad is None for p in model.parameters())
        assert [next(layer.parameters()).requires_grad for layer in model.model.layers] == [True, False]
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        assert held == rule.state_bytes(shape)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_model_may_have_fewer_blocks_than_are_trained(rule):
    rule = type(rule).build({**rule.parameters(), "active_blocks": 9})
    model = tiny_model("llama")
    optimizer = rule.optimizer(model, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        train_step(model, optimizer, IDS, IDS)
    assert optimizer.selection.active == [0, 1]
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
    held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert held == rule.state_bytes(shape)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_parameters_frozen_before_stay_frozen(rule):
    model = tiny_model("llama")
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = rule.optimizer(model, lr=1e-2)
    for _ in range(5):
        train_step(model, optimizer, IDS, IDS)
        assert not frozen.requires_grad
    assert torch.equal(frozen, before)
