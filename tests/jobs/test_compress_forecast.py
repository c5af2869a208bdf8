"""The memory that compressing is said to take, against what it takes: of one matrix, and of the whole job."""

from pathlib import Path

import pytest
import torch

from pintpot.core.expression import parse
from pintpot.core.ledger import Tier
from pintpot.core.model_folder import open_model
from pintpot.core.registry import techniques
from pintpot.core.workload import Compress
from pintpot.jobs.calibration_texts import CalibrationSettings, calibration_texts
from pintpot.jobs.compress import compress
from pintpot.jobs.load import load
from pintpot.jobs.simulate import simulate
from pintpot.jobs.text import TextSettings
from pintpot.ledger.measure import measure
from pintpot.ledger.tracker import Tracker
from pintpot.weights.statistics import InputStatistics
from tests.folders import write_model

LEAST, MOST = 0.97, 1.45
"""Predicted over measured: too little is a job that fails, too much one that is refused for nothing."""

SAMPLES, TOKENS = 8, 32
QUICK = {"minifloat-ptq": {"iterations": 2}, "vptq": {"iterations": 2}, "q-bert": {"parts": 1, "iterations": 1}}
BY_BLOCK = ("rtn", "gptq", "awq", "adadim", "vptq", "minifloat-ptq", "svdquant", "q-bert")


def shape_of(folder: Path):
    return open_model(folder, match=False).shape()


def method_of(name: str):
    return techniques("weights")[name].build(QUICK.get(name, {}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "dense", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def double(number):\n    return 2 * number\n\n" * 200)
    return file


def ratio(predicted: int, measured: int) -> float:
    assert measured > 0
    return predicted / measured


FINDING = ["gptq", "awq", "adadim", "vptq", "minifloat-ptq", "svdquant", "gptq(clip=True)", "adadim(clip=True)"]


@pytest.mark.parametrize("name", FINDING)
@pytest.mark.parametrize(("shape", "dtype"), [((192, 128), torch.bfloat16), ((64, 160), torch.float32)])
def test_finding_a_matrix_takes_what_the_method_says(name, shape, dtype):
    method = parse(name)[0] if "(" in name else method_of(name)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    statistics = InputStatistics.empty(shape[1], weight.device)
    statistics.add_(torch.randn((500, shape[1]), generator=generator))
    formats = method.terms("model.layers.0.mlp.up_proj.weight", *shape, dtype)
    with torch.no_grad(), Tracker(samples=None) as tracker:
        method.find("model.layers.0.mlp.up_proj.weight", weight, formats, statistics)
    measured = tracker.ledger().peak_bytes()
    assert 0.95 <= ratio(method.finding_bytes(*shape, dtype), measured) <= 1.8


@pytest.mark.parametrize("name", BY_BLOCK)
def test_a_folder_is_compressed_in_the_memory_that_was_foreseen(name, folder, text, tmp_path: Path):
    method = method_of(name)
    settings = CalibrationSettings(data=text, samples=SAMPLES, tokens=TOKENS)
    with measure() as run:
        done = compress(folder, tmp_path / "out", techniques=[method], calibration=settings)
    predicted = simulate(shape_of(folder), Compress(samples=SAMPLES, tokens=TOKENS), [method])
    assert LEAST <= ratio(predicted.peak_bytes(), run.ledger.peak_bytes()) <= MOST
    assert predicted.peak_bytes(Tier.DISK) == done.output_bytes


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_in_memory_the_model_stands_beside_what_a_folder_takes(name, folder, text):
    method = method_of(name)
    texts = calibration_texts(folder, method, CalibrationSettings(data=text, samples=SAMPLES, tokens=TOKENS))
    with measure() as run:
        model = load(folder)
        held = run.current_bytes()
        method.quantize_model_(model, texts)
    parameters = shape_of(folder).parameters
    there = sum(p.nbytes for p in parameters if p.block in ("", "model.layers.0"))
    foreseen = held - there + method.applying_bytes(shape_of(folder), Compress(samples=SAMPLES, tokens=TOKENS))
    assert LEAST <= ratio(foreseen, run.ledger.peak_bytes()) <= MOST


@pytest.mark.parametrize("name", ["loraprune", "onebit"])
@pytest.mark.parametrize(("tokens", "batch"), [(32, 1), (64, 2)])
def test_a_trained_method_takes_what_training_takes(name, tokens, batch, folder, text, tmp_path: Path):
    method = method_of(name)
    training = TextSettings(tokens=tokens, batch=batch, steps=2)
    with measure() as run:
        done = compress(
            folder,
            tmp_path / "out",
            techniques=[method],
            calibration=CalibrationSettings(data=text),
            training=training,
        )
    predicted = simulate(shape_of(folder), Compress(batch=batch, tokens=tokens), [method])
    assert LEAST <= ratio(predicted.peak_bytes(), run.ledger.peak_bytes()) <= MOST
    assert predicted.peak_bytes(Tier.DISK) == done.output_bytes
