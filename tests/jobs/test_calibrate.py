"""Calibration as a user runs it: text in, a file out, refused for another model."""

import pytest
from transformers import AutoModelForCausalLM

import pintpot
from pintpot import reference
from pintpot.core.errors import CompositionError, DataError, OutputExists
from tests.architectures import tiny_config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def f(x):\n    return x + 1\n\n\n" * 200)
    return file


def test_a_file_is_written_and_used(tmp_path, text):
    out = tmp_path / "cskv.safetensors"
    done = pintpot.calibrate_file(reference.path(), "cskv", text, out, samples=2, sample_tokens=200)
    assert done.samples == 2
    assert done.tensor_bytes <= out.stat().st_size
    model = AutoModelForCausalLM.from_pretrained(reference.path())
    cache = pintpot.cache(model, str(done.technique), tokens=300)
    ids = pintpot.jobs.load.load_tokenizer(reference.path())("def f(x):" * 40, return_tensors="pt").input_ids
    model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.nbytes() > 0
    with pytest.raises(CompositionError, match="another model"):
        pintpot.cache(AutoModelForCausalLM.from_config(tiny_config("llama")), str(done.technique))
    with pytest.raises(CompositionError, match="was made for cskv"):
        pintpot.cache(model, str(done.technique).replace("cskv(", "cskv(key_density=0.5, "))
    with pytest.raises(OutputExists):
        pintpot.calibrate_file(reference.path(), "cskv", text, out)


def test_refusals(tmp_path, text):
    with pytest.raises(CompositionError, match="needs calibration"):
        pintpot.calibrate_file(reference.path(), "kivi", text, tmp_path / "x")
    model = AutoModelForCausalLM.from_pretrained(reference.path())
    with pytest.raises(CompositionError, match="calibrated") as caught:
        pintpot.cache(model, "cskv")
    assert "pintpot calibrate" in caught.value.hint
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not a file")
    with pytest.raises(DataError, match="calibration file"):
        pintpot.cache(model, f"cskv(calibration={bad})")
    assert not (tmp_path / "x").exists()
