"""The picture of the weights benchmark: quality against bytes, a curve for each method, the peers in panels apart.

Run with ``python -m benchmarks.weights_picture [FILE]``; it reads ``results/weights.csv`` alone. A method's curve has
the settings that lose less than all its smaller ones.
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cache_picture import COLOURS, MARKERS
from benchmarks.optim_picture import spread
from benchmarks.rows import read_rows
from benchmarks.weights_rows import DENSE
from benchmarks.weights_subjects import COSINE, PERPLEXITY, RECALL
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pintpot.core.files import write_atomic
from pintpot.core.registry import techniques
from pintpot.ledger.render import INK

FILE = Path(__file__).parent.parent / "docs" / "weights-quality.png"

LABELS = {
    PERPLEXITY: "rise of perplexity, % of the dense model's",
    COSINE: "1 - mean cosine to the dense embedding",
    RECALL: f"1 - {RECALL} of the dense model's neighbours",
}
"""What is drawn of each metric: what is lost, on a logarithmic axis."""

EDGES = {PERPLEXITY: (0.01, 300.0), COSINE: (1e-5, 1.0), RECALL: (1e-3, 1.0)}
"""What is drawn at the lower and the upper edge if it lies beyond."""

MOST_BITS = 9.5
"""Bits a weight up to which methods are drawn."""
TICKS = (1, 1.5, 2, 3, 4, 6, 8)
"""Bits a weight that the axis names."""

CURVES_A_PANEL = 14


@dataclass(frozen=True)
class Curve:
    """A method's points: bits a weight, and what is lost."""

    name: str
    points: tuple[tuple[float, float], ...]


def lost(metric: str, value: float, dense: float) -> float:
    """What is drawn, within the edges."""
    found = 100 * (value / dense - 1) if metric == PERPLEXITY else 1 - value
    low, high = EDGES[metric]
    return min(max(found, low), high)


def staircase(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Those that lose less than all that have fewer bits."""
    steps: list[tuple[float, float]] = []
    for bits, loss in sorted(points):
        if not steps or loss < steps[-1][1]:
            steps.append((bits, loss))
    return tuple(steps)


def curves(metric: str) -> tuple[list[Curve], list[Curve]]:
    """The curves of our methods and of the peers, from the model and data that were measured last."""
    rows = [row for row in read_rows("weights") if row["metric"] == metric and row["value"]]
    rows = [row for row in rows if all(row[key] == rows[-1][key] for key in ("model", "data"))]
    dense = next((row for row in rows if row["technique"] == DENSE), None)
    if dense is None:
        return [], []
    ours: dict[str, list[tuple[float, float]]] = defaultdict(list)
    theirs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    known = techniques("weights")
    for row in rows:
        if row is not dense:
            bits = float(row["status"].removeprefix("peer: ").split(" bits")[0])
            point = bits, lost(metric, float(row["value"]), float(dense["value"]))
            if bits <= MOST_BITS:
                (ours if row["technique"] in known else theirs)[row["technique"]].append(point)
    made = [[Curve(name, staircase(points)) for name, points in found.items()] for found in (ours, theirs)]
    return made[0], made[1]


def draw(axes: Axes, metric: str, drawn: Sequence[Curve], frontier: Sequence[tuple[float, float]]) -> None:
    """One panel; each name stands in a column at its right, tied to the right end of its curve."""
    low, high = EDGES[metric]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(TICKS[0] * 0.8, MOST_BITS)
    axes.set_ylim(low * 0.8, high * 1.25)
    axes.set_xticks(TICKS, [f"{bits:g}" for bits in TICKS])
    axes.minorticks_off()
    if frontier:
        bits, losses = zip(*frontier, strict=True)
        axes.step([*bits, MOST_BITS], [*losses, losses[-1]], where="post", color="0.78", lw=3, zorder=0)
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    ordered = sorted(drawn, key=lambda curve: to_axes(curve.points[-1])[1])
    places = spread([min(max(float(to_axes(curve.points[-1])[1]), 0.0), 1.0) for curve in ordered], 0.045)
    for index, (curve, place) in enumerate(zip(ordered, places, strict=True)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[(index // len(COLOURS) + index) % len(MARKERS)]
        bits, losses = zip(*curve.points, strict=True)
        axes.plot(bits, losses, color=colour, marker=marker, ms=4.5, lw=1.1, alpha=0.9, mec="white", mew=0.5)
        end = to_axes(curve.points[-1])
        axes.plot(
            [end[0], 1.01, 1.04], [end[1], place, place], color=colour, lw=0.4, transform=axes.transAxes, clip_on=False
        )
        axes.text(1.05, place, curve.name, color=colour, fontsize=7, va="center", transform=axes.transAxes)
    axes.set_xlabel("stored bits of each weight, scales and all")
    axes.set_ylabel(LABELS[metric])
    axes.spines[["top", "right"]].set_visible(False)


def picture(found: dict[str, tuple[list[Curve], list[Curve]]]) -> bytes:
    """The whole picture as PNG: a row for each metric, our methods in panels of ``CURVES_A_PANEL``, then the peers."""
    split = {
        metric: [
            *(("ours", ours[start : start + CURVES_A_PANEL]) for start in range(0, len(ours), CURVES_A_PANEL)),
            *([("public packages", theirs)] if theirs else []),
        ]
        for metric, (ours, theirs) in found.items()
    }
    columns = max(len(panels) for panels in split.values())
    figure = Figure(figsize=(5.6 * columns, 5.2 * len(split)), layout="constrained", dpi=110)
    for line, (metric, panels) in enumerate(split.items()):
        frontier = staircase([point for curve in found[metric][1] for point in curve.points])
        for column, (title, drawn) in enumerate(panels):
            axes = figure.add_subplot(len(split), columns, line * columns + column + 1)
            draw(axes, metric, drawn, frontier)
            axes.set_title(title, fontsize=9, loc="left", color=INK)
    figure.suptitle(
        f"grey: the least that any of the public packages loses in so many bits or fewer; up to {MOST_BITS} bits",
        fontsize=9,
    )
    made = io.BytesIO()
    FigureCanvasAgg(figure).print_png(made)
    return made.getvalue()


def main() -> None:
    """Draw it, if there is something to draw."""
    found = {metric: curves(metric) for metric in LABELS}
    found = {metric: drawn for metric, drawn in found.items() if any(drawn)}
    if not found:
        print("results/weights.csv has no rows beside a dense model: run python -m benchmarks.weights first")
        return
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    write_atomic(file, picture(found))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
