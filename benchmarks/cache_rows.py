"""What was measured of a cache, and the rows of ``results/cache.csv`` that say it beside the peers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.cache_methods import BASELINE
from benchmarks.cache_tasks import MEAN, RECALL, Scores, Task, value

STAMPS = ("hardware", "versions", "commit", "date")

PAPER = {("lagkv", 0.5): 1.0, ("lagkv", 0.125): 0.90}
"""Share of the full cache's score that a paper reports at a share of the tokens: LagKV's abstract."""


@dataclass(frozen=True)
class Measured:
    """A method on all tasks.

    Attributes:
        technique: as it is listed.
        config: how it was set.
        runs: for each task's metric: ``scores``, ``bytes`` of one sequence, ``seconds``, and where it was measured.
        kind: ``ours``, ``transformers`` or ``kvpress``.
        fraction: its share of the dense cache's bytes, where it was given one.
    """

    technique: str
    config: str
    runs: dict[str, dict[str, Any]]
    kind: str = "ours"
    fraction: float | None = None

    @property
    def complete(self) -> bool:
        """Whether all recall tasks were measured."""
        return set(RECALL) <= set(self.runs)

    @property
    def mean(self) -> float:
        """Mean accuracy of the recall tasks."""
        return float(np.mean([value("accuracy", self.scores(metric)) for metric in RECALL]))

    @property
    def bytes(self) -> int:
        """Mean bytes of one sequence in the recall tasks."""
        return round(float(np.mean([self.runs[metric]["bytes"] for metric in RECALL])))

    def scores(self, metric: str) -> Scores:
        """What each prompt got."""
        found: Scores = self.runs[metric]["scores"]
        return found


def difference(one: Measured, other: Measured) -> tuple[float, float]:
    """How far one's mean is above another's, and the standard error of that, from the prompts that both read."""
    apart = [np.mean(np.array(one.scores(m)) - np.array(other.scores(m)), axis=1) for m in RECALL]
    error = np.sqrt(sum(prompts.var(ddof=1) / len(prompts) for prompts in apart if len(prompts) > 1)) / len(apart)
    return float(np.mean([prompts.mean() for prompts in apart])), float(error)


def masks(rival: Measured, dense: Measured) -> bool:
    """Whether a peer that was told to keep a share holds everything all the same."""
    return rival.fraction is not None and rival.fraction < 0.9 and rival.bytes > 0.95 * dense.bytes


def best_rival(mine: Measured, rivals: Iterable[Measured], dense: Measured, masking: bool) -> Measured | None:
    """The best peer in no fewer bytes than ours, each peer at the setting that is nearest to them.

    Args:
        mine: ours.
        rivals: peers at all settings.
        dense: the baseline.
        masking: among those that hold everything and mask, whose bytes are then taken as what they kept.
    """
    nearest: dict[str, tuple[float, Measured]] = {}
    for rival in rivals:
        if not rival.complete or masks(rival, dense) is not masking:
            continue
        size = _kept_bytes(rival.fraction or 1.0, dense) if masking else rival.bytes
        if mine.bytes <= size < nearest.get(rival.technique, (float("inf"), None))[0]:
            nearest[rival.technique] = (size, rival)
    return max((rival for _, rival in nearest.values()), key=lambda rival: rival.mean, default=None)


def _kept_bytes(fraction: float, dense: Measured) -> float:
    """Mean bytes of a share of the contexts, and of all that is asked."""
    asked = float(np.mean([dense.runs[metric]["asked_bytes"] for metric in RECALL]))
    return fraction * (dense.bytes - asked) + asked


def verdict(mine: Measured, rivals: Sequence[Measured], dense: Measured) -> str:
    """Ours against the best of kvpress on the mean of the recall tasks, in words."""
    pressed = [rival for rival in rivals if rival.kind == "kvpress"]
    words = []
    paper = PAPER.get((mine.technique, mine.fraction or 0.0))
    if paper is not None:
        kept = mine.mean / dense.mean if dense.mean else 0.0
        says = "matches" if kept >= paper else "differs, on a far smaller model and a shorter context"
        words.append(f"{says}: {kept:.2f} of the full cache's score kept, in the paper {paper:.2f}")
    saving, masking = (best_rival(mine, pressed, dense, masked) for masked in (False, True))
    if saving is None:
        words.append(f"{mine.bytes / dense.bytes:.1%} of the dense bytes, where kvpress has nothing that saves")
    else:
        apart, error = difference(mine, saving)
        side = "level with" if abs(apart) <= 2 * error else "ahead of" if apart > 0 else "behind"
        words.append(
            f"{side} the best of kvpress in no fewer bytes ({saving.config}): {mine.mean:.2f} in "
            f"{mine.bytes / dense.bytes:.1%}, theirs {saving.mean:.2f} in {saving.bytes / dense.bytes:.1%}, "
            f"difference {apart:+.2f} with standard error {error:.2f}; the dense cache has {dense.mean:.2f}"
        )
    if masking is not None:
        words.append(f"{masking.config}, which masks and saves nothing, has {masking.mean:.2f}")
    return "; ".join(words)


def rows(
    mine: Measured, tasks: Sequence[Task], rivals: Sequence[Measured], dense: Measured, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """A method's rows: each task, and the mean of the recall tasks.

    Args:
        mine: the method.
        tasks: what was asked.
        rivals: peers; none for the rows of a peer.
        dense: the baseline.
        about: model, context and prompts.
    """
    rival = best_rival(mine, rivals, dense, masking=False) if mine.complete and mine.kind == "ours" else None
    made = []
    for task in tasks:
        if task.metric in mine.runs:
            run, base = mine.runs[task.metric], dense.runs[task.metric]
            found, full = value(task.unit, run["scores"]), value(task.unit, base["scores"])
            share = f"{run['bytes'] / base['bytes']:.1%} of its bytes"
            row = _row(mine, task.metric, task.unit, found, full, run, about)
            row["data"] = f"{about['data']}, sha256 {task.digest}"
            row["status"] = f"{found / full if full else 0.0:.3f} of {BASELINE}'s in {share}"
            if rival is not None and task.metric in rival.runs:
                row |= {"peer": rival.config, "peer_value": _short(value(task.unit, rival.scores(task.metric)))}
            made.append(row)
    if mine.complete:
        seconds = sum(mine.runs[metric]["seconds"] for metric in RECALL)
        whole = {**mine.runs[RECALL[0]], "bytes": mine.bytes, "seconds": round(seconds, 2)}
        row = _row(mine, MEAN, "accuracy", mine.mean, dense.mean, whole, about)
        row["status"] = f"{mine.mean:.2f} in {mine.bytes / dense.bytes:.1%} of the dense bytes"
        if mine.kind == "ours":
            row["status"] = verdict(mine, rivals, dense)
            row["paper_value"] = PAPER.get((mine.technique, mine.fraction or 0.0), "")
        if rival is not None:
            row |= {"peer": rival.config, "peer_value": _short(rival.mean)}
        made.append(row)
    return [_of_peer(row, mine, dense) for row in made]


def _of_peer(row: dict[str, Any], mine: Measured, dense: Measured) -> dict[str, Any]:
    if mine.kind == "ours":
        return row
    note = "baseline" if mine.config == BASELINE else "peer"
    if mine.complete and masks(mine, dense):
        note = "peer, which masks and saves nothing"
    return {**row, "status": f"{note}: {row['status']}"}


def _row(
    mine: Measured, metric: str, unit: str, found: float, full: float, run: dict[str, Any], about: dict[str, Any]
) -> dict[str, Any]:
    return {
        "technique": mine.technique,
        "config": mine.config,
        **about,
        "seed": 0,
        "metric": metric,
        "unit": unit,
        "value": _short(found),
        "baseline": BASELINE,
        "baseline_value": _short(full),
        "peer": "",
        "peer_value": "",
        "paper_value": "",
        "peak_bytes": run["bytes"],
        "seconds": run["seconds"],
        **{stamp: run[stamp] for stamp in STAMPS},
    }


def _short(number: float) -> str:
    return f"{number:.4g}"
