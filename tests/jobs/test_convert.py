"""Converting end to end: what comes out, resuming, and refusals before anything is written."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from pintpot.cli.app import app
from pintpot.core.errors import (
    CompositionError,
    DataError,
    Interrupted,
    OutputExists,
    ShapeError,
    UnsupportedModel,
)
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Generate
from pintpot.jobs.convert import ConvertSettings, convert
from pintpot.jobs.load import load
from pintpot.jobs.simulate import simulate
from tests.folders import same_weights, texts, write_lines, write_model

SIZES = {"tokens": 32, "batch": 2, "validation_fraction": 0.2, "samples": 4, "sample_tokens": 16}
CALIBRATE = ConvertSettings(**SIZES)
TRAIN = ConvertSettings(**SIZES, steps=20, learning_rate=3e-3, checkpoint_every=5)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("data") / "data.jsonl", texts(40))


def test_the_command_writes_a_folder_with_a_smaller_cache(tmp_path, qwen2, data):
    out = tmp_path / "out"
    options = ["--method", "transmla(rope_dim=8)", "--rank", "24", "--data", data, "--tokens", 32, "--samples", 4]
    done = CliRunner().invoke(app, [str(a) for a in ("convert", qwen2, out, *options, "--sample-tokens", 16, "--json")])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["technique"] == "transmla(rank=24, rope_dim=8)"
    # Two layers in bfloat16: a latent of 24 and a rotary key of 8 where two heads of 16 had keys and values.
    assert (record["source_cache_bytes"], record["cache_bytes"]) == (32 * 2 * 2 * 64, 32 * 2 * 2 * 32)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert "conversions" in (out / "README.md").read_text()
    assert json.loads((out / "conversion.json").read_text())["parameters"]["rank"] == 24
    # What was written is planned for and run like any other folder.
    workload = Generate(batch=1, prompt_tokens=20, new_tokens=4)
    ledger = simulate(ModelShape.from_folder(out), workload)
    assert ledger.phase("decode").of(Account.KV_CACHE) == 23 * 2 * 2 * 32
    written = CliRunner().invoke(app, ["generate", str(out), "-p", "abc", "-n", "3", "--techniques", "none", "--json"])
    assert written.exit_code == 0, written.output


@pytest.mark.parametrize("method", ["x-ecomla(rank=16, rope_dim=8)", "loma(memory_tokens=2, compression_ratio=4)"])
def test_training_brings_the_loss_down(tmp_path, qwen2, data, method):
    result = convert(qwen2, data, tmp_path / "out", method=method, settings=TRAIN, progress=False)
    assert result.training.steps == 20
    assert result.training.curve[-1]["loss"] < 0.8 * result.training.curve[0]["loss"]
    assert result.cache_bytes < result.source_cache_bytes
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert load(tmp_path / "out").config.source_type == "qwen2"


def test_a_stopped_run_resumes_bit_for_bit(tmp_path, qwen2, data):
    settings = ConvertSettings(**SIZES, steps=24, learning_rate=1e-3, checkpoint_every=4)
    method, out = "x-ecomla(rank=16, rope_dim=8)", tmp_path / "out"

    def stop():
        while not list((tmp_path / "out.partial").glob("checkpoints/step-*[0-9]")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=stop)
    watcher.start()
    with pytest.raises(Interrupted):
        convert(qwen2, data, out, method=method, settings=settings, progress=False)
    watcher.join()
    assert not out.exists()
    resumed = convert(qwen2, data, out, method=method, settings=settings, progress=False)
    straight = convert(qwen2, data, tmp_path / "straight", method=method, settings=settings, progress=False)
    assert [row["loss"] for row in resumed.training.curve] == [row["loss"] for row in straight.training.curve]
    assert same_weights(out, tmp_path / "straight")


def test_a_larger_teacher_must_have_the_same_vocabulary(tmp_path, qwen2, data):
    teacher = write_model(tmp_path / "teacher", "llama", hidden_size=96, head_dim=24)
    other = write_model(tmp_path / "other", "llama", vocab_size=300)
    method = "x-ecomla(rank=16, rope_dim=8)"
    short = ConvertSettings(**SIZES, steps=2, teacher=str(teacher))
    assert convert(qwen2, data, tmp_path / "out", method=method, settings=short, progress=False).training.steps == 2
    wrong = ConvertSettings(**SIZES, steps=2, teacher=str(other))
    with pytest.raises(ShapeError, match="vocabulary of 300"):
        convert(qwen2, data, tmp_path / "wrong", method=method, settings=wrong, progress=False)


def test_refusals_leave_nothing(tmp_path, qwen2, data):
    out, empty = tmp_path / "out", tmp_path / "empty.txt"
    empty.touch()
    gpt2 = write_model(tmp_path / "gpt2", "gpt2")
    good = {"model": qwen2, "data": data, "method": "transmla(rank=24, rope_dim=8)"}
    cases = [
        (CompositionError, {"method": "kivi"}),
        (CompositionError, {"method": "transmla*loma"}),
        (CompositionError, {"method": "loma", "rank": 8}),
        (ShapeError, {"method": "transmla"}),
        (ShapeError, {"settings": ConvertSettings(tokens=1000)}),
        (ShapeError, {"method": "loma", "settings": ConvertSettings(**{**SIZES, "tokens": 20})}),
        (UnsupportedModel, {"model": gpt2}),
        (DataError, {"data": empty}),
    ]
    for error, changes in cases:
        given = {"settings": CALIBRATE, **good, **changes}
        model, text = given.pop("model"), given.pop("data")
        with pytest.raises(error):
            convert(model, text, out, progress=False, **given)
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()
    out.mkdir()
    (out / "mine.txt").touch()
    with pytest.raises(OutputExists):
        convert(qwen2, data, out, method=good["method"], settings=CALIBRATE, progress=False)
    with pytest.raises(ShapeError):
        ConvertSettings(samples=0)
