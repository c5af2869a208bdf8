"""Kernel choices in the generate job: applied after loading, with the bytes that were predicted."""

import pytest
import torch

from pintpot import reference
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.workload import Generate
from pintpot.jobs.assemble import assemble
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.compress import compress
from pintpot.jobs.generate import generate
from pintpot.jobs.generator import GenerateSettings
from pintpot.jobs.measure_run import measure_run
from pintpot.weights.formats import BitPlanes
from tests.folders import write_model

WORKLOAD = Generate(prompt_tokens=48, new_tokens=6)
KERNELS = ("t-mac", "lut-tensor-core", "sail", "row-tiles")


def formats_of(model):
    return {type(m.formats[0]) for m in model.modules() if hasattr(m, "formats")}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_model(root / "dense")
    compress(root / "dense", root / "packed", techniques="rtn(bits=3, group_size=32)")
    return root


def same_bytes(plan, measured):
    assert plan.predicted.peak_of(Account.WEIGHTS) == measured.peak_of(Account.WEIGHTS)
    for phase in ("prefill", "decode"):
        assert plan.predicted.phase(phase).total() == pytest.approx(measured.phase(phase).total(), rel=0.03)
    assert measured.phase("load").total() <= 1.05 * plan.predicted.phase("load").total()


def test_the_embedded_model_takes_the_bytes_that_were_predicted():
    settings = GenerateSettings(new_tokens=4, stop_at_end=False)
    wish = Wish(techniques="rtn(bits=4)*t-mac*kivi4")
    done = generate(reference.path(), "Once upon a time", settings=settings, wish=wish, measure=True)
    assert [t.name for t in done.plan.techniques] == ["rtn", "t-mac", "kivi"]
    assert len(done.completions[0].tokens) == 4
    same_bytes(done.plan, done.measured)


def test_a_compressed_folder_is_read_by_another_kernel(compressed):
    plan = choose(compressed / "packed", WORKLOAD, Wish(techniques="t-mac"))
    same_bytes(plan, measure_run(plan))
    live = assemble(compressed / "packed", plan)
    assert formats_of(live.model) == {BitPlanes}
    plain = choose(compressed / "packed", WORKLOAD, Wish(techniques="none"))
    assert plan.forecast.decode_seconds <= plain.forecast.decode_seconds
    with torch.no_grad():
        assert torch.isfinite(live.model(input_ids=torch.arange(1, 5)[None]).logits).all()


@pytest.mark.parametrize("name", KERNELS)
def test_a_dense_model_is_refused_before_it_is_loaded(compressed, name):
    with pytest.raises(CompositionError, match="no packed weights"):
        choose(compressed / "dense", WORKLOAD, Wish(techniques=name))
    with pytest.raises(CompositionError, match="kernel part"):
        choose(compressed / "dense", WORKLOAD, Wish(techniques=f"rtn4*{name}*{name}"))


def test_the_planner_knows_it_and_says_why_not(compressed):
    plan = choose(compressed / "dense", WORKLOAD, Wish(budget="1GiB"))
    reasons = {r.technique: r.reason for r in plan.rejected}
    assert not plan.techniques
    assert "no packed weights" in reasons["t-mac"]
    assert "t-mac" in {r.technique for r in choose(compressed / "packed", WORKLOAD, Wish(budget="1GiB")).rejected}


def test_what_needs_dense_weights_is_refused_for_a_compressed_folder(compressed):
    with pytest.raises(CompositionError, match="pychop needs dense weights"):
        choose(compressed / "packed", WORKLOAD, Wish(techniques="pychop"))
