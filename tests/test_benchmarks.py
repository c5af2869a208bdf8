"""The parts of the benchmarks that decide what is run, and what is said of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from benchmarks import journal, rows
from benchmarks.optim_methods import BASELINES, paper_ratio, scaled, state_bytes, verdict, ways
from benchmarks.optim_picture import spread
from torch import nn, ones
from torch.optim import AdamW

from pintpot.adapters import Lora
from pintpot.core.registry import get, techniques
from pintpot.core.workload import Finetune, Pretrain


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
