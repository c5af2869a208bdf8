"""The picture of the pretraining benchmark: held-out perplexity against optimizer bytes, a panel for each size.

Run with ``python -m benchmarks.optim_picture [FILE]``; it reads ``results/optim.csv`` alone.
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.rows import read_rows
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pintpot.core.files import write_atomic
from pintpot.core.registry import techniques
from pintpot.ledger.render import INK
from pintpot.optim._base import ProjectedMethod

FILE = Path(__file__).parent.parent / "docs" / "optim-pretraining.png"
HIGHEST = 1.6
"""Perplexities above this many times AdamW's are drawn at the top edge."""

WIDEST = 1.1
"""States above this many times AdamW's are drawn at the right edge, their size beside the name."""

FAMILIES = {
    "AdamW": ("black", "*"),
    "projected gradients": ("#0072B2", "o"),
    "blocks in turn": ("#CC79A7", "D"),
    "other rules and packed states": ("#E69F00", "s"),
    "other parameters (LoRA and kin)": ("#009E73", "^"),
}
"""Colour (Okabe and Ito's, told apart by the colour-blind) and marker of each family."""


@dataclass(frozen=True)
class Point:
    """One method in one panel."""

    name: str
    family: str
    megabytes: float
    perplexity: float
    deviation: float


def family(name: str) -> str:
    """Where a method belongs."""
    kind = techniques("optim").get(name)
    if name.startswith("torch AdamW"):
        return "AdamW"
    if kind is None or kind.facts.part == "parameters":
        return "other parameters (LoRA and kin)"
    if kind.facts.part:
        return "other rules and packed states"
    chooses = issubclass(kind, ProjectedMethod) and kind().select() is not None
    return "blocks in turn" if chooses else "projected gradients"


def points() -> dict[str, list[Point]]:
    """The methods of each panel, by its title: the newest protocol of each model."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in read_rows("optim"):
        if row["model"].startswith("llama ") and row["value"]:
            found[row["model"], row["data"]][row["technique"]][row["metric"].split(" over ")[0]] = float(row["value"])
    newest = {model: (model, data) for model, data in found}
    panels = {}
    for key in newest.values():
        panels[f"{key[0]}\n{key[1]}"] = [
            Point(
                name,
                family(name),
                measured["optimizer state"] / 1e6,
                measured["held-out perplexity"],
                measured.get("standard deviation of the perplexity", 0.0),
            )
            for name, measured in found[key].items()
            if {"optimizer state", "held-out perplexity"} <= set(measured)
        ]
    return {title: panel for title, panel in panels.items() if any(p.name == "torch AdamW" for p in panel)}


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted (ascending) that are a gap apart and between 0 and 1, if there is room."""
    gap = min(gap, 1.0 / max(1, len(wanted) - 1))
    # Less the gaps below them the places need only ascend: neighbours that do not are moved to their mean.
    pools: list[list[float]] = []
    for index, place in enumerate(wanted):
        pools.append([place - index * gap])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    ceiling = 1.0 - gap * (len(wanted) - 1)
    level = [min(max(fmean(pool), 0.0), ceiling) for pool in pools for _ in pool]
    return [place + index * gap for index, place in enumerate(level)]


def draw(axes: Axes, title: str, panel: list[Point]) -> None:
    """One panel; names stand in a column at its right, each tied to its point."""
    base = next(p for p in panel if p.name == "torch AdamW")
    finite = [min(p.perplexity, HIGHEST * base.perplexity) for p in panel]
    low, high = min(finite), max(finite)
    low, high = low - 0.04 * (high - low) - 1e-9, high + 0.04 * (high - low) + 1e-9
    limit = WIDEST * base.megabytes
    widest = max(min(p.megabytes, limit) for p in panel)
    ordered = sorted(panel, key=lambda p: (min(p.perplexity, HIGHEST * base.perplexity), p.perplexity, p.name))
    shown = [min(p.perplexity, HIGHEST * base.perplexity) for p in ordered]
    inside = 0.96 * (high - low)
    lowest = low + 0.02 * (high - low)
    places = spread([(y - lowest) / inside for y in shown], 0.034)
    for point, y, place in zip(ordered, shown, places, strict=True):
        colour, marker = FAMILIES[point.family]
        x, text_y = min(point.megabytes, limit), lowest + place * inside
        axes.plot([x, 1.06 * widest, 1.1 * widest], [y, text_y, text_y], color=colour, lw=0.5, alpha=0.5)
        axes.errorbar(x, y, yerr=point.deviation or None, color=colour, lw=1, capsize=2)
        size = 14 if point.family == "AdamW" else 7
        axes.plot(x, y, marker, color=colour, markersize=size, markeredgecolor="white", linestyle="")
        weight = "bold" if point.name in ("torch AdamW", "lora") else "normal"
        beyond = f"  ({point.megabytes:.0f} MB)" if point.megabytes > limit else ""
        label = f"{point.name}  {point.perplexity:.4g}{beyond}"
        axes.text(1.11 * widest, text_y, label, color=INK, fontsize=8, va="center", weight=weight)
    axes.plot([0, 1.06 * widest], [base.perplexity, base.perplexity], color=INK, lw=0.7, ls=":")
    axes.set_xlim(-0.03 * widest, 1.55 * widest)
    axes.set_ylim(low, high)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 1.02 * widest])
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("optimizer state (MB)", x=0.33)
    axes.set_ylabel(f"held-out perplexity (above {HIGHEST:g} times AdamW's: at the edge)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(-0.03 * widest, 1.06 * widest)


def picture(panels: dict[str, list[Point]]) -> bytes:
    """The whole picture as PNG."""
    figure = Figure(figsize=(8 * len(panels), 7.5), layout="constrained")
    for index, (title, panel) in enumerate(panels.items()):
        draw(figure.add_subplot(1, len(panels), index + 1), title, panel)
    handles = [
        figure.axes[0].plot([], [], marker, color=colour, linestyle="", label=name)[0]
        for name, (colour, marker) in FAMILIES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(FAMILIES), frameon=False, fontsize=9)
    made = io.BytesIO()
    FigureCanvasAgg(figure).print_png(made)
    return made.getvalue()


def main() -> None:
    """Draw it, if there is something to draw."""
    panels = points()
    if not panels:
        print("results/optim.csv has no pretraining rows: run python -m benchmarks.optim_pretraining first")
        return
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    write_atomic(file, picture(panels))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
