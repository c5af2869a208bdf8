"""Training with weights that are sums of terms, from the command's side: predicted, resumed, and saved as usual."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot.core.expression import parse
from pintpot.core.ledger import Account
from pintpot.core.plan import ModelIdentity, Plan
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Budget, Pretrain
from pintpot.jobs.choose import Wish
from pintpot.jobs.finetune import FinetuneSettings, finetune
from pintpot.jobs.measure_run import measure_run
from pintpot.jobs.pretrain import PretrainSettings, pretrain
from pintpot.jobs.simulate import simulate
from pintpot.ledger.predict import baseline
from pintpot.optim._parameterize import Parameterization
from tests.folders import texts, write_lines, write_model

NAMES = tuple(name for name, kind in techniques("optim").items() if issubclass(kind, Parameterization))
ALONE = [
    "sltrain(rank=16)",
    "lost(rank=16)",
    # What is done now and then is done after the last of the two steps, on top of all else.
    "sst(rank=32, interval_steps=2)",
    "relora(rank=16, restart_gap=2)",
    "gradnormlorp",
]
TOGETHER = ["sltrain(rank=16)*adamw-8bit*gradient-release", "lost(rank=16)*galore(rank=4)"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts(40))


@pytest.mark.parametrize("expression", ALONE + TOGETHER)
def test_predicted_simulated_and_measured_bytes_are_the_same(folders, expression):
    name = "gpt2" if "lost" in expression or "sst" in expression else "llama"
    shape = ModelShape.from_folder(folders[name])
    chosen, workload = parse(expression), Pretrain(batch=2, tokens=64, steps=2)
    simulated = simulate(shape, workload, chosen)
    identity = ModelIdentity(str(folders[name]), shape.fingerprint, "float32")
    measured = measure_run(
        Plan(model=identity, workload=workload, budget=Budget(), techniques=chosen, predicted=simulated)
    )
    assert measured.phase("load").total() <= simulated.phase("load").total()
    for account in (Account.WEIGHTS, Account.GRADIENTS, Account.OPTIMIZER):
        assert simulated.peak_of(account) == pytest.approx(measured.peak_of(account), rel=1e-3), account
    for phase in ("forward", "backward", "step"):
        assert simulated.phase(phase).total() == pytest.approx(measured.phase(phase).total(), rel=2e-3), phase
    if len(chosen) == 1:
        predicted = chosen[0].predict(baseline(shape, workload), shape, workload)
        for phase in ("forward", "backward"):
            assert predicted.phase(phase).total() == pytest.approx(measured.phase(phase).total(), rel=0.01), phase
        assert predicted.phase("step").total() == pytest.approx(measured.phase("step").total(), rel=0.2)
        for account in (Account.WEIGHTS, Account.OPTIMIZER):
            assert predicted.peak_of(account) == pytest.approx(measured.peak_of(account), rel=1e-3), account


def shapes_of(model) -> dict:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_fine_tuning_ends_with_a_model_that_transformers_loads(tmp_path, folders, data):
    settings = FinetuneSettings(tokens=32, batch=2, steps=8, learning_rate=1e-2, validation_fraction=0.2)
    wish, out = Wish(techniques="gradnormlorp*adamw-8bit"), tmp_path / "out"
    result = finetune(folders["llama"], data, out, settings=settings, wish=wish, progress=False)
    assert result.loss_after < result.loss_before
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert shapes_of(AutoModelForCausalLM.from_pretrained(out)) == shapes_of(plain)


def test_pretraining_ends_with_a_model_that_transformers_loads(tmp_path, folders, data):
    settings = PretrainSettings(tokens=32, batch=2, steps=8, learning_rate=1e-2, validation_fraction=0.2)
    wish, out = Wish(techniques="sltrain(rank=16)*adamw-8bit"), tmp_path / "out"
    result = pretrain(folders["gpt2"], data, out, settings=settings, wish=wish, progress=False)
    assert result.loss_after < result.loss_before
    model = AutoModelForCausalLM.from_pretrained(out)
    assert shapes_of(model) == shapes_of(AutoModelForCausalLM.from_pretrained(folders["gpt2"]))
    # No more than the rank and the few entries can make.
    weight = model.transformer.h[0].mlp.c_fc.weight.float()
    assert (torch.linalg.svdvals(weight)[:16].square().sum() / weight.square().sum()) > 0.5


def test_what_forgets_the_weights_does_not_fine_tune():
    for name in NAMES:
        jobs = techniques("optim")[name].facts.jobs
        assert "pretrain" in jobs
        assert ("finetune" in jobs) == (name == "gradnormlorp")
