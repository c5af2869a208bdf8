"""The parts of the benchmarks that decide what is run, and what is said of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import cache_picture, journal, rows
from benchmarks.cache import measure, reference_subject
from benchmarks.cache_methods import DENSE, FRACTIONS, Job, budget_bytes, methods, windows_for
from benchmarks.cache_rows import STAMPS, Measured
from benchmarks.cache_rows import rows as cache_rows
from benchmarks.cache_rows import verdict as cache_verdict
from benchmarks.cache_tasks import MEAN, RECALL, Task, make_tasks, write_prompts
from benchmarks.optim_methods import BASELINES, paper_ratio, scaled, state_bytes, verdict, ways
from benchmarks.optim_picture import spread
from safetensors import safe_open
from torch import nn, ones
from torch.optim import AdamW
from transformers import AutoConfig

from pintpot import reference
from pintpot.adapters import Lora
from pintpot.cache import LagKV
from pintpot.core.registry import get, techniques
from pintpot.core.workload import Finetune, Pretrain
from pintpot.reference.tasks import task_vocabulary
from pintpot.reference.tokenizer import load_tokenizer


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "RESULTS", tmp_path)
    counted = itertools.count(1)

    def run(**options: bool) -> list[float]:
        kept = journal.Journal("runs", total=2, **options)
        return [kept.once({"way": "galore", "seed": seed}, lambda: {"nats": next(counted)})["nats"] for seed in (0, 1)]

    assert run() == [1, 2]
    assert run() == [1, 2]
    assert run(again=True) == [3, 4]
    assert run() == [3, 4]


def test_rows_take_the_place_of_those_that_measured_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    row = dict.fromkeys(rows.KEY, "x")
    rows.append_rows("optim", [{**row, "value": 1}, {**row, "metric": "y", "value": 2}])
    rows.append_rows("optim", [{**row, "value": 3}])
    assert sorted((r["metric"], r["value"]) for r in rows.read_rows("optim")) == [("x", "3"), ("y", "2")]


def test_hyperparameters_follow_the_rule() -> None:
    assert str(scaled(get("galore"), 96, 5, 250)) == "galore(rank=24, update_gap=25)"
    assert (
        str(scaled(get("owlore"), 96, 5, 250)) == "owlore(active_blocks=2, interval_steps=25, rank=24, update_gap=25)"
    )
    lora = scaled(Lora, 160, 6, 150)
    assert isinstance(lora, Lora)
    assert (lora.rank, lora.alpha) == (40, 80)


def test_every_method_that_pretrains_with_gradients_is_compared() -> None:
    found = {way.name for way in ways(Pretrain(steps=250), 96, 5)}
    assert {"torch AdamW", "galore", "apollo", "adamw-8bit", "lisa", *BASELINES} <= found
    assert not {"mezo", "baffle", "gradient-release", "tpsgd"} & found
    assert {"mezo", "baffle", "lora (peft)"} <= {way.name for way in ways(Finetune(steps=150), 160, 6)}


def test_the_verdict_compares_ratios_to_adamw() -> None:
    paper = paper_ratio("galore")
    assert paper is not None
    assert paper[0] == pytest.approx(34.88 / 34.06)
    assert verdict(1.04, 0.0, paper).startswith("matches: 1.040 of AdamW")
    assert verdict(0.90, 0.0, paper).startswith("differs")
    assert verdict(1.10, 0.0, paper).startswith("not reproduced")
    assert verdict(1.10, 0.03, paper).startswith("matches")
    assert verdict(1.10, 0.0, None) == "1.100 of AdamW; the paper has no such figure"
    known = [paper_ratio(name) for name in techniques("optim")]
    assert all(0.5 < ratio[0] < 1.2 for ratio in known if ratio is not None)


def test_state_bytes_are_those_of_the_moments() -> None:
    layer = nn.Linear(8, 4, bias=False)
    optimizer = AdamW(layer.parameters())
    layer(ones(1, 8)).sum().backward()
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 8 * 4 * 4 + 4


@pytest.mark.parametrize("wanted", [[0.5] * 5, [0.0, 0.01, 0.9], [0.97, 0.98, 1.0], [0.2], [0.0] * 60])
def test_labels_do_not_overlap(wanted: list[float]) -> None:
    places = spread(wanted, 0.033)
    gap = min(0.033, 1 / max(1, len(wanted) - 1))
    assert all(after - before >= gap - 1e-9 for before, after in itertools.pairwise(places))
    assert min(places) >= -1e-9
    assert max(places) <= 1 + 1e-9


@pytest.fixture(scope="module")
def cache_tasks() -> list[Task]:
    return make_tasks(reference.path(), 160, 2)


def test_cache_questions_are_answered_in_their_context(cache_tasks: list[Task]) -> None:
    tasks = cache_tasks
    words = task_vocabulary(load_tokenizer(reference.path()))
    assert [task.metric for task in tasks[:3]] == list(RECALL)
    for task in tasks[:3]:
        reading = task.readings[0]
        assert reading.context.shape[1] + reading.asked == 160 + 1
        for row, context in enumerate(reading.context.tolist()):
            asked = [[*turn.fed[row].tolist(), int(turn.answer[row, -1])] for turn in reading.turns]
            lines = [tokens[tokens.index(int(words.recall_mark[0])) :] for tokens in asked]
            assert len({tuple(line) for line in lines}) == len(reading.turns)
            text = " ".join(map(str, context))
            assert all(" ".join(map(str, line)) in text for line in lines)
    copy = tasks[3].readings[0]
    assert torch.equal(copy.turns[0].fed, copy.context[:, 1 : 1 + copy.turns[0].fed.shape[1]])
    assert [task.digest for task in make_tasks(reference.path(), 160, 2)] == [task.digest for task in tasks]


def test_what_kvpress_reads_is_what_we_read(tmp_path: Path, cache_tasks: list[Task]) -> None:
    digest = write_prompts(tmp_path / "prompts", reference.path(), cache_tasks, FRACTIONS)
    with safe_open(tmp_path / "prompts", "pt") as file:
        assert file.metadata()["fractions"] == "0.5,0.25,0.125,0.05"
        assert file.metadata()["2/metric"] == RECALL[2]
        assert torch.equal(file.get_tensor("2/0/3/answer"), cache_tasks[2].readings[0].turns[3].answer)
    assert digest == write_prompts(tmp_path / "again", reference.path(), cache_tasks, (0.5,))


def test_answers_from_a_dense_cache_are_those_of_one_pass(cache_tasks: list[Task]) -> None:
    task = cache_tasks[2]
    subject = reference_subject(reference.path())
    found = measure(subject, DENSE, task)
    reading = task.readings[0]
    with torch.no_grad():
        logits = subject.model(torch.cat([reading.context, *(turn.fed for turn in reading.turns)], dim=1)).logits
    ends = itertools.accumulate((turn.fed.shape[1] for turn in reading.turns), initial=reading.context.shape[1])
    for question, (end, turn) in enumerate(zip(list(ends)[1:], reading.turns, strict=True)):
        right = (logits[:, end - turn.answer.shape[1] : end].argmax(-1) == turn.answer).all(dim=1)
        assert [prompt[question] for prompt in found["scores"]] == right.float().tolist()
    assert found["bytes"] == 6 * (reading.context.shape[1] + reading.asked) * 2 * 2 * 32 * 4


def test_every_keep_and_store_is_measured() -> None:
    job = Job(994, 6, 8)
    config = AutoConfig.from_pretrained(reference.path())
    found = methods(config, job)
    parts = {name for name, kind in techniques("cache").items() if kind.facts.part in ("keep", "store")}
    assert parts <= {method.technique for method in found}
    assert len({method.config for method in found}) == len(found)
    lag = windows_for(LagKV(), None, config, job, 0.125, torch.float32)
    assert isinstance(lag, LagKV)
    assert (lag.lag_tokens, lag.sink_tokens, lag.kept_fraction) == (32, 4, 1.0)
    assert windows_for(LagKV(), None, config, job, 0.01, torch.float32) is None
    assert budget_bytes(config, job, 0.5, torch.float32) == 8 * (994 // 2 + 6) * 6 * 2 * 2 * 32 * 4


def cached(name: str, right: int, size: int, kind: str = "kvpress", fraction: float | None = 0.25) -> Measured:
    """A method with so many of 20 answers right in each recall task."""
    scores = [[float(index < right)] for index in range(20)]
    run = {"scores": scores, "bytes": size, "asked_bytes": 10, "seconds": 1.0, **dict.fromkeys(STAMPS, "x")}
    return Measured(name, f"{name}, {fraction} of the context kept", dict.fromkeys(RECALL, run), kind, fraction)


def test_the_cache_verdict_is_at_equal_bytes() -> None:
    dense = cached("DynamicCache", 20, 1000, "transformers", None)
    rivals = [
        cached("a", 10, 250),
        cached("a", 18, 500, fraction=0.5),
        cached("small", 19, 100),
        cached("mask", 19, 990),
    ]
    assert "ahead of the best of kvpress in no fewer bytes (a, 0.25" in cache_verdict(
        cached("ours", 18, 250, "ours"), rivals, dense
    )
    assert "mask, 0.25 of the context kept, which masks and saves nothing, has 0.95" in cache_verdict(
        cached("ours", 18, 250, "ours"), rivals, dense
    )
    assert cache_verdict(cached("ours", 2, 250, "ours"), rivals, dense).startswith("behind")
    assert cache_verdict(cached("ours", 10, 200, "ours"), rivals, dense).startswith("level with")
    assert "(a, 0.5" in cache_verdict(cached("ours", 18, 300, "ours"), rivals, dense)
    assert "nothing that saves" in cache_verdict(cached("ours", 18, 600, "ours"), rivals, dense)
    made = cache_rows(cached("ours", 18, 250, "ours"), [], rivals, dense, {"model": "m", "data": "d"})
    assert set(made[0]) <= set(rows.COLUMNS)
    assert (made[0]["peer_value"], made[0]["value"], made[0]["metric"]) == ("0.5", "0.9", MEAN)
    assert cache_rows(rivals[3], [], [], dense, {})[0]["status"].startswith("peer, which masks and saves nothing")


def test_the_cache_picture_has_a_curve_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    dense = cached("DynamicCache", 20, 1000, "transformers", None)
    dense = replace(dense, config="DynamicCache")
    measured = [cached("lagkv", 10, 250, "ours"), cached("a", 10, 250), cached("mask", 19, 990), dense]
    for one in measured:
        rows.append_rows("cache", cache_rows(one, [], [], dense, {"model": "m", "data": "d"}))
    panels, height = cache_picture.curves()
    assert {panel: [(c.name, c.points) for c in drawn] for panel, drawn in panels.items()} == {
        "keep": [("lagkv", ((25.0, 0.5),))],
        "saving": [("a", ((25.0, 0.5),))],
        "masking": [("mask", ((25.0, 0.95),))],
    }
    assert height == 1.0
    assert cache_picture.picture(panels, height).startswith(b"\x89PNG")
    stairs = cache_picture.best([cache_picture.Curve("x", ((5.0, 0.4), (25.0, 0.3), (50.0, 0.9)))])
    assert stairs == [(5.0, 0.4), (50.0, 0.9)]
