import json

import pytest
import torch
from transformers import LlamaConfig

from pintpot.core.errors import BudgetError, CompositionError, ModelFolderError, PlanError, UnsupportedModel
from pintpot.core.expression import expression
from pintpot.core.ledger import Tier
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.units import parse_bytes
from pintpot.core.workload import Budget, Compress, Finetune, Generate
from pintpot.jobs.plan import plan, plan_from_file
from pintpot.ledger.machine import machine
from pintpot.planner.explain import plan_to_dict
from pintpot.planner.plan_file import read_plan, write_plan
from tests.architectures import tiny_config

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
WIDE = ModelShape.from_config(
    LlamaConfig(**SIZES, vocab_size=256, num_hidden_layers=2, max_position_embeddings=2048), torch.float32, name="wide"
)
LONG = Generate(batch=4, prompt_tokens=128, new_tokens=900)
"""Its cache is several times its weights."""
SEVENTY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def test_a_job_that_fits_is_left_as_it_is():
    made = plan(WIDE, LONG, "1GiB")
    assert made.techniques == ()
    assert made.fits
    assert made.risk == 0
    assert made.forecast.prefill_seconds > 0
    assert {r.technique for r in made.rejected} == set(techniques())
    assert "not needed" in next(r.reason for r in made.rejected if r.technique == "kivi")
    assert "does not serve generate" in next(r.reason for r in made.rejected if r.technique == "lora")


def test_below_the_plain_peak_techniques_make_it_fit():
    plain = plan(WIDE, LONG).predicted.peak_bytes()
    made = plan(WIDE, LONG, int(plain * 0.8))
    assert made.techniques
    assert made.fits
    assert made.predicted.peak_bytes() <= 0.8 * plain
    assert plan(WIDE, LONG, int(plain * 0.8)) == made
    other = plan(WIDE, LONG, int(plain * 0.8), exclude=[t.name for t in made.techniques], simulated=False)
    assert not {t.name for t in other.techniques} & {t.name for t in made.techniques}
    assert other.risk >= made.risk


def test_the_smallest_budget_in_the_error_is_enough():
    with pytest.raises(BudgetError) as caught:
        plan(WIDE, LONG, 1000, simulated=False)
    size = caught.value.hint.split("--device-memory ")[1].split(",")[0]
    made = plan(WIDE, LONG, size, simulated=False)
    assert made.fits
    assert expression(made.techniques) in caught.value.message
    with pytest.raises(BudgetError):
        plan(WIDE, LONG, int(parse_bytes(size) * 0.98), simulated=False)


def test_fine_tuning_within_less_than_full_training_needs():
    work = Finetune(batch=2, tokens=64, steps=5)
    full = plan(WIDE, work).predicted.peak_bytes()
    made = plan(WIDE, work, int(full * 0.7))
    assert made.fits
    assert {t.facts.slot for t in made.techniques} & {"optimizer", "adapters", "activations"}


def test_compressing_chooses_a_weights_technique():
    made = plan(WIDE, Compress())
    assert [t.facts.slot for t in made.techniques] == ["weights"]
    assert made.forecast is None


def test_what_cannot_be_pruned_is_not_offered_and_refused_when_asked_for():
    shape = ModelShape.from_config(tiny_config("gpt2"))
    rejected = {entry.technique: entry.reason for entry in plan(shape, Compress()).rejected}
    assert "no linear layer transformer.h.0" in rejected["loraprune"]
    with pytest.raises(UnsupportedModel, match="no linear layer"):
        plan(shape, Compress(), techniques="loraprune")
    assert plan(WIDE, Compress(), techniques="loraprune").predicted.peak_bytes() > WIDE.weight_bytes


def test_forced_techniques_are_used_whether_they_fit_or_not():
    made = plan(WIDE, LONG, 1000, techniques="kivi2*lagkv", simulated=False)
    assert expression(made.techniques) == "lagkv*kivi"
    assert not made.fits
    assert plan(WIDE, LONG, 1000, techniques="none").techniques == ()
    with pytest.raises(CompositionError, match="lora does not serve generate"):
        plan(WIDE, LONG, techniques="lora")
    with pytest.raises(CompositionError, match="rtn freezes the weights"):
        plan(WIDE, Finetune(), techniques="rtn4")
    with pytest.raises(CompositionError, match="no technique called"):
        plan(WIDE, LONG, exclude=["kiwi"])


def test_a_plan_file_is_predicted_again_after_an_edit(tmp_path):
    file = tmp_path / "plan.yaml"
    made = plan(WIDE, LONG, Budget(device=2**21, disk=2**40), techniques="lagkv*kivi", simulated=False, seed=3)
    write_plan(made, file)
    assert read_plan(file, WIDE) == made
    assert plan_from_file(file, WIDE) == made
    assert json.loads(json.dumps(plan_to_dict(made)))["seed"] == 3
    file.write_text(file.read_text().replace("lagkv*kivi", "kivi(bits=4)"))
    again = plan_from_file(file, WIDE)
    assert expression(again.techniques) == "kivi(bits=4)"
    assert again.predicted.moments
    assert again.predicted != made.predicted
    assert again.seed == 3
    with pytest.raises(PlanError, match="another model"):
        plan_from_file(file, ModelShape.from_config(tiny_config("qwen2")))


def test_a_configuration_alone_is_planned_in_seconds(tmp_path):
    """Prediction, choice and reasons for a model of 70 billion parameters, none of which exists here."""
    (tmp_path / "config.json").write_text(json.dumps(SEVENTY))
    work = Generate(batch=1, prompt_tokens=4096, new_tokens=256)
    rates = machine()
    fitting = plan(tmp_path / "config.json", work, "48GiB", machine=rates)
    assert fitting.fits
    assert fitting.predicted.peak_bytes() <= 48 * 2**30
    assert "weights" in {t.facts.slot for t in fitting.techniques}
    assert len(fitting.techniques) + len(fitting.rejected) >= len(techniques())
    assert fitting.predicted.peak_bytes(Tier.DISK) == 0


def test_a_wrong_model_is_refused(tmp_path):
    with pytest.raises(ModelFolderError):
        plan(tmp_path / "absent", LONG)
