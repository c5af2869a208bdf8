"""The one place where techniques meet: places, refusals, and simulation that agrees with the run."""

from itertools import combinations

import pytest
import torch

from pintpot.cache._base import CacheTechnique
from pintpot.cache.calibration import Calibrated
from pintpot.core.errors import CompositionError
from pintpot.core.expression import parse
from pintpot.core.ledger import Account
from pintpot.core.plan import ModelIdentity, Plan
from pintpot.core.registry import get, techniques
from pintpot.core.shape import ModelShape
from pintpot.core.slots import conflict
from pintpot.core.workload import Budget, Finetune, Generate
from pintpot.jobs.assemble import Composition, assemble
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.compress import compress
from pintpot.jobs.measure_run import measure_run
from pintpot.jobs.simulate import simulate
from pintpot.planner.options import check as check_complete
from tests.folders import write_model

GENERATE = Generate(prompt_tokens=160, new_tokens=6)
FINETUNE = Finetune(batch=2, tokens=64, steps=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in ("llama", "gemma3", "gpt2")}


def plan_of(folder, workload, expression) -> Plan:
    shape = ModelShape.from_folder(folder)
    chosen = parse(expression) if expression else ()
    identity = ModelIdentity(str(folder), shape.fingerprint, "float32")
    return Plan(
        model=identity,
        workload=workload,
        budget=Budget(),
        techniques=chosen,
        predicted=simulate(shape, workload, chosen),
    )


def test_techniques_go_to_their_places():
    made = Composition.of(parse("rtn4*lagkv*kivi2"), "generate")
    assert (made.weights.name, made.keep.name, made.store.name) == ("rtn", "lagkv", "kivi")
    assert made.optimizer is made.adapters is made.activations is None


@pytest.mark.parametrize(
    ("expression", "job"),
    [("galore*apollo", "finetune"), ("galore*lora", "finetune"), ("kivi", "finetune"), ("lora", "generate")],
)
def test_what_cannot_stand_together_is_refused(expression, job):
    with pytest.raises(CompositionError):
        Composition.of(parse(expression), job)


def test_packed_weights_alone_cannot_be_trained(folders):
    with pytest.raises(CompositionError, match="adapters"):
        simulate(ModelShape.from_folder(folders["llama"]), FINETUNE, parse("rtn4"))


EVERYWHERE = [(GENERATE, "rtn4*lagkv*kivi2"), (FINETUNE, "rtn4*lora*sublinear-checkpointing")]
CASES = [
    *(("llama", GENERATE, e) for e in ("", "rtn4", "kivi2", "lagkv")),
    *(("llama", FINETUNE, e) for e in ("", "lora", "galore(rank=8)", "apollo-mini", "sublinear-checkpointing")),
    *((name, workload, e) for name in ("llama", "gemma3", "gpt2") for workload, e in EVERYWHERE),
]


@pytest.mark.parametrize(("name", "workload", "expression"), CASES, ids=[f"{n}-{w.job}-{e}" for n, w, e in CASES])
def test_the_simulated_peak_is_the_measured_one(folders, name, workload, expression):
    plan = plan_of(folders[name], workload, expression.replace("rtn4", "rtn(bits=4, group_size=32)"))
    measured = measure_run(plan)
    phases = [p for p in measured.phases() if p in plan.predicted.phases() and p != "load"]
    assert len(phases) >= 2
    predicted_peak = max(plan.predicted.phase(p).total() for p in phases)
    measured_peak = max(measured.phase(p).total() for p in phases)
    assert 0.97 <= predicted_peak / measured_peak <= 1.05
    for account in (Account.WEIGHTS, Account.OPTIMIZER):
        if measured.peak_of(account):
            assert plan.predicted.peak_of(account) == pytest.approx(measured.peak_of(account), rel=0.02), account
    assert measured.phase("load").total() <= 1.05 * plan.predicted.phase("load").total()


@pytest.mark.parametrize("workload", [GENERATE, FINETUNE], ids=["generate", "finetune"])
def test_every_pair_runs_or_is_refused(folders, workload):
    """On the whole registry: what the rule allows must run, what it forbids must be refused.

    Parts of a cache meet one another in the contract tests of their wing, with calibrations where they need them. All
    weights methods leave packed layers of one kind behind, so that one of them stands for all.
    """
    shape = ModelShape.from_folder(folders["llama"])
    kinds = [kind for kind in techniques().values() if workload.job in kind.facts.jobs]
    layers = shape.config.num_hidden_layers
    serving = [kind() for kind in kinds if not issubclass(kind, Calibrated)]
    serving = [t for t in serving if not isinstance(t, CacheTechnique) or t.acts_on(layers)]
    serving = [t for t in serving if t.facts.slot != "weights" or t.name == "rtn"]
    assert len(serving) > 2
    for pair in combinations(serving, 2):
        if {technique.facts.slot for technique in pair} == {"cache"} and not conflict(*pair):
            continue
        try:
            check_complete(pair, workload)
        except CompositionError:
            with pytest.raises(CompositionError):
                simulate(shape, workload, pair)
            continue
        assert not conflict(*pair)
        live = assemble(folders["llama"], plan_of(folders["llama"], workload, "*".join(map(str, pair))))
        ids = torch.arange(1, 33)[None]
        with live.scope(), torch.no_grad():
            logits = live.model(input_ids=ids).logits
        assert torch.isfinite(logits).all(), pair


def test_a_calibrated_method_is_applied_while_loading(folders):
    live = assemble(folders["llama"], plan_of(folders["llama"], GENERATE, "gptq(group_size=32)*kivi4"))
    assert type(live.model.model.layers[0].mlp.up_proj).__name__ == "CompressedLinear"
    with live.scope(), torch.no_grad():
        assert torch.isfinite(live.model(input_ids=torch.arange(1, 33)[None]).logits).all()


def test_methods_of_one_slot_are_refused_together_whatever_the_model(folders):
    shape = ModelShape.from_folder(folders["llama"])
    with pytest.raises(CompositionError, match="both fill the weights slot"):
        simulate(shape, GENERATE, (get("quamba")(), get("rtn")()))


def test_a_compressed_folder_is_known_for_what_it_is(tmp_path, folders):
    folder = tmp_path / "packed"
    compress(folders["llama"], folder, techniques="rtn(bits=4, group_size=32)")
    plan = choose(folder, GENERATE, Wish(techniques="none"))
    measured = measure_run(plan)
    assert plan.predicted.peak_bytes() == pytest.approx(measured.peak_bytes(), rel=0.03)
    assert plan.predicted.peak_of(Account.WEIGHTS) < 0.6 * ModelShape.from_folder(folders["llama"]).weight_bytes
    adapted = choose(folder, FINETUNE, Wish(techniques="lora"))
    assert measure_run(adapted).peak_bytes() == pytest.approx(adapted.predicted.peak_bytes(), rel=0.03)
    for workload, techniques_ in ((FINETUNE, "none"), (GENERATE, "rtn4")):
        with pytest.raises(CompositionError, match=r"packed|already"):
            choose(folder, workload, Wish(techniques=techniques_))
