"""A plan in words: what was chosen, what it needs, how fast it will be, and what was not chosen and why."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pintpot.core.ledger import Ledger, Tier
from pintpot.core.plan import Forecast, Plan
from pintpot.core.technique import Technique
from pintpot.core.units import format_bytes, format_seconds
from pintpot.core.workload import Workload
from pintpot.ledger.report import table
from pintpot.planner.problem import excess, limits_of, total_seconds

SLOW_SECONDS = {"decode_seconds": 1.0, "prefill_seconds": 60.0, "step_seconds": 60.0}
"""From here on a forecast is a warning: few people wait so long for a token, a prompt or an update."""


def explain(plan: Plan) -> RenderableType:
    """The plan for the terminal."""
    parts: list[RenderableType] = [Text(headline(plan), style="bold"), _chosen(plan)]
    if plan.predicted.moments:
        parts.append(table(plan.predicted, budget=plan.budget))
    if not plan.predicted.moments or set(limits_of(plan.budget)) - {Tier.DEVICE}:
        parts.append(Text(verdict(plan), style="green" if plan.fits else "red"))
    if plan.forecast is not None:
        parts.append(Text(speed(plan.forecast, plan.workload)))
    parts += [Text(f"Warning: {warning}", style="yellow") for warning in warnings(plan)]
    if plan.rejected:
        parts.append(_rejected(plan))
    return Group(*parts)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able facts: bytes, seconds and expressions."""
    forecast = plan.forecast
    return {
        "model": {key: value for key, value in asdict(plan.model).items() if value is not None},
        "workload": plan.workload.to_dict(),
        "budget": plan.budget.to_dict(),
        "techniques": [
            {"name": t.name, "slot": t.facts.slot, "expression": str(t), "summary": summary(t)} for t in plan.techniques
        ],
        "fits": plan.fits,
        "peak_bytes": {str(tier): plan.predicted.peak_bytes(tier) for tier in _tiers(plan.predicted)},
        "predicted": plan.predicted.to_dict(),
        "forecast": None
        if forecast is None
        else {
            "prefill_seconds": forecast.prefill_seconds,
            "decode_seconds": forecast.decode_seconds,
            "step_seconds": forecast.step_seconds,
            "total_seconds": total_seconds(forecast, plan.workload),
            "bound_by": dict(forecast.bound_by),
        },
        "risk": plan.risk,
        "warnings": list(warnings(plan)),
        "rejected": [{"technique": r.technique, "reason": r.reason} for r in plan.rejected],
        "seed": plan.seed,
    }


def summary(technique: Technique) -> str:
    """One sentence on a technique: the first line of its page, without its name."""
    page = inspect.cleandoc(sys.modules[type(technique).__module__].__doc__ or "").split("\n\n")[0]
    first = " ".join(page.split())
    name, colon, rest = first.partition(": ")
    return rest if colon and len(name.split()) <= 3 else first or technique.facts.source.title


def headline(plan: Plan) -> str:
    """Which job of which model, within what."""
    sizes = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in plan.workload.to_dict().items() if k != "job")
    part = "" if plan.model.size_bytes is None else f", {format_bytes(plan.model.size_bytes)} of its weights"
    name = plan.model.name or "the model"
    return f"{plan.workload.job} with {name} ({plan.model.dtype}{part}; {sizes}), {_budget(plan)}"


def verdict(plan: Plan) -> str:
    """Whether it fits on every limited tier, and by how much; the table says it for the device alone."""
    if not plan.predicted.moments:
        return "Not predicted: the plan was edited by hand since it was made."
    limits = limits_of(plan.budget)
    if not limits:
        return f"No limit was given; the peak is {format_bytes(plan.predicted.peak_bytes())}."
    if not plan.fits:
        over = ", ".join(f"{format_bytes(n)} over on {tier}" for tier, n in excess(plan.predicted, limits).items())
        return f"Does not fit: {over}."
    free = ", ".join(
        f"{format_bytes(n - plan.predicted.peak_bytes(tier))} free on {tier}" for tier, n in limits.items()
    )
    return f"Fits, with {free} at the peak."


def speed(forecast: Forecast, workload: Workload) -> str:
    """The forecast in one sentence, such as ``prefill 3.1 s, then 12.0 tokens/s (bound by memory)``."""
    causes = dict(forecast.bound_by)

    def cause(phase: str) -> str:
        return f" (bound by {causes[phase]})" if phase in causes else ""

    parts = []
    if forecast.prefill_seconds is not None:
        parts.append(f"prefill {format_seconds(forecast.prefill_seconds)}{cause('prefill')}")
    if forecast.decode_seconds is not None:
        each = forecast.decode_seconds
        batch = getattr(workload, "batch", 1)
        rate = f"{batch / each:.3g} tokens/s" if 0 < each <= 1 else f"{format_seconds(each)} a token"
        parts.append(f"then {rate}{cause('decode')}")
    if forecast.step_seconds is not None:
        parts.append(f"{format_seconds(forecast.step_seconds)} a step{cause('step')}")
    total = total_seconds(forecast, workload)
    return f"Forecast: {', '.join(parts)}; {format_seconds(total)} in all." if parts else "Forecast: none for this job."


def warnings(plan: Plan) -> Iterator[str]:
    """What the user should know before starting: slow forecasts and costly compositions."""
    for name, limit in SLOW_SECONDS.items():
        seconds = getattr(plan.forecast, name, None)
        if seconds is not None and seconds > limit:
            what = {"decode_seconds": "token", "prefill_seconds": "prompt", "step_seconds": "step"}[name]
            yield f"it fits, but slowly: {format_seconds(seconds)} for each {what}"
    if plan.risk >= 0.1:
        yield f"quality may suffer: perplexity is expected to rise by about {plan.risk:.0%}"


def _budget(plan: Plan) -> str:
    return f"within {plan.budget}" if plan.budget.to_dict() else "without a limit"


def _tiers(ledger: Ledger) -> list[Tier]:
    return list(dict.fromkeys(tier for moment in ledger.moments for _, tier in moment.cells))


def _chosen(plan: Plan) -> RenderableType:
    if not plan.techniques:
        fits = "it fits as it is" if plan.fits else "none was asked for"
        return Text(f"No technique is used: {fits}.")
    rows = Table.grid(padding=(0, 2))
    for technique in plan.techniques:
        rows.add_row(Text(technique.facts.slot, style="dim"), Text(str(technique), style="bold"), summary(technique))
    risk = f"Expected rise of perplexity: {plan.risk:.2%}." if plan.risk else "No loss of quality is expected."
    return Group(rows, Text(risk))


def _rejected(plan: Plan) -> RenderableType:
    rows = Table(title="Not chosen", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for rejection in plan.rejected:
        rows.add_row(Text(rejection.technique), Text(rejection.reason, style="dim"))
    return rows
