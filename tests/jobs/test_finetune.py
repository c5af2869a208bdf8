"""Fine-tuning end to end: what comes out, resuming, and refusals before anything is written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from pintpot.core.errors import BudgetError, CompositionError, DataError, OutputExists, PlanError
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Budget
from pintpot.jobs.choose import Wish
from pintpot.jobs.finetune import FinetuneSettings, finetune
from pintpot.planner.plan_file import read_plan
from tests.folders import same_weights, texts, weights, write_lines, write_model

SETTINGS = FinetuneSettings(tokens=32, batch=2, steps=12, learning_rate=1e-2, validation_fraction=0.2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts(40))


def test_full_fine_tuning_learns_and_transformers_loads_the_result(tmp_path, llama, data):
    out = tmp_path / "out"
    result = finetune(llama, data, out, settings=SETTINGS, measure=True, progress=False)
    assert result.loss_after < 0.8 * result.loss_before
    model = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out).decode(AutoTokenizer.from_pretrained(out)("ab")["input_ids"]) == "ab"
    assert not same_weights(out, llama)
    assert model.dtype == torch.float32
    assert read_plan(out / "plan.yaml").workload.steps == 12
    ledgers = json.loads((out / "ledger.json").read_text())
    assert ledgers["measured"]["moments"]
    assert ledgers["predicted"]["moments"]
    assert len(json.loads((out / "training.json").read_text())["curve"]) == 12
    assert not (out / "checkpoints").exists()
    assert not (tmp_path / "out.partial").exists()


def test_predicted_peak_is_the_measured_one(tmp_path, llama, data):
    result = finetune(llama, data, tmp_path / "out", settings=SETTINGS, measure=True, progress=False)
    assert 0.97 <= result.plan.predicted.peak_bytes() / result.measured.peak_bytes() <= 1.05


@pytest.mark.parametrize("base", ["lora(rank=4)", "rtn(bits=8, group_size=32)*lora(rank=4)"])
def test_adapters_become_a_peft_folder(tmp_path, llama, data, base):
    out = tmp_path / "out"
    result = finetune(llama, data, out, settings=SETTINGS, wish=Wish(techniques=base), progress=False)
    assert result.loss_after < result.loss_before
    plain = AutoModelForCausalLM.from_pretrained(llama)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), out)
    ids = torch.arange(1, 20)[None]
    assert not torch.equal(adapted(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert (out / "adapter_model.safetensors").stat().st_size < (llama / "model.safetensors").stat().st_size


def test_merged_adapters_become_a_whole_model(tmp_path, llama, data):
    wish = Wish(techniques="lora(rank=4)")
    settings = FinetuneSettings(**{**vars(SETTINGS), "merge": True})
    finetune(llama, data, tmp_path / "whole", settings=settings, wish=wish, progress=False)
    finetune(llama, data, tmp_path / "adapter", settings=SETTINGS, wish=wish, progress=False)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(whole(input_ids=ids).logits, adapted(input_ids=ids).logits)


TRAINING = [
    "galore(rank=8)",
    "fira(rank=8)",
    "apollo(rank=8)",
    "apollo-mini",
    "sublinear-checkpointing",
    "lisa(active_blocks=1, interval_steps=4)",
    "adamw-8bit",
    "gradient-release",
    "apollo(rank=8)*adamw-4bit*gradient-release*sublinear-checkpointing",
]


@pytest.mark.parametrize("expression", TRAINING)
def test_techniques_of_training_learn_within_their_prediction(tmp_path, llama, data, expression):
    wish = Wish(techniques=expression)
    result = finetune(llama, data, tmp_path / "out", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert result.loss_after < 0.9 * result.loss_before
    assert 0.97 <= result.plan.predicted.peak_bytes() / result.measured.peak_bytes() <= 1.05


def test_released_gradients_are_not_accumulated(tmp_path, llama, data):
    settings = FinetuneSettings(**{**vars(SETTINGS), "accumulate": 2})
    with pytest.raises(CompositionError, match="accumulated"):
        finetune(llama, data, tmp_path / "out", settings=settings, wish=Wish(techniques="gradient-release"))
    assert list(tmp_path.iterdir()) == []


def test_checkpointing_changes_memory_and_nothing_else(tmp_path, llama, data):
    plain = finetune(llama, data, tmp_path / "a", settings=SETTINGS, measure=True, progress=False)
    wish = Wish(techniques="sublinear-checkpointing")
    less = finetune(llama, data, tmp_path / "b", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert less.measured.peak_of("activations") < plain.measured.peak_of("activations")


def test_a_budget_is_kept(tmp_path, llama, data):
    plain = finetune(llama, data, tmp_path / "plain", settings=SETTINGS, measure=True, progress=False)
    limit = int(0.8 * plain.measured.peak_bytes())
    wish = Wish(budget=Budget(device=limit))
    fitted = finetune(llama, data, tmp_path / "out", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert fitted.plan.techniques
    assert fitted.measured.peak_bytes() <= limit
    assert fitted.loss_after < fitted.loss_before


def test_every_weight_is_trained_where_the_states_of_adamw_do_not_fit(tmp_path, data):
    wide = write_model(tmp_path / "wide", intermediate_size=512)
    limit = 3 * ModelShape.from_folder(wide).weight_bytes  # the weights and AdamW's states, and nothing else
    settings = FinetuneSettings(**{**vars(SETTINGS), "tokens": 16})
    wish = Wish(budget=Budget(device=limit), exclude=("lora",))
    result = finetune(wide, data, tmp_path / "out", settings=settings, wish=wish, measure=True, progress=False)
    assert result.plan.in_slot("optimizer")
    assert result.measured.peak_bytes() <= limit
    assert result.measured.peak_of("optimizer") < limit / 3
    assert result.loss_after < result.loss_before
    before, after = weights(wide), weights(tmp_path / "out")
    assert before.keys() == after.keys()


RUN = """
import sys
import torch
torch.set_num_threads(1)
from pintpot.jobs.choose import Wish
from pintpot.jobs.finetune import FinetuneSettings, finetune
settings = FinetuneSettings(tokens=32, batch=2, steps=60, learning_rate=1e-3, checkpoint_every=5)
finetune(sys.argv[1], sys.argv[2], sys.argv[3], settings=settings, wish=Wish(techniques=sys.argv[4]), progress=False)
"""


def start(llama, data, out, techniques):
    return subprocess.Popen([sys.executable, "-c", RUN, llama, data, out, techniques], stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("number", "techniques"),
    [
        (signal.SIGKILL, "lora(rank=4)"),
        (signal.SIGTERM, "lora(rank=4)"),
        (signal.SIGKILL, "galore(rank=8, update_gap=20)*adamw-8bit"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, llama, data, number, techniques):
    settings = FinetuneSettings(tokens=32, batch=2, steps=60, learning_rate=1e-3, checkpoint_every=5)
    wish = Wish(techniques=techniques)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = start(llama, data, out, techniques)
    deadline = time.monotonic() + 200
    while not list(partial.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.wait(60)
    assert partial.is_dir()
    assert not out.exists()
    resumed = finetune(llama, data, out, settings=settings, wish=wish, progress=False)
    straight = finetune(llama, data, tmp_path / "straight", settings=settings, wish=wish, progress=False)
    assert [row["loss"] for row in resumed.training.curve] == [row["loss"] for row in straight.training.curve]
    assert same_weights(out, tmp_path / "straight")
    assert not partial.exists()


def test_refusals_leave_nothing(tmp_path, llama, data):
    out = tmp_path / "out"
    empty = tmp_path / "empty.txt"
    empty.touch()
    big = FinetuneSettings(tokens=32, batch=2, steps=3, merge=True)
    cases = [
        (DataError, {"data": empty}),
        (DataError, {"data": tmp_path / "nothing"}),
        (BudgetError, {"wish": Wish(budget=Budget(device=1000))}),
        (BudgetError, {"wish": Wish(budget=Budget(disk=1000), techniques="none")}),
        (CompositionError, {"wish": Wish(techniques="lagkv")}),
        (CompositionError, {"wish": Wish(techniques="galore*lora")}),
        (CompositionError, {"settings": big}),
        (PlanError, {"wish": Wish(dtype="float8")}),
    ]
    for error, changes in cases:
        arguments = {"data": data, "settings": SETTINGS, **changes}
        with pytest.raises(error) as caught:
            finetune(llama, arguments.pop("data"), out, progress=False, **arguments)
        assert caught.value.hint, changes
        assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt"], changes


def test_an_existing_output_is_refused_and_kept(tmp_path, llama, data):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(OutputExists):
        finetune(llama, data, out, settings=SETTINGS, progress=False)
    assert [f.name for f in out.iterdir()] == ["mine"]
