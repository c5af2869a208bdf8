"""The picture of the cache benchmark: mean accuracy of the recall tasks against bytes; keeps, stores and peers apart.

Run with ``python -m benchmarks.cache_picture [FILE]``; it reads ``results/cache.csv`` alone.
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cache_tasks import MEAN
from benchmarks.optim_picture import spread
from benchmarks.rows import read_rows
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pintpot.core.files import write_atomic
from pintpot.core.registry import techniques
from pintpot.ledger.render import INK

FILE = Path(__file__).parent.parent / "docs" / "cache-quality.png"

PANELS = {
    "keep": "what is kept",
    "store": "how it is stored, and both",
    "saving": "kvpress and transformers",
    "masking": "kvpress where it masks: all bytes are held,\ndrawn at the share that it attends to",
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D3B")
"""Okabe and Ito's, told apart by the colour-blind."""

MARKERS = "osD^vPX*"
LEFT = 3.0
"""Per cent of the dense bytes at the left edge."""


@dataclass(frozen=True)
class Curve:
    """A method's points: per cent of the dense cache's bytes, and mean accuracy."""

    name: str
    points: tuple[tuple[float, float], ...]

    @property
    def height(self) -> float:
        """Mean accuracy over its points, by which names are ordered."""
        return sum(accuracy for _, accuracy in self.points) / len(self.points)


def panel_of(row: dict[str, str]) -> str:
    """Where a row is drawn; nowhere if it is the baseline."""
    names = row["technique"].split("*")
    known = techniques("cache")
    if all(name in known for name in names):
        return "keep" if len(names) == 1 and known[names[0]].facts.part == "keep" else "store"
    if row["status"].startswith("baseline"):
        return ""
    return "masking" if row["status"].startswith("peer, which masks") else "saving"


def curves() -> tuple[dict[str, list[Curve]], float]:
    """The curves of each panel, and the accuracy of the dense cache: of the model that was measured last."""
    rows = [row for row in read_rows("cache") if row["metric"] == MEAN and row["value"]]
    rows = [row for row in rows if row["model"] == rows[-1]["model"] and row["data"] == rows[-1]["data"]]
    dense = next((row for row in rows if row["status"].startswith("baseline")), None)
    if dense is None:
        return {}, 0.0
    whole = int(dense["peak_bytes"])
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panel = panel_of(row)
        if panel:
            share = 100 * int(row["peak_bytes"]) / whole
            if panel == "masking":
                share = 100 * float(row["config"].rsplit(", ", 1)[1].split()[0])
            found[panel][row["technique"]].append((share, float(row["value"])))
    made = {
        panel: sorted((Curve(name, tuple(sorted(points))) for name, points in drawn.items()), key=lambda c: -c.height)
        for panel, drawn in found.items()
    }
    return {panel: made[panel] for panel in PANELS if panel in made}, float(dense["value"])


def best(drawn: Sequence[Curve]) -> list[tuple[float, float]]:
    """The best accuracy of any of these curves in so many bytes or fewer, as a staircase."""
    steps: list[tuple[float, float]] = []
    points = (point for curve in drawn for point in curve.points)
    for share, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not steps or accuracy > steps[-1][1]:
            steps.append((share, accuracy))
    return steps


def draw(axes: Axes, title: str, drawn: Sequence[Curve], dense: float, frontier: Sequence[tuple[float, float]]) -> None:
    """One panel; names stand in a column at its right, each tied to the right end of its curve."""
    axes.axhline(dense, color=INK, lw=0.7, ls=":")
    if frontier:
        shares, heights = zip(*frontier, (100.0, frontier[-1][1]), strict=True)
        axes.step(shares, heights, where="post", color="0.75", lw=3, zorder=0)
    ordered = sorted(drawn, key=lambda c: (c.points[-1][1], c.height))
    places = spread([min(max(c.points[-1][1], 0.0), 1.0) for c in ordered], 0.033)
    for index, (curve, place) in enumerate(zip(ordered, places, strict=True)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[(index // len(COLOURS) + index) % len(MARKERS)]
        shares, heights = zip(*curve.points, strict=True)
        axes.plot(shares, heights, color=colour, marker=marker, ms=5, lw=1.1, alpha=0.9, mec="white", mew=0.5)
        axes.plot([shares[-1], 108, 116], [heights[-1], place, place], color=colour, lw=0.4, alpha=0.6, clip_on=False)
        axes.text(120, place, curve.name, color=colour, fontsize=7, va="center", clip_on=False)
    axes.set_xscale("log")
    axes.set_xlim(LEFT, 105)
    axes.set_xticks([5, 12.5, 25, 50, 100], ["5", "12.5", "25", "50", "100"])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("bytes of the cache, % of the dense one's")
    axes.spines[["top", "right"]].set_visible(False)


def picture(panels: dict[str, list[Curve]], dense: float) -> bytes:
    """The whole picture as PNG."""
    figure = Figure(figsize=(13, 6.2 * ((len(panels) + 1) // 2)), layout="constrained", dpi=110)
    frontier = best(panels.get("saving", []))
    for index, (panel, drawn) in enumerate(panels.items()):
        axes = figure.add_subplot((len(panels) + 1) // 2, min(2, len(panels)), index + 1)
        draw(axes, PANELS[panel], drawn, dense, frontier)
        axes.set_ylabel(MEAN)
    figure.suptitle(
        "dotted: the dense cache; grey: the best of the peers that save bytes, in so many or fewer", fontsize=9
    )
    made = io.BytesIO()
    FigureCanvasAgg(figure).print_png(made)
    return made.getvalue()


def main() -> None:
    """Draw it, if there is something to draw."""
    panels, dense = curves()
    if not panels:
        print("results/cache.csv has no recall rows: run python -m benchmarks.cache first")
        return
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    write_atomic(file, picture(panels, dense))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
