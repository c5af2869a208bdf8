"""What holds for every registered optimizer, on every architecture."""

import copy

import pytest
import torch

from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate, Pretrain
from pintpot.optim._base import OptimExtra, OptimMethod, ProjectedMethod
from pintpot.optim._groups import projected_names, split_shape
from tests.architectures import ATTENTION, tiny_config, tiny_model

KINDS = techniques("optim")
NAMES = tuple(name for name, kind in KINDS.items() if issubclass(kind, ProjectedMethod))
PROJECTING = tuple(name for name in NAMES if KINDS[name]().project() is not None)
EXTRAS = tuple(name for name, kind in KINDS.items() if issubclass(kind, OptimExtra))
IDS = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = {"rank": 4, "update_gap": 2, "active_blocks": 1, "interval_steps": 2}


def method(name: str):
    kind = KINDS[name]
    return kind.build({key: value for key, value in SMALL.items() if key in kind.__dataclass_fields__})


def train(model, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("architecture", ATTENTION)
@pytest.mark.parametrize("name", NAMES)
def test_trains_with_exactly_the_predicted_state(name, architecture):
    model = tiny_model(architecture)
    rule = method(name)
    optimizer = rule.optimizer(model, lr=1e-2)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    shape = ModelShape.from_config(tiny_config(architecture), torch.float32)
    if architecture == "mixtral":
        # An expert that no token chose has a gradient of zeros, so every state exists here too.
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert held_bytes(optimizer) == rule.state_bytes(shape)
    assert {p.name for p in split_shape(shape)[0]} == projected_names(model)


@pytest.mark.parametrize("name", NAMES)
def test_predicted_ledger_replaces_the_optimizer_account(name):
    shape = ModelShape.from_config(tiny_config("llama"), torch.bfloat16)
    cell = (Account.OPTIMIZER, Tier.DEVICE)
    plain = Ledger(
        "predicted", tuple(Moment(phase, {cell: 10**9}) for phase in ("load", "forward", "backward", "step"))
    )
    rule = method(name)
    predicted = rule.predict(plain, shape, Pretrain())
    assert [m.of(Account.OPTIMIZER) for m in predicted.moments] == [10**9, *[rule.state_bytes(shape)] * 3]
    assert predicted.phase("step").of(Account.WORKSPACE) == rule.workspace_bytes(shape) > 0
    assert rule.predict(plain, shape, Generate()) == plain
    assert rule.state_bytes(shape) < 2 * shape.weight_bytes


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_run_and_state_round_trip(name):
    runs = []
    for resume in (False, False, True):
        model = tiny_model("llama")
        optimizer = method(name).optimizer(model, lr=1e-2, weight_decay=0.1)
        losses = train(model, optimizer, 3)
        if resume:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = method(name).optimizer(model.requires_grad_(), lr=1e-2, weight_decay=0.1)
            optimizer.load_state_dict(saved)
        runs.append(losses + train(model, optimizer, 3))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("name", NAMES)
def test_trains_in_bfloat16(name):
    model = tiny_model("llama", dtype=torch.bfloat16)
    optimizer = method(name).optimizer(model, lr=1e-2)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    shape = ModelShape.from_config(tiny_config("llama"), torch.bfloat16)
    assert held_bytes(optimizer) == method(name).state_bytes(shape)


@pytest.mark.parametrize("name", NAMES)
def test_planner_options_are_distinct_and_build(name):
    kind = techniques("optim")[name]
    shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
    options = list(kind.options(shape, Pretrain()))
    assert options[0] == kind()
    assert len(set(options)) == len(options)
    assert all(kind.build(option.parameters()) == option for option in options)


@pytest.mark.parametrize("name", PROJECTING)
def test_embeddings_norms_and_head_follow_the_plain_rule(name):
    model = tiny_model("llama")
    chosen = projected_names(model)
    assert chosen
    assert all("proj" in n and n.startswith("model.layers.") for n in chosen)
    optimizer = method(name).optimizer(model, lr=1e-2)
    train(model, optimizer, 1)
    for n, p in model.named_parameters():
        plain = optimizer.state[p]["exp_avg"].shape == p.shape
        assert plain != (n in chosen)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_extra_goes_with_every_rule(name, extra):
    model = tiny_model("llama")
    optimizer = method(name).optimizer(model, lr=1e-2, **KINDS[extra]().extras)
    losses = train(model, optimizer, 4)
    assert losses[-1] < losses[0]
    plain = method(name).optimizer(tiny_model("llama"), lr=1e-2)
    if KINDS[extra].facts.part == "states":
        train(tiny_model("llama"), plain, 1)
        shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
        assert held_bytes(optimizer) < 0.6 * method(name).state_bytes(shape)
    else:
        assert all(p.grad is None for p in model.parameters())


def test_every_technique_is_a_rule_or_an_extra():
    assert all(issubclass(kind, OptimMethod | OptimExtra) for kind in KINDS.values())
