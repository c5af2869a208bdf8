"""What holds for every registered optimizer, on every architecture."""

import copy
import json

import pytest
import torch

from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account, Ledger, Moment, Tier
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.slots import conflict
from pintpot.core.workload import Finetune, Generate, Pretrain
from pintpot.jobs.simulate import simulate
from pintpot.jobs.training_state import Position, flatten_state, load_checkpoint, save_checkpoint, unflatten_state
from pintpot.ledger.predict import baseline
from pintpot.optim._adamw import AdamWRule
from pintpot.optim._base import OptimExtra, OptimMethod, ProjectedMethod
from pintpot.optim._groups import projected_names, split_shape
from pintpot.optim._parameterize import Parameterization
from pintpot.optim._zeroth import GradientFreeMethod
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


SMALL = {"rank": 4, "update_gap": 2, "active_blocks": 1, "interval_steps": 2, "directions": 4, "sigma": 1e-3}


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
    optimizer = method(name).optimizer(model, lr=1e-2, state_bits=32)
    train(model, optimizer, 1)
    for n, p in model.named_parameters():
        if p in optimizer.state:  # The parameters of a frozen block are not.
            plain = optimizer.state[p]["exp_avg_sq"].shape == p.shape
            assert plain != (n in chosen)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", NAMES)
def test_every_extra_goes_with_every_rule(name, extra):
    kind = KINDS[extra]
    model = tiny_model("llama")
    if kind.facts.part == "rule" and conflict(method(name), kind()):
        with pytest.raises(CompositionError):
            method(name).optimizer(model, lr=1e-2, **kind().extras)
        return
    optimizer = method(name).optimizer(model, lr=2e-3 * min(10.0, kind.rate_factor), **kind().extras)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    if kind.facts.part == "states":
        model = tiny_model("llama")
        whole = method(name).optimizer(model, lr=1e-2, state_bits=32)
        train(model, whole, 1)
        assert held_bytes(optimizer) < 0.6 * held_bytes(whole)
    elif kind.facts.part == "rule":
        shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
        assert held_bytes(optimizer) == method(name).state_bytes(shape, kind().rule())
    elif kind.facts.part == "release":
        assert all(p.grad is None for p in model.parameters())


FREE = tuple(name for name, kind in KINDS.items() if issubclass(kind, GradientFreeMethod))


def closure_for(model):
    def closure():
        return model(input_ids=IDS, labels=IDS, use_cache=False).loss

    return closure


@pytest.mark.parametrize("architecture", ATTENTION)
@pytest.mark.parametrize("name", FREE)
def test_gradient_free_training_keeps_nothing(name, architecture):
    model = tiny_model(architecture)
    rule = method(name)
    optimizer = rule.optimizer(model.train(), lr=1e-4)
    for _ in range(2):
        assert 0 < optimizer.step(closure_for(model)) < 10
    shape = ModelShape.from_config(tiny_config(architecture), torch.float32)
    assert held_bytes(optimizer) == rule.state_bytes(shape) == 0
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FREE)
def test_gradient_free_training_lowers_the_loss(name, dtype):
    model = tiny_model("llama", dtype=dtype)
    # Clipped elements make small steps.
    lr = 1e-2 if "clip" in KINDS[name].__dataclass_fields__ else 1e-3
    optimizer = method(name).optimizer(model, lr=lr)
    losses = [optimizer.step(closure_for(model)) for _ in range(40)]
    assert sum(losses[-5:]) / 5 < losses[0] - 0.03


@pytest.mark.parametrize("name", FREE)
def test_gradient_free_same_seed_same_run_and_state_round_trip(name):
    runs = []
    for resume in (False, False, True):
        model = tiny_model("llama")
        optimizer = method(name).optimizer(model, lr=1e-3, weight_decay=0.1)
        losses = [optimizer.step(closure_for(model)) for _ in range(3)]
        if resume:
            tree, tensors = flatten_state(optimizer.state_dict())
            optimizer = method(name).optimizer(model, lr=1e-3, weight_decay=0.1)
            optimizer.load_state_dict(unflatten_state(json.loads(json.dumps(tree)), tensors))
        torch.randn(5)  # The global generator plays no part.
        runs.append(losses + [optimizer.step(closure_for(model)) for _ in range(3)])
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) == 6


@pytest.mark.parametrize("name", FREE)
def test_gradient_free_parameters_return_when_a_closure_raises(name):
    model = tiny_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = method(name).optimizer(model.train(), lr=1e-3)
    losses = iter([1.0])
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(losses))
    for p, old in zip(model.parameters(), before, strict=True):
        # One perturbation of about 1e-3 and back: a rounding error or two.
        torch.testing.assert_close(p.detach(), old, rtol=3e-7, atol=1e-9)
    assert optimizer.steps == 0
    assert model.training


