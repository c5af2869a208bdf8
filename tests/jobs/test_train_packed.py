"""Compressing by training, as a user runs it: stopped, resumed, loaded and smaller."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pintpot import reference
from pintpot.core.errors import CompositionError
from pintpot.core.model_folder import open_model
from pintpot.jobs.calibration_texts import CalibrationSettings
from pintpot.jobs.compress import compress
from pintpot.jobs.text import TextSettings

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


def test_a_trained_method_takes_no_size(tmp_path: Path, data):
    with pytest.raises(CompositionError, match="one size"):
        compress(reference.path(), tmp_path / "out", techniques="denseshift", calibration=data, size="1MiB")
