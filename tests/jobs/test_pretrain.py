"""Pretraining end to end: what comes out, tokenizers, resuming, budgets, and refusals before anything is written."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pintpot.core.errors import (
    BudgetError,
    CompositionError,
    DataError,
    Interrupted,
    ModelFolderError,
    OutputExists,
    PlanError,
    ShapeError,
    UnsupportedModel,
)
from pintpot.core.workload import Budget, Pretrain
from pintpot.jobs.choose import Wish, choose
from pintpot.jobs.measure_run import measure_run
from pintpot.jobs.pretrain import PretrainSettings, pretrain
from pintpot.optim import GaLoreRule, MezoRule, OptimMethod
from pintpot.planner.plan_file import read_plan, write_plan
from tests.architectures import tiny_config
from tests.folders import byte_tokenizer, same_weights, texts, write_lines

SETTINGS = PretrainSettings(tokens=32, batch=2, steps=8, validation_fraction=0.2)


def write_config(folder, name="llama", **changes):
    """A folder with a configuration alone."""
    config = tiny_config(name)
    for key, value in {"vocab_size": 300, **changes}.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("configs") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts(40))


def test_a_configuration_and_text_become_a_model_that_has_learned(tmp_path, llama, data):
    out = tmp_path / "out"
    result = pretrain(llama, data, out, settings=SETTINGS, measure=True, progress=False)
    assert 5.5 < result.loss_before < 6.0  # the logarithm of 300, as of random weights
    assert result.loss_after < 0.9 * result.loss_before
    assert 0.97 <= result.plan.predicted.peak_bytes() / result.measured.peak_bytes() <= 1.05
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("a café\n")["input_ids"]) == "a café\n"
    assert model.config.eos_token_id == tokenizer.eos_token_id == model.generation_config.eos_token_id
    assert model.get_input_embeddings().padding_idx is None
    assert read_plan(out / "plan.yaml").workload == Pretrain(batch=2, tokens=32, steps=8)
    assert len(json.loads((out / "training.json").read_text())["curve"]) == 8
    assert json.loads((out / "ledger.json").read_text())["measured"]["moments"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_seed_decides_the_weights(tmp_path, llama, data):
    short = PretrainSettings(tokens=32, batch=2, steps=1)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(llama, data, tmp_path / name, settings=short, wish=Wish(seed=seed), progress=False)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert not same_weights(tmp_path / "a", tmp_path / "c")


def test_a_given_tokenizer_is_used_and_one_beside_the_configuration(tmp_path, llama, data):
    given = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(given)
    pretrain(llama, data, tmp_path / "a", tokenizer=given, settings=SETTINGS, progress=False)
    beside = write_config(tmp_path / "beside", eos_token_id=0, bos_token_id=0, pad_token_id=None)
    byte_tokenizer().save_pretrained(beside)
    pretrain(beside / "config.json", data, tmp_path / "b", settings=SETTINGS, progress=False)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == 257


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("gpt2", "galore(rank=8)*adamw-8bit*gradient-release"),
        ("qwen2", "apollo(rank=8)*sublinear-checkpointing*chunked-cross-entropy"),
    ],
)
def test_techniques_compose_for_any_architecture(tmp_path, data, name, expression):
    folder = write_config(tmp_path / "config", name, dtype=torch.bfloat16)
    wish = Wish(techniques=expression)
    result = pretrain(folder, data, tmp_path / "out", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert result.loss_after < result.loss_before
    assert 0.97 <= result.plan.predicted.peak_bytes() / result.measured.peak_bytes() <= 1.05
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_planner_keeps_a_budget_and_its_plan_can_be_run_again(tmp_path, llama, data):
    plain = choose(llama, Pretrain(batch=2, tokens=32, steps=8), Wish(techniques="none"))
    limit = int(0.8 * plain.predicted.peak_bytes())
    wish = Wish(budget=Budget(device=limit))
    fitted = pretrain(llama, data, tmp_path / "a", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert fitted.plan.techniques
    assert fitted.measured.peak_bytes() <= limit
    write_plan(fitted.plan, tmp_path / "plan.yaml")
    again = Wish(plan=tmp_path / "plan.yaml")
    pretrain(llama, data, tmp_path / "b", settings=SETTINGS, wish=again, progress=False)
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_control_c_leaves_a_run_that_resumes_bit_for_bit(tmp_path, llama, data):
    settings = PretrainSettings(tokens=32, batch=2, steps=40, checkpoint_every=10)
    wish = Wish(techniques="galore(rank=8, update_gap=10)*adamw-8bit")

    def press_control_c() -> None:
        while not list(tmp_path.glob("a.partial/checkpoints/step-*[0-9]")):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    presser = threading.Thread(target=press_control_c)
    presser.start()
    with pytest.raises(Interrupted, match="of 40"):
        pretrain(llama, data, tmp_path / "a", settings=settings, wish=wish, progress=False)
    presser.join()
    assert not (tmp_path / "a").exists()
    resumed = pretrain(llama, data, tmp_path / "a", settings=settings, wish=wish, progress=False)
    straight = pretrain(llama, data, tmp_path / "b", settings=settings, wish=wish, progress=False)
    assert [row["loss"] for row in resumed.training.curve] == [row["loss"] for row in straight.training.curve]
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_plan_is_measured_without_any_weights(llama):
    plan = choose(llama, Pretrain(batch=2, tokens=32, steps=2), Wish(techniques="galore(rank=8)"))
    measured = measure_run(plan, llama)
    assert 0.97 <= plan.predicted.peak_bytes() / measured.peak_bytes() <= 1.05


def test_the_usual_learning_rate_is_that_of_pretraining(tmp_path, llama, data):
    assert OptimMethod.learning_rate_of("pretrain") == pytest.approx(1e-3)
    assert OptimMethod.learning_rate_of("finetune") == 2e-4
    assert GaLoreRule.learning_rate_of("pretrain") == 1e-2
    assert MezoRule.learning_rate_of("finetune") == 1e-6
    result = pretrain(
        llama, data, tmp_path / "out", settings=SETTINGS, wish=Wish(techniques="galore(rank=8)"), progress=False
    )
    assert max(row["learning_rate"] for row in result.training.curve) == pytest.approx(1e-2)


def test_refusals_leave_nothing(tmp_path, llama, data, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    empty = other / "empty.txt"
    empty.touch()
    wrong = {
        "heads": {"num_attention_heads": 3},
        "teapot": {"model_type": "teapot"},
        "vit": {"model_type": "vit"},
        "bert": {"model_type": "bert"},
        "dtype": {"dtype": "nope"},
        "layers": {"num_hidden_layers": 0},
        "packed": {"quantization_config": {"quant_method": "pintpot"}},
        "few": {"vocab_size": 100},
        "own": {"vocab_size": 70},
    }
    for name, changes in wrong.items():
        (other / name).mkdir()
        entries = {**json.loads((llama / "config.json").read_text()), **changes}
        (other / name / "config.json").write_text(json.dumps(entries))
    byte_tokenizer().save_pretrained(other / "own")
    cases = [
        (ModelFolderError, {"config": other}),
        (ShapeError, {"config": other / "own"}),
        (ModelFolderError, {"config": other / "nowhere"}),
        (UnsupportedModel, {"config": other / "heads"}),
        (UnsupportedModel, {"config": other / "teapot"}),
        (UnsupportedModel, {"config": other / "vit"}),
        (UnsupportedModel, {"config": other / "bert"}),
        (UnsupportedModel, {"config": other / "dtype"}),
        (UnsupportedModel, {"config": other / "layers"}),
        (UnsupportedModel, {"config": other / "packed"}),
        (ShapeError, {"config": other / "few"}),
        (ModelFolderError, {"tokenizer": other}),
        (ShapeError, {"settings": PretrainSettings(tokens=1024, steps=1)}),
        (DataError, {"data": empty}),
        (DataError, {"data": other / "nothing"}),
        (BudgetError, {"wish": Wish(budget=Budget(device=1000), techniques="galore")}),
        (BudgetError, {"wish": Wish(budget=Budget(disk=1000), techniques="none")}),
        (CompositionError, {"wish": Wish(techniques="lora")}),
        (CompositionError, {"wish": Wish(techniques="mezo")}),
        (PlanError, {"wish": Wish(dtype="float8")}),
    ]
    for error, changes in cases:
        arguments = {"config": llama, "data": data, "out": tmp_path / "out", "settings": SETTINGS, **changes}
        with pytest.raises(error) as caught:
            pretrain(**arguments, progress=False)
        assert caught.value.hint, changes
        assert list(tmp_path.iterdir()) == [], changes
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OutputExists):
        pretrain(llama, data, tmp_path / "out", settings=SETTINGS, progress=False)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"accumulate": 0}, {"learning_rate": -1.0}, {"checkpoint_every": 0}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(ShapeError, match=next(iter(changes))):
        PretrainSettings(**changes)
