"""Fine-tuning a model that is larger than the memory: loading, training, resuming and saving by blocks."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pintpot.core.errors import BudgetError
from pintpot.core.ledger import Tier
from pintpot.core.model_folder import open_model
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Budget, Finetune
from pintpot.jobs import plan, streamed
from pintpot.jobs.choose import Wish
from pintpot.jobs.finetune import FinetuneSettings, finetune
from pintpot.jobs.load import load
from pintpot.jobs.plan import pose
from pintpot.ledger.machine import machine
from tests.folders import texts, write_lines, write_model

BUDGET = 0.9
"""Of the weights' bytes."""
SETTINGS = FinetuneSettings(tokens=16, batch=1, steps=24, learning_rate=1e-3, checkpoint_every=2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts(20))


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(first, second) -> bool:
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def mezo(tmp_path_factory, llama, data):
    out = tmp_path_factory.mktemp("mezo") / "out"
    return finetune(llama, data, out, settings=SETTINGS, wish=Wish(techniques="mezo"), progress=False)


def test_a_model_larger_than_the_memory_is_fine_tuned_as_mezo_does(tmp_path, llama, data, mezo):
    size = ModelShape.from_folder(llama).weight_bytes
    wish = Wish(techniques="zo2", budget=Budget(device=int(BUDGET * size)))
    result = finetune(llama, data, tmp_path / "out", settings=SETTINGS, wish=wish, measure=True, progress=False)
    assert result.measured.peak_bytes() <= BUDGET * size
    for tier in (Tier.DEVICE, Tier.DISK):
        assert 0.97 <= result.plan.predicted.peak_bytes(tier) / result.measured.peak_bytes(tier) <= 1.05
    assert (result.loss_before, result.loss_after) == (mezo.loss_before, mezo.loss_after)
    assert same(tmp_path / "out", mezo.out)
    assert not (tmp_path / "out.partial").exists()
    assert not (tmp_path / "out" / "streamed").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2"])
def test_folders_are_loaded_and_saved_by_parameters(tmp_path, monkeypatch, name):
    source = write_model(tmp_path / name, name, dtype=torch.bfloat16, shard_size="100KB")
    model, store = streamed.load_streamed(source, torch.float32, tmp_path / "place")
    held = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.numel() > 1)
    assert held < 0.5 * ModelShape.from_folder(source, torch.float32).weight_bytes
    monkeypatch.setattr(streamed, "SHARD_BYTES", 100_000)
    out = tmp_path / "out"
    out.mkdir()
    streamed.save_streamed(model, store, source, out)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert open_model(out).dtype == torch.bfloat16
    first, second = AutoModelForCausalLM.from_pretrained(source), AutoModelForCausalLM.from_pretrained(out)
    assert first.dtype == second.dtype == torch.bfloat16
    pairs = zip(first.named_parameters(), second.parameters(), strict=True)
    assert [n for (n, p), q in pairs if not torch.equal(p, q)] == []
    assert load(out).config.architectures == first.config.architectures


RUN = """
import sys
import torch
torch.set_num_threads(1)
from pintpot.jobs.choose import Wish
from pintpot.jobs.finetune import FinetuneSettings, finetune
settings = FinetuneSettings(tokens=16, batch=1, steps=24, learning_rate=1e-3, checkpoint_every=2)
finetune(*sys.argv[1:], settings=settings, wish=Wish(techniques="zo2"), progress=False)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path, llama, data, mezo):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", RUN, llama, data, out], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list(partial.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(60)
    assert not out.exists()
    assert (partial / "streamed").is_dir()
    finetune(llama, data, out, settings=SETTINGS, wish=Wish(techniques="zo2"), progress=False)
    assert same(out, mezo.out)
    assert not partial.exists()


def test_the_planner_streams_when_the_weights_do_not_fit(llama):
    shape = ModelShape.from_folder(llama)
    problem = pose(
        shape, Finetune(batch=1, tokens=16, steps=4), Budget(device=int(BUDGET * shape.weight_bytes)), machine()
    )
    kinds = {name: techniques()[name] for name in ("galore", "gradient-release", "mezo", "zo2")}
    streamed_plan = plan.choose(problem, kinds)
    assert [t.name for t in streamed_plan.techniques] == ["zo2"]
    assert plan.forced(problem, "mezo").forecast.step_seconds < streamed_plan.forecast.step_seconds
    assert 0 < streamed_plan.predicted.peak_bytes(Tier.DISK) < shape.weight_bytes


def test_too_small_a_disk_is_refused_before_anything_is_written(tmp_path, llama, data):
    wish = Wish(techniques="zo2", budget=Budget(disk=int(4.5 * ModelShape.from_folder(llama).weight_bytes)))
    with pytest.raises(BudgetError, match="disk"):
        finetune(llama, data, tmp_path / "out", settings=SETTINGS, wish=wish, progress=False)
    assert list(tmp_path.iterdir()) == []
