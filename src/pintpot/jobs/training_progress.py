"""What a training run shows while it goes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pintpot.core.units import format_bytes
from pintpot.ledger.process import resident_bytes

Reporter = Callable[[dict[str, float]], None]
"""Shows one row of the curve."""

_USUAL = frozenset({"step", "tokens", "loss", "learning_rate", "gradient_norm", "seconds"})
_LINE_SECONDS = 20.0


@contextmanager
def reporter(show: bool, steps: int, memory_budget_bytes: int | None) -> Iterator[Reporter]:
    """A reporter for the rows of a run.

    Args:
        show: False shows nothing.
        steps: steps of the whole run.
        memory_budget_bytes: shown beside the memory of the process when given.
    """
    console = Console(stderr=True)
    if not show:
        yield lambda row: None
    elif console.is_terminal:
        with _bar(console, steps) as progress:
            yield _bar_reporter(progress, steps, memory_budget_bytes)
    else:
        yield _line_reporter(steps, memory_budget_bytes)


def _bar(console: Console, steps: int) -> Progress:
    return Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


def _describe(row: dict[str, float], rate: float, memory_budget_bytes: int | None) -> str:
    memory = f"process {format_bytes(resident_bytes() or 0)}"
    if memory_budget_bytes is not None:
        memory += f" (budget for tensors {format_bytes(memory_budget_bytes)})"
    return f"loss {row['loss']:.3f}, {rate:,.0f} tokens/s, {memory}"


def _rates() -> Callable[[dict[str, float]], float]:
    """Tokens per second, smoothed over steps."""
    smooth = 0.0
    before: dict[str, float] = {}

    def rate(row: dict[str, float]) -> float:
        nonlocal smooth
        if before or row["step"] == 1:
            now = (row["tokens"] - before.get("tokens", 0)) / max(row["seconds"], 1e-9)
            smooth = now if smooth == 0.0 else 0.9 * smooth + 0.1 * now
        before.update(row)
        return smooth

    return rate


def _figures(row: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in _USUAL)


def _bar_reporter(progress: Progress, steps: int, memory_budget_bytes: int | None) -> Reporter:
    task = progress.add_task("", total=steps)
    rate = _rates()

    def report(row: dict[str, float]) -> None:
        text = _describe(row, rate(row), memory_budget_bytes)
        progress.update(task, completed=int(row["step"]), description=text)
        if _figures(row):
            progress.console.print(f"step {int(row['step'])}: {_figures(row)}")

    return report


def _line_reporter(steps: int, memory_budget_bytes: int | None) -> Reporter:
    rate = _rates()
    shown = 0.0

    def report(row: dict[str, float]) -> None:
        nonlocal shown
        speed, figures = rate(row), _figures(row)
        if figures or row["step"] == steps or time.monotonic() - shown > _LINE_SECONDS:
            shown = time.monotonic()
            text = _describe(row, speed, memory_budget_bytes)
            line = f"step {int(row['step'])} of {steps}: {text}" + (f", {figures}" if figures else "")
            print(line, file=sys.stderr, flush=True)

    return report