@pytest.mark.parametrize("name", FREE)
def test_gradient_free_ledger_holds_one_forward_pass(name):
    rule = method(name)
    workload = Finetune(batch=2, tokens=64)
    # Of the tiny models the one whose forward pass holds most beside the logits.
    shape = ModelShape.from_config(tiny_config("gemma2"), torch.float32)
    plain = baseline(shape, workload)
    predicted = rule.predict(plain, shape, workload)
    simulated = simulate(shape, workload, (rule,))
    held = shape.weight_bytes
    assert simulated.peak_bytes() <= predicted.peak_bytes() < held + 0.5 * (plain.peak_bytes() - held)
    assert predicted.peak_of(Account.GRADIENTS) == simulated.peak_of(Account.GRADIENTS) == 0
    assert predicted.peak_of(Account.OPTIMIZER) == simulated.peak_of(Account.OPTIMIZER) == 0
    assert rule.predict(plain, shape, Generate()) == plain


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("name", FREE)
def test_gradient_free_rules_refuse_what_acts_on_gradients(name, extra):
    with pytest.raises(CompositionError, match="no parameter"):
        method(name).optimizer(tiny_model("llama"), lr=1e-3, **KINDS[extra]().extras)


def test_every_technique_is_a_rule_or_an_extra():
    assert all(issubclass(kind, OptimMethod | OptimExtra | Parameterization) for kind in KINDS.values())


PARAMETERS = tuple(name for name, kind in KINDS.items() if issubclass(kind, Parameterization))
FEW = {"rank": 8, "restart_gap": 3, "interval_steps": 2, "density": 0.1, "sparsity": 0.1, "projected_rank": 4}


def parameterized(name: str, model, lr: float = 1e-2, **extras):
    kind = KINDS[name]
    made = kind.build({key: value for key, value in FEW.items() if key in kind.__dataclass_fields__})
    made.prepare_(model, seed=3)
    optimizer = (made.rule() or AdamWRule()).optimizer(model, lr=lr, **extras)
    made.follow_(model, optimizer)
    return made, optimizer


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("architecture", ATTENTION)
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameterized_models_train_and_become_ordinary_again(name, architecture):
    plain, model, merged = tiny_model(architecture), tiny_model(architecture), tiny_model(architecture)
    made, _ = parameterized(name, merged)
    made.finish_(merged)
    made, optimizer = parameterized(name, model)
    torch.testing.assert_close(logits_of(model), logits_of(merged))
    shape = ModelShape.from_config(tiny_config(architecture), torch.float32)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert made.sizes(shape).held == held - sum(b.nbytes for b in plain.buffers())
    losses = train(model.train(), optimizer, 5)
    assert losses[-1] < losses[0]
    assert held_bytes(optimizer) == made.state_bytes(shape)
    expected = logits_of(model)
    made.finish_(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameterized_same_seed_same_run_and_checkpoint_round_trip(name, tmp_path):
    runs = []
    for resume in (False, False, True):
        model = tiny_model("llama")
        _, optimizer = parameterized(name, model)
        losses = train(model, optimizer, 4)
        if resume:
            position = Position(step=4, curve=[], run={})
            folder = save_checkpoint(tmp_path, model, optimizer, position, trainable_only=True, keep=1)
            model = tiny_model("llama")
            _, optimizer = parameterized(name, model)
            load_checkpoint(folder, model, optimizer, {}, trainable_only=True)
        torch.randn(5)  # The global generator plays no part.
        runs.append(losses + train(model, optimizer, 4))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("extra", [name for name in EXTRAS if KINDS[name].facts.part in ("states", "release")])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameterized_models_go_with_every_state_format_and_release(name, extra):
    model = tiny_model("llama", dtype=torch.bfloat16)
    _, optimizer = parameterized(name, model, **KINDS[extra]().extras)
    losses = train(model, optimizer, 5)
    assert losses[-1] < losses[0]
    if KINDS[extra].facts.part == "release":
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameterized_planner_options_are_distinct_and_sound(name):
    shape = ModelShape.from_config(tiny_config("llama"), torch.float32)
    options = list(KINDS[name].options(shape, Pretrain()))
    assert len(set(options)) == len(options)
    plain = baseline(shape, Pretrain(batch=1, tokens=16))
    for option in options:
        option.check()
        assert KINDS[name].build(option.parameters()) == option
        assert option.state_bytes(shape) < 2 * shape.weight_bytes
        assert option.risk(shape, Pretrain()) > 0
        assert option.predict(plain, shape, Generate()) == plain
        assert option.predict(plain, shape, Pretrain(batch=1, tokens=16)).peak_bytes() > 0
