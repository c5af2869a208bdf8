"""The parts of the weights benchmark that decide what is run, what is counted, and what is said of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from benchmarks import rows, weights_compressing, weights_picture
from benchmarks.weights_agreement import GROUP, plain_awq, plain_gptq
from benchmarks.weights_methods import BASE, USE, configurations, described, measure
from benchmarks.weights_peers import peers
from benchmarks.weights_rows import DENSE, STAMPS, Measured, compared, dense_rows
from benchmarks.weights_rows import rows as weights_rows
from benchmarks.weights_subjects import PERPLEXITY, Metric, Subject, language, neighbours, sentences

from pintpot import reference
from pintpot.core.registry import techniques
from pintpot.core.shape import ModelShape
from pintpot.weights import WeightMethod
from pintpot.weights.by_training import ByTraining
from pintpot.weights.rtn import RTN

METRIC = Metric(PERPLEXITY, "perplexity", rises=False)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return language(texts=2, blocks=2)


def measured(name: str, nats: float, size: int, ours: bool = True) -> Measured:
    parts = {PERPLEXITY: [nats, nats + 0.1, nats + 0.2]}
    found = {"parts": parts, "matrix_bytes": size, "folder_bytes": size + 100, "seconds": 2.0, "peak_bytes": 7}
    return Measured(name, f"{name} of {size}", {**found, "judge_seconds": 1.0, **dict.fromkeys(STAMPS, "x")}, ours)


def test_every_method_is_measured_once_in_each_configuration_and_the_base_first() -> None:
    shape = ModelShape.from_folder(reference.path())
    found = configurations(shape)
    names = [method.name for method in found]
    known = techniques("weights").items()
    kinds = {name: kind for name, kind in known if issubclass(kind, WeightMethod | ByTraining)}
    assert set(names) == {name for name, kind in kinds.items() if any(True for _ in kind.options(shape, USE))}
    assert len({described(method) for method in found}) == len(found)
    assert names[: names.count(BASE)] == [BASE] * names.count(BASE)
    assert {8, 4, 3, 2} <= {method.bits for method in found if method.name == "gptq"}
    only = configurations(shape, "awq")
    assert {method.name for method in only} == {BASE, "awq"}


def test_bytes_are_those_of_the_folder_and_of_all_matrices(subject: Subject) -> None:
    assert subject.sizes(subject.model) == (subject.matrix_bytes, subject.shape.weight_bytes)
    found = measure(subject, RTN(bits=4, group_size=32))
    packed = sum(
        target.nbytes(RTN(bits=4, group_size=32).terms("", *target.shape, torch.float32)) for target in subject.targets
    )
    assert found["matrix_bytes"] == packed
    assert found["folder_bytes"] == subject.shape.weight_bytes - subject.matrix_bytes + packed
    assert len(found["parts"][PERPLEXITY]) == 2
    assert METRIC.value([math.log(8.0)] * 2) == pytest.approx(8.0)


def test_a_matrix_that_is_left_dense_counts(subject: Subject) -> None:
    model = copy.deepcopy(subject.model)
    method = RTN(bits=8)
    layout = dict(method.layout(subject.targets))
    left = subject.targets[0]
    del layout[left.parameter]
    method.prepare_skeleton_(model, layout=layout)
    everything = measure(subject, method)["matrix_bytes"]
    more = left.numel * 2 - left.nbytes(method.terms("", *left.shape, torch.float32))
    assert subject.sizes(model)[0] == everything + more


def test_the_verdict_is_at_equal_bytes() -> None:
    rivals = [measured("a", 2.0, 400), measured("a", 3.0, 200), measured("b", 2.5, 300)]
    assert compared(measured("x", 1.9, 390), rivals, METRIC)[0].startswith("ahead of a of 400: 8.1")
    words, named = compared(measured("x", 2.2, 390), rivals, METRIC)
    assert words.startswith("nothing in so few bytes is better, the best being b of 300")
    assert "in more there is a of 400" in words
    assert named is rivals[2]
    far = [*rivals, measured("c", 1.5, 900)]
    assert compared(measured("x", 1.9, 390), far, METRIC)[0].startswith("ahead of a of 400")
    assert "in more there is c of 900" in compared(measured("x", 1.9, 700), far, METRIC)[0]
    assert compared(measured("x", 2.6, 390), rivals, METRIC)[0].startswith("behind b of 300")
    assert compared(measured("x", 2.0, 398), rivals, METRIC)[0].startswith("level with a of 400")
    assert compared(measured("x", 5.0, 100), rivals, METRIC)[0].startswith("smaller than any; the next is a of 200")
    assert compared(measured("x", 2.0, 402), rivals, METRIC)[0].startswith("level with a of 400")
    assert compared(measured("x", 2.0, 400), [], METRIC) == ("", None)


def test_rows_and_picture_tell_ours_from_peers(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    dense = measured(DENSE, 2.0, subject.matrix_bytes, ours=False)
    rivals = [measured("rtn", 2.2, 403_200), measured("hqq", 2.3, 806_400, ours=False)]
    made = weights_rows(measured("gptq", 2.1, 403_200), rivals, dense, subject)
    assert [row["metric"] for row in made] == [PERPLEXITY]
    assert set(made[0]) <= set(rows.COLUMNS)
    assert made[0]["status"].startswith("2.000 bits a weight; 12.5% of the matrices' bytes")
    assert "ahead of rtn of 403200" in made[0]["status"]
    assert (made[0]["peer"], made[0]["peak_bytes"]) == ("hqq of 806400", 403_200)
    rows.append_rows("weights", [*dense_rows(dense, subject), *made])
    rows.append_rows("weights", weights_rows(rivals[1], [], dense, subject))
    ours, theirs = weights_picture.curves(PERPLEXITY)
    assert [(curve.name, curve.points[0][0]) for curve in ours] == [("gptq", 2.0)]
    assert ours[0].points[0][1] == pytest.approx(100 * (math.exp(0.1) - 1), rel=1e-3)
    assert [(curve.name, curve.points[0][0]) for curve in theirs] == [("hqq", 4.0)]
    assert weights_picture.picture({PERPLEXITY: (ours, theirs)}).startswith(b"\x89PNG")
    assert weights_picture.staircase([(4.0, 1.0), (2.0, 3.0), (3.0, 5.0)]) == ((2.0, 3.0), (4.0, 1.0))


def test_what_compressing_takes_is_put_beside_the_package() -> None:
    ours, theirs = ({"seconds": s, "numbers": 10**6, "peak_bytes": 7, "model": "m", "data": ""} for s in (2.0, 4.0))
    made = weights_compressing.row("gptq", "gptq", ours, "package", theirs)
    assert (float(made["value"]), float(made["peer_value"]), made["peak_bytes"]) == (2000, 4000, 7)
    assert "0.5 of its time" in made["status"]
    assert set(made) <= set(rows.COLUMNS)
    failed = weights_compressing.row("gptq", "gptq", {"failed": "no memory"}, "", {})
    assert failed["status"] == "not measured: no memory"
    assert "value" not in failed


def test_plain_gptq_and_awq_lose_less_than_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    inputs = torch.randn(512, 64, generator=generator, dtype=torch.float64) @ mixed
    inputs[:, 5] *= 30
    weight = torch.randn(32, 64, generator=generator, dtype=torch.float64)
    hessian = inputs.t() @ inputs / len(inputs)

    def lost(rounded: torch.Tensor) -> float:
        return float((((rounded - weight) @ hessian) * (rounded - weight)).sum())

    nearest = plain_awq(weight, hessian, torch.ones(64, dtype=torch.float64), clip=False)
    assert lost(plain_gptq(weight, hessian)) < 0.5 * lost(nearest)
    scaled = plain_awq(weight, hessian, inputs.abs().mean(0), clip=False)
    assert lost(scaled) < 0.8 * lost(nearest)
    assert weight.shape[1] % GROUP == 0


def test_neighbours_and_sentences() -> None:
    said = sentences(50)
    assert len(set(said)) == 50
    assert said == sentences(50)
    circle = torch.linspace(0, 1.5, 20)
    near = neighbours(torch.stack([circle.cos(), circle.sin()], 1))
    assert near.shape == (20, 10)
    assert sorted(near[0].tolist()) == list(range(1, 11))
    assert all(row not in found for row, found in enumerate(near.tolist()))


def test_every_peer_says_what_it_is_or_why_it_is_missing() -> None:
    found = peers()
    assert len({peer.config for peer in found}) == len(found)
    assert {"optimum-quanto", "hqq", "llama.cpp", "torchao", "llm-compressor GPTQ"} <= {peer.name for peer in found}
