"""What was measured of a weight method, and the rows of ``results/weights.csv`` that say it beside its rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from benchmarks.weights_methods import BASE
from benchmarks.weights_subjects import Metric, Subject

STAMPS = ("hardware", "versions", "commit", "date")
DENSE = "dense float32"

EQUAL = 1.01
"""Ratio up to which two numbers of bytes count as equal."""

NEAR = 1.2
"""Ratio of bytes up to which a larger rival is preferred to be compared with, the best of these; else the next."""

LEVEL = 2.0
"""Standard errors of the difference below which two figures count as level."""


@dataclass(frozen=True)
class Measured:
    """One configuration on one subject.

    Attributes:
        technique: as it is listed, or the peer's name.
        config: how it was set.
        found: ``parts``, ``matrix_bytes``, ``folder_bytes``, ``seconds``, ``peak_bytes``, ``judge_seconds`` and stamps.
        ours: whether it is a method of this project.
    """

    technique: str
    config: str
    found: dict[str, Any]
    ours: bool = True

    @property
    def size(self) -> int:
        """Bytes of the compressed matrices."""
        return int(self.found["matrix_bytes"])

    def value(self, metric: Metric) -> float:
        """Its figure."""
        return metric.value(self.found["parts"][metric.name])


def lead(one: Measured, other: Measured, metric: Metric) -> float:
    """By how many standard errors one is better than another, from the parts that both have."""
    sign = 1.0 if metric.rises else -1.0
    pairs = zip(one.found["parts"][metric.name], other.found["parts"][metric.name], strict=True)
    apart = [sign * (mine - theirs) for mine, theirs in pairs]
    mean = sum(apart) / len(apart)
    error = stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0


def best(rivals: Iterable[Measured], metric: Metric) -> Measured | None:
    """The one with the best figure."""
    sign = 1.0 if metric.rises else -1.0
    return max(rivals, key=lambda rival: sign * rival.value(metric), default=None)


def compared(mine: Measured, rivals: Sequence[Measured], metric: Metric) -> tuple[str, Measured | None]:
    """How a configuration stands among rivals at equal bytes of matrices, in words, and the rival that is named.

    It is behind where a rival is better in no more bytes, and ahead where it is better than all in as many or a few
    more. A difference within ``LEVEL`` standard errors is neither.
    """
    smaller = best((r for r in rivals if r.size <= EQUAL * mine.size), metric)
    above = [rival for rival in rivals if EQUAL * rival.size >= mine.size]
    near = (rival for rival in above if rival.size <= NEAR * mine.size)
    larger = best(near, metric) or min(above, key=lambda rival: rival.size, default=None)
    if smaller is not None and lead(smaller, mine, metric) > LEVEL:
        return f"behind {_said(smaller, mine, metric)}", smaller
    if larger is not None and lead(larger, mine, metric) <= LEVEL:
        word = "ahead of" if lead(mine, larger, metric) > LEVEL else "level with"
        return f"{word} {_said(larger, mine, metric)}", larger
    if smaller is not None:
        other = "" if larger is None else f"; in more there is {_said(larger, mine, metric)}"
        return f"nothing in so few bytes is better, the best being {_said(smaller, mine, metric)}{other}", smaller
    return "" if larger is None else f"smaller than any; the next is {_said(larger, mine, metric)}", larger


def _said(rival: Measured, mine: Measured, metric: Metric) -> str:
    return f"{rival.config}: {_short(rival.value(metric))} in {rival.size / mine.size:.3f} of the bytes"


def rows(mine: Measured, rivals: Sequence[Measured], dense: Measured, subject: Subject) -> list[dict[str, Any]]:
    """A configuration's rows: each metric with the bytes of its matrices.

    Args:
        mine: ours, or a peer's.
        rivals: the base method and the peers, at all their settings.
        dense: the model as it was.
        subject: what was compressed.
    """
    share = f"{mine.size / subject.matrix_bytes:.1%} of the matrices' bytes"
    whole = f"{mine.found['folder_bytes'] / dense.found['folder_bytes']:.1%} of the folder's"
    made = []
    for metric in subject.metrics:
        words = [f"{8 * mine.size / subject.numbers:.3f} bits a weight", share, whole]
        named = None
        if mine.ours:
            own, named = (compared(mine, [r for r in rivals if r.ours is ours], metric) for ours in (True, False))
            words += [own[0] if mine.technique != BASE else "", named[0], "no figure in the paper for this model"]
        peer = named[1] if named is not None else None
        made.append(
            {
                **_row(mine, subject),
                "metric": metric.name,
                "unit": metric.unit,
                "value": _short(mine.value(metric)),
                "baseline": DENSE,
                "baseline_value": _short(dense.value(metric)),
                "peer": "" if peer is None else peer.config,
                "peer_value": "" if peer is None else _short(peer.value(metric)),
                "status": f"{'' if mine.ours else 'peer: '}{'; '.join(filter(None, words))}",
                "peak_bytes": mine.size,
                "seconds": mine.found["judge_seconds"],
            }
        )
    return made


def dense_rows(dense: Measured, subject: Subject) -> list[dict[str, Any]]:
    """The baseline's own rows."""
    return [
        {
            **_row(dense, subject),
            "metric": metric.name,
            "unit": metric.unit,
            "value": _short(dense.value(metric)),
            "status": "baseline",
            "peak_bytes": dense.size,
            "seconds": dense.found["judge_seconds"],
        }
        for metric in subject.metrics
    ]


def _row(mine: Measured, subject: Subject) -> dict[str, Any]:
    return {
        "technique": mine.technique,
        "config": mine.config,
        **subject.about,
        "seed": 0,
        **{stamp: mine.found[stamp] for stamp in STAMPS},
    }


def _short(number: float) -> str:
    return f"{number:.6g}"
