"""Tilus: grids are held in tiles while a model runs, with the same numbers, and offered for GPUs only."""

import pytest
import torch

from pintpot import reference
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.measure_run import measure_run
from pintpot.kernels import gpu
from pintpot.weights.formats import Grid, RegisterTiles, Scaled
from pintpot.weights.modules import PackedTerms
from pintpot.weights.rtn import RTN
from pintpot.weights.tilus import Tilus
from tests.architectures import tiny_config, tiny_model

IDS = torch.arange(12).view(2, 6) + 3


@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_computes_what_it_did(bits, architecture):
    plain, relaid = tiny_model(architecture), tiny_model(architecture)
    for model in (plain, relaid):
        RTN(bits=bits, group_size=64).quantize_model_(model)
    Tilus().apply_(relaid)
    holders = [module for module in relaid.modules() if isinstance(module, PackedTerms)]
    assert holders
    assert all(isinstance(m.formats[0], RegisterTiles) and "term0_packed" not in m._buffers for m in holders)
    with torch.no_grad():
        expected, found = (model(input_ids=IDS).logits for model in (plain, relaid))
    # The same weights; the compiled product of grids takes inputs in fixed point.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bytes_are_those_of_the_formula():
    assert RegisterTiles(bits=3, group_size=64).nbytes(64, 128) == Grid(bits=3, group_size=64).nbytes(64, 128)
    # 40 out-features and 20 in-features are padded to 48 and 32.
    assert RegisterTiles(bits=2, group_size=-1).nbytes(40, 20) == 2 * 3 * 64 + 40 * (2 + 1)


def test_groups_that_a_step_would_cut_are_left_as_they_are():
    assert Tilus().held(Grid(bits=4, group_size=32)) is None
    assert Tilus().held(Grid(bits=4, group_size=-1)) == RegisterTiles(bits=4, group_size=-1)
    layout = Scaled(inner=Grid(bits=5, group_size=64, symmetric=True))
    held = Tilus().held(layout)
    assert held == Scaled(inner=RegisterTiles(bits=5, group_size=64, symmetric=True))
    stored = layout.encode(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))
    made = Tilus().relaid(layout, stored, 64)
    assert torch.equal(held.decode(made, 64, torch.float32), layout.decode(stored, 64, torch.float32))


def test_it_is_offered_for_gpus_only():
    offered = list(Tilus.options(ModelShape.from_config(tiny_config("llama")), Generate()))
    assert offered == ([Tilus()] if gpu.ready() else [])


def test_the_embedded_model_takes_the_bytes_that_were_predicted():
    workload = Generate(prompt_tokens=32, new_tokens=4)
    plan = choose(reference.path(), workload, Wish(techniques="rtn(bits=3)*tilus"))
    measured = measure_run(plan)
    assert plan.predicted.peak_of(Account.WEIGHTS) == measured.peak_of(Account.WEIGHTS)
    for phase in ("prefill", "decode"):
        assert plan.predicted.phase(phase).total() == pytest.approx(measured.phase(phase).total(), rel=0.03)
