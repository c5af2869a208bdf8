"""Compressing by training, as a user runs it: stopped, resumed, loaded and smaller."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from pintpot import reference
from pintpot.core.errors import CompositionError, UnsupportedModel
from pintpot.core.model_folder import open_model
from pintpot.jobs.calibration_texts import CalibrationSettings
from pintpot.jobs.compress import compress
from pintpot.jobs.text import TextSettings
from pintpot.weights.loraprune import Units
from tests.folders import same_weights, write_model

SETTINGS = TextSettings(tokens=32, batch=2, steps=4, learning_rate=1e-3)


@pytest.fixture
def data(tmp_path: Path) -> CalibrationSettings:
    file = tmp_path / "text.txt"
    file.write_text("def double(number):\n    return 2 * number\n\n" * 200)
    return CalibrationSettings(data=file)


def test_what_was_trained_is_packed_and_loads_in_the_dtype_of_the_source(tmp_path: Path, data):
    done = compress(reference.path(), tmp_path / "out", techniques="denseshift", calibration=data, training=SETTINGS)
    assert done.training.loss_after < done.training.loss_before
    source, packed = open_model(reference.path()), open_model(tmp_path / "out")
    assert packed.weight_bytes == done.output_bytes < 0.6 * source.weight_bytes
    assert packed.entries["model.embed_tokens.weight"].dtype is source.dtype
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "CompressedLinear"
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()
    assert not list((tmp_path / "out").glob("checkpoints*"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["denseshift", "loraprune"])
def test_a_trained_method_takes_no_size(name, tmp_path: Path, data):
    with pytest.raises(CompositionError, match="one size"):
        compress(reference.path(), tmp_path / "out", techniques=name, calibration=data, size="1MiB")


def test_pruning_writes_an_ordinary_smaller_model(tmp_path: Path, llama, data):
    settings = TextSettings(tokens=32, batch=2, steps=30, learning_rate=1e-2)
    done = compress(llama, tmp_path / "out", techniques="loraprune(every=2)", calibration=data, training=settings)
    model, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert model.config.intermediate_size == 64
    assert model.dtype is torch.bfloat16
    assert done.training.loss_after < done.training.loss_source
    assert done.source_bytes - done.output_bytes == done.report.dense_bytes - done.report.packed_bytes
    assert len(done.report.compressed) == 7 * model.config.num_hidden_layers
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["technique"] == "loraprune"
    assert record["held_out_loss_trained"] == done.training.loss_after
    assert len(record["curve"]) == 30
    assert not list((tmp_path / "out").glob("checkpoints*"))


def test_gradients_are_seen_once_an_update_when_they_are_complete(tmp_path: Path, llama, data, monkeypatch):
    told = []
    observe_, follow_ = Units.observe_, Units.follow_

    def observed(self):
        observe_(self)
        told.append(("gradients", int(self.updates)))

    def followed(self, progress):
        follow_(self, progress)
        told.append(("progress", progress))

    monkeypatch.setattr(Units, "observe_", observed)
    monkeypatch.setattr(Units, "follow_", followed)
    settings = TextSettings(tokens=32, batch=1, accumulate=2, steps=2)
    compress(llama, tmp_path / "out", techniques="loraprune", calibration=data, training=settings)
    assert list(dict.fromkeys(told)) == [("gradients", 1), ("progress", 0.5), ("gradients", 2), ("progress", 1.0)]


RUN = """
import sys
import torch
torch.set_num_threads(1)
from pintpot.jobs.calibration_texts import CalibrationSettings
from pintpot.jobs.compress import compress
from pintpot.jobs.text import TextSettings
model, out, data, technique = sys.argv[1:]
settings = TextSettings(tokens=32, batch=2, accumulate=2, steps=60, checkpoint_every=5)
compress(model, out, techniques=technique, calibration=CalibrationSettings(data=data), training=settings)
"""


@pytest.mark.parametrize("technique", ["loraprune(every=7)", "pams"])
def test_a_killed_run_resumes_bit_for_bit(technique, tmp_path: Path, llama, data):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", RUN, llama, out, data.data, technique], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 200
    while not list(partial.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.01)
    process.kill()
    process.wait(60)
    assert partial.is_dir()
    assert not out.exists()
    settings = TextSettings(tokens=32, batch=2, accumulate=2, steps=60, checkpoint_every=5)
    resumed, straight = (
        compress(llama, folder, techniques=technique, calibration=data, training=settings)
        for folder in (out, tmp_path / "straight")
    )
    curves = [[row["loss"] for row in done.training.training.curve] for done in (resumed, straight)]
    assert curves[0] == curves[1]
    assert same_weights(out, tmp_path / "straight")
    assert not partial.exists()


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path: Path, llama, data):
    compress(llama, tmp_path / "packed", techniques="rtn(group_size=32)")
    wrong = {
        "loraprune": (write_model(tmp_path / "gpt2", "gpt2"), r"no linear layer transformer.h.0.self_attn.q_proj"),
        "denseshift": (write_model(tmp_path / "mixtral", "mixtral"), "packed experts: model.layers.0"),
        "onebit": (tmp_path / "packed", "compressed already"),
    }
    for technique, (folder, reason) in wrong.items():
        with pytest.raises(UnsupportedModel, match=reason):
            compress(folder, tmp_path / "out", techniques=technique, calibration=data, training=SETTINGS)
    assert not list(tmp_path.glob("out*"))
