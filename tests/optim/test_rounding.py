"""Stochastic rounding: unbiased, exact to resume, and on its way where rounding to the nearest stands still."""

import copy
import json

import pytest
import torch
from torch import nn

from pintpot.core.expression import parse
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Finetune
from pintpot.jobs.assemble import Composition, Rates, dress
from pintpot.jobs.simulate import simulate
from pintpot.jobs.training_state import flatten_state, unflatten_state
from pintpot.ledger.predict import baseline
from pintpot.ledger.tracker import Tracker
from pintpot.optim import AdamW, Apollo, Fira, GaLore
from pintpot.optim._rounding import NARROW, move_, round_into_
from tests.architectures import tiny_config, tiny_model


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("value", [1.001, -1.001, 0.9997, 3e-6, -4.1e-8, 0.0, 7.25])
def test_the_mean_is_the_number_and_only_its_neighbours_are_hit(dtype, value):
    values = torch.full((200_000,), value)
    rounded = torch.empty_like(values, dtype=dtype)
    round_into_(rounded, values, seed=1)
    found = rounded.double().unique()
    nearest = values[0].to(dtype).double()
    assert len(found) <= 2
    assert nearest in found
    spread = float(found[-1] - found[0])
    assert found[0] <= float(values[0]) <= found[-1]
    # A mean of so many choices of two numbers is off by more than five standard errors once in a million times.
    assert abs(float(rounded.double().mean()) - float(values[0])) <= 5 * 0.5 * spread / len(values) ** 0.5
    exact = nearest == float(values[0])
    assert (len(found) == 1) == bool(exact)


@pytest.mark.parametrize("dtype", NARROW)
def test_numbers_that_need_no_rounding_and_infinities_stay(dtype):
    exact = torch.tensor([0.0, -0.5, 1.5, 6e4, 2.0**-24, float("inf"), -float("inf")]).to(dtype)
    rounded = torch.empty_like(exact)
    round_into_(rounded, exact.float(), seed=3)
    assert torch.equal(rounded, exact)


def train(kind: type, stochastic: bool, steps: int, projected: bool = True, **settings: float) -> torch.Tensor:
    p = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
    group = {"params": [p], "projected": projected}
    optimizer = kind([group], stochastic_rounding=stochastic, **settings)
    for _ in range(steps):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return p.detach().double()


@pytest.mark.parametrize(
    ("kind", "projected", "settings"),
    [
        (AdamW, False, {"lr": 1e-4}),
        (GaLore, True, {"lr": 1e-4, "scale": 8.0, "rank": 1}),
        (AdamW, False, {"lr": 1e-4, "inner": "lion"}),
        (AdamW, False, {"lr": 1e-4, "inner": "lion", "state_bits": 8}),
    ],
)
def test_updates_below_half_a_unit_in_the_last_place_add_up(kind, projected, settings):
    # Below 1 the next number is 2**-8 lower, and a step is 1e-4 (of rank 1: 1e-4 * scale / sqrt(64)).
    assert torch.equal(train(kind, False, 30, projected, **settings), torch.ones(64, 128).double())
    moved = 1 - train(kind, True, 30, projected, **settings)
    assert float(moved.mean()) == pytest.approx(30e-4, rel=0.05)


def test_weight_decay_is_rounded_with_the_update():
    for projected, kind in ((False, AdamW), (True, Apollo)):
        p = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        optimizer = kind([{"params": [p], "projected": projected}], lr=1e-3, weight_decay=0.1, stochastic_rounding=True)
        for _ in range(20):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert float(p.detach().double().mean()) == pytest.approx((1 - 1e-4) ** 20, abs=2e-4)


def test_strips_are_bounded_and_each_has_its_own_noise(monkeypatch):
    monkeypatch.setattr("pintpot.optim._rounding.CHUNK_NUMEL", 1000)
    target = torch.ones(40, 100, dtype=torch.bfloat16)
    move_(target, torch.full((40, 100), -1e-3, dtype=torch.bfloat16), 1.0, seed=5)
    assert not torch.equal(target.view(4, -1)[0], target.view(4, -1)[1])
    across = torch.ones(100, 40, dtype=torch.bfloat16).T
    move_(across, torch.full((40, 100), -1e-3, dtype=torch.bfloat16), 1.0, seed=5)
    assert float(across.double().mean()) == pytest.approx(1 - 1e-3, abs=3e-4)


def test_parameters_of_32_bits_are_updated_as_ever():
    runs = []
    for stochastic in (False, True):
        p = nn.Parameter(torch.linspace(-1, 1, 800).view(20, 40))
        optimizer = GaLore([p], lr=0.1, rank=4, stochastic_rounding=stochastic)
        for step in range(3):
            p.grad = torch.cos(p.detach() * (step + 3))
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


@pytest.mark.parametrize("kind", [AdamW, GaLore, Fira])
def test_resuming_through_a_checkpoint_is_exact(kind):
    def start() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(s, generator=generator).bfloat16()) for s in ((16, 24), (3, 10, 14), (12,))]

    def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            torch.randn(3)  # The global generator plays no part.
            optimizer.step()

    settings = {"lr": 1e-3, "weight_decay": 0.1, "stochastic_rounding": True, **({} if kind is AdamW else {"rank": 4})}
    whole, parted = start(), start()
    run(kind(whole, **settings), whole, range(6))
    early = kind(parted, **settings)
    run(early, parted, range(3))
    tree, tensors = flatten_state(early.state_dict())
    late = kind(parted, **settings)
    late.load_state_dict(unflatten_state(json.loads(json.dumps(tree)), copy.deepcopy(tensors)))
    run(late, parted, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, parted, strict=True))


def test_the_technique_trains_within_its_prediction():
    workload = Finetune(batch=2, tokens=16, steps=3)
    techniques = parse("galore(rank=4)*gradient-release*stochastic-rounding")
    shape = ModelShape.from_config(tiny_config("llama"), torch.bfloat16)
    predicted = baseline(shape, workload)
    for technique in techniques:
        predicted = technique.predict(predicted, shape, workload)
    assert predicted.phase("backward").of(Account.WORKSPACE) > 0
    assert predicted.peak_of(Account.OPTIMIZER) == simulate(shape, workload, techniques).peak_of(Account.OPTIMIZER)
    model = tiny_model("llama", dtype=torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    job = dress(model, Composition.of(techniques, "finetune"), workload, Rates(learning_rate=2e-6))
    assert job.optimizer.stochastic_rounding
    ids = torch.randint(3, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        job.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        job.optimizer.step()
    moved = [float((a != b).double().mean()) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(0 < share < 0.9 for share in moved if share)
    assert sum(share > 0 for share in moved) > len(moved) / 2


def test_only_a_strip_is_ever_in_float32():
    p = nn.Parameter(torch.zeros(1200, 2000, dtype=torch.bfloat16))
    optimizer = GaLore([p], lr=1e-3, rank=4, stochastic_rounding=True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.grad = torch.zeros_like(p)
    with Tracker(samples=None) as tracker:
        tracker.register(nn.ParameterList([p]), optimizer)
        tracker.note()
        before = tracker.current_bytes()
        optimizer.step()
        more = tracker.ledger().peak_bytes() - before
    # The update in bfloat16, and of a strip of a million weights the number, the noise and their sum.
    assert more < p.nbytes + 4 * 4 * (1 << 20) < 3 * 4 * p.numel()
