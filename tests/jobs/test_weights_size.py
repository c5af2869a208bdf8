"""One folder of ranked terms, generated from in the size that is asked for, or that fits."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pintpot.cli.app import app
from pintpot.core.errors import BudgetError, CompositionError, PlanError
from pintpot.core.ledger import Account
from pintpot.core.model_folder import open_model
from pintpot.core.workload import Budget, Generate
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.generate import generate
from pintpot.jobs.generator import GenerateSettings
from pintpot.jobs.load import load
from pintpot.planner.explain import headline
from pintpot.planner.plan_file import read_plan, write_plan
from pintpot.weights import compress_folder
from pintpot.weights.bitstack import BitStack
from tests.folders import write_model

PROMPT = "The quick brown fox jumps over the lazy dog."
SETTINGS = GenerateSettings(new_tokens=4, stop_at_end=False)
WORK = Generate(batch=1, prompt_tokens=8, new_tokens=2)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def packed(dense) -> Path:
    texts = [torch.randint(1, 257, (2, 32), generator=torch.Generator().manual_seed(0))]
    compress_folder(dense, dense.parent / "packed", BitStack(blocks=3, rank=4), texts=texts)
    return dense.parent / "packed"


@pytest.fixture(scope="module")
def whole(packed):
    return generate(packed, PROMPT, settings=SETTINGS, wish=Wish(techniques="none"), measure=True)


def held(model) -> int:
    return sum(t.nbytes for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())


def test_a_size_is_what_is_loaded_and_what_was_foreseen(packed, whole):
    full = open_model(packed).weight_bytes
    for size in (full - 1, int(0.95 * full)):
        done = generate(
            packed, PROMPT, settings=SETTINGS, wish=Wish(weights_size=size, techniques="none"), measure=True
        )
        predicted, measured = done.plan.predicted, done.measured
        assert predicted.peak_of(Account.WEIGHTS) == measured.peak_of(Account.WEIGHTS) < full
        assert predicted.peak_bytes() == pytest.approx(measured.peak_bytes(), rel=0.03)
        assert done.plan.model.size_bytes == size
        assert held(load(packed, size_bytes=size)) <= size
    assert whole.measured.peak_of(Account.WEIGHTS) > measured.peak_of(Account.WEIGHTS)


def test_a_budget_is_met_by_the_largest_part_that_fits(packed, whole):
    peak = whole.measured.peak_bytes()
    limit = peak - 5000
    done = generate(packed, PROMPT, settings=SETTINGS, wish=Wish(budget=Budget(device=limit), techniques="none"))
    size = done.plan.model.size_bytes
    assert done.plan.fits
    assert done.plan.predicted.peak_bytes() <= limit
    larger = choose(packed, done.plan.workload, Wish(weights_size=size + 8000, techniques="none"))
    assert larger.predicted.peak_bytes() > limit
    enough = choose(packed, WORK, Wish(budget=Budget(device=2 * peak), techniques="none"))
    assert enough.model.size_bytes is None
    with pytest.raises(BudgetError, match="first terms"):
        choose(packed, WORK, Wish(budget=Budget(device=20_000), techniques="none"))


def test_where_no_technique_makes_the_whole_fit_a_part_is_taken(packed):
    limit = choose(packed, WORK, Wish(techniques="none")).predicted.peak_bytes() - 12_000
    plan = choose(packed, WORK, Wish(budget=Budget(device=limit)))
    assert plan.fits
    assert plan.model.size_bytes < open_model(packed).weight_bytes
    assert "of its weights" in headline(plan)


def test_the_plan_keeps_the_size(packed, tmp_path: Path):
    size = open_model(packed).weight_bytes - 3000
    plan = choose(packed, WORK, Wish(weights_size=size, techniques="none"))
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    done = generate(packed, PROMPT, settings=SETTINGS, wish=Wish(plan=tmp_path / "plan.yaml"), measure=True)
    assert done.measured.peak_of(Account.WEIGHTS) == plan.predicted.peak_of(Account.WEIGHTS)
    assert done.plan.model.size_bytes == size
    text = (tmp_path / "plan.yaml").read_text()
    (tmp_path / "plan.yaml").write_text(text.replace(f"size_bytes: {size}", f"size_bytes: {size - 4000}"))
    edited = choose(packed, WORK, Wish(plan=tmp_path / "plan.yaml"))
    assert edited.predicted.peak_of(Account.WEIGHTS) < plan.predicted.peak_of(Account.WEIGHTS)
    with pytest.raises(PlanError, match="says itself"):
        choose(packed, WORK, Wish(plan=plan, weights_size=size))


def test_only_ranked_folders_come_in_sizes(dense, packed):
    with pytest.raises(CompositionError, match="one size only"):
        choose(dense, WORK, Wish(weights_size="1MiB"))
    with pytest.raises(BudgetError, match="first terms"):
        choose(packed, WORK, Wish(weights_size=1000))


def test_the_command_takes_a_size(packed):
    size = open_model(packed).weight_bytes - 3000
    arguments = ["generate", str(packed), "--prompt", PROMPT, "-n", "3", "--weights-size", str(size), "--json"]
    arguments += ["--techniques", "none"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["completions"]
