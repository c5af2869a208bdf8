"""Small tables for facts that have no renderer of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pintpot.core.units import format_bytes

if TYPE_CHECKING:
    from pintpot.jobs.demo import Part
    from pintpot.jobs.text_training import TextResult
    from pintpot.jobs.training import TrainResult


def record_table(title: str, record: Mapping[str, Any]) -> Table:
    """A record as two columns; nested records become several rows, byte counts are shown in units."""
    table = Table(title=title, show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value")
    for name, value in _flat(record):
        table.add_row(name.replace("_", " "), _shown(name, value))
    return table


def training_record(out: Path, result: TrainResult) -> dict[str, Any]:
    """What a training run gave, JSON-able: its last figures and where it is."""
    last = result.curve[-1] if result.curve else {}
    return {"out": str(out), "steps": result.steps, "loss": result.loss, "run_seconds": result.seconds, "last": last}


def rows_table(title: str, rows: Sequence[Mapping[str, str]]) -> Table:
    """Rows with the same keys as a table."""
    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    return table


def _flat(record: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name} ")
        else:
            yield before + name, value


def _shown(name: str, value: Any) -> str:
    words = name.replace("_", " ").split()
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in words:
            return format_bytes(int(value)) + ("/s" if {"second", "bandwidth", "rate"} & set(words) else "")
        if "flops" in words:
            return f"{value / 1e9:,.1f} GFLOP/s"
        return f"{value:,.6g}"
    return str(value)


def text_record(result: TextResult) -> dict[str, Any]:
    """What training on text gave, JSON-able: ``figures`` for people, ``ledger`` for both."""
    from pintpot.ledger.report import to_json

    figures = {
        "out": str(result.out),
        "techniques": ", ".join(str(t) for t in result.plan.techniques) or "none",
        "steps": result.training.steps,
        "training_loss": result.training.loss,
        "held_out_loss_before": result.loss_before,
        "held_out_loss_after": result.loss_after,
        "seconds": result.training.seconds,
    }
    return {"figures": figures, "ledger": to_json(result.plan.predicted, result.measured, result.plan.budget)}


def demo_table(parts: Sequence[Part]) -> Table:
    """The summary of a demonstration, a column for each of its parts: budget, plain run, prediction, measurement."""
    table = Table(title="what was shown", show_lines=True)
    for column in ("", *(part.title for part in parts)):
        table.add_column(column, overflow="fold")
    records = [part.to_dict() for part in parts]
    table.add_row("budget", *(format_bytes(r["budget_bytes"]) for r in records))
    table.add_row("plain run, measured", *(f"{format_bytes(r['plain_bytes'])} (too much)" for r in records))
    table.add_row("chosen plan", *(escape(r["techniques"]) for r in records))
    table.add_row("predicted", *(format_bytes(r["predicted_bytes"]) for r in records))
    table.add_row("measured", *(format_bytes(r["measured_bytes"]) for r in records))
    table.add_row(
        "result", *(escape(f"{'fits' if r['passed'] else 'NOT as promised'}: {r['quality']}") for r in records)
    )
    return table
