"""Plans as YAML files: written to be read and edited by people, and read with errors that name the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pintpot.core.errors import PintpotError
from pintpot.core.expression import expression, parse
from pintpot.core.files import write_atomic
from pintpot.core.ledger import Account, Cell, Ledger, Moment, Tier
from pintpot.core.plan import Forecast, ModelIdentity, Plan, Rejection
from pintpot.core.registry import techniques as registered
from pintpot.core.shape import ModelShape
from pintpot.core.slots import check as slots_check
from pintpot.core.units import GiB, KiB, MiB, TiB, format_bytes, parse_bytes
from pintpot.core.workload import WORKLOADS, Budget, Workload, workload_from_dict
from pintpot.planner.options import check
from pintpot.planner.problem import Composition, ordered
from pintpot.planner.yaml_marks import Entry, compose

FORMAT = 1
"""Version of the file format that is written, and the only one that is read."""

_ASKED = ("format", "model", "workload", "budget", "techniques", "seed")
_ANSWERED = ("made_for", "fits", "risk", "forecast", "predicted", "rejected")
_SPEEDS = ("prefill_seconds", "decode_seconds", "step_seconds")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def write_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan as YAML, wholly or not at all; ``read_plan`` gives the same plan back."""
    write_atomic(path, "\n".join(_lines(plan)) + "\n")


def read_plan(path: str | Path, shape: ModelShape | None = None) -> Plan:
    """The plan of a file, every part of it checked.

    Where the upper half (model, workload, budget, techniques) was edited by hand, the figures in the lower
    half no longer belong to it: the plan then comes without prediction, forecast and rejections, and with
    ``fits`` false. ``pintpot.jobs.plan.plan_from_file`` predicts it again.

    Args:
        path: the file.
        shape: the model that it will be run on, when known: a plan for another one is refused.

    Raises:
        PlanError: naming the file and the line.
    """
    entries = compose(path).fields((*_ASKED, *_ANSWERED), ("format", "model", "workload"))
    version = entries["format"].whole()
    if version != FORMAT:
        raise entries["format"].error(f"plan format {version} is not {FORMAT}", "make the plan again with this version")
    workload = _read_workload(entries["workload"])
    asked = Plan(
        model=_read_model(entries["model"], shape),
        workload=workload,
        budget=_read_budget(entries["budget"]) if "budget" in entries else Budget(),
        techniques=_read_techniques(entries["techniques"], workload) if "techniques" in entries else (),
        predicted=Ledger("predicted"),
        fits=False,
        seed=entries["seed"].whole() if "seed" in entries else 0,
    )
    answered = _read_answer(asked, entries)
    edited = "made_for" not in entries or entries["made_for"].text() != digest(asked)
    return asked if edited else answered


def digest(plan: Plan) -> str:
    """What a prediction belongs to: a digest of the model, workload, budget and techniques."""
    size = plan.model.size_bytes
    asked = [
        [plan.model.fingerprint, plan.model.dtype, *([] if size is None else [size])],
        plan.workload.to_dict(),
        plan.budget.to_dict(),
        expression(plan.techniques),
    ]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def size_text(size: int) -> str:
    """A size as people write it, where that is exact (``"6GiB"``), else the bytes."""
    for unit, name in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        text = f"{size / unit:.6g}{name}"
        if size >= unit and "e" not in text and parse_bytes(text) == size:
            return text
    return str(size)


def _scalar(value: Any) -> str:
    """A value in YAML on one line."""
    if isinstance(value, str) and not value.isprintable():
        return yaml.safe_dump(value, width=10**9, default_style='"').rstrip("\n")
    return yaml.safe_dump(value, width=10**9, allow_unicode=True, default_flow_style=True).split("\n")[0]


def _lines(plan: Plan) -> Iterator[str]:
    yield f"# A plan of Pintpot. Edit it, then run it: pintpot {plan.workload.job} MODEL --plan THIS_FILE"
    yield f"format: {FORMAT}"
    yield "model:"
    yield f"  name: {_scalar(plan.model.name)}"
    yield f"  fingerprint: {_scalar(plan.model.fingerprint)}  # of the architecture: the plan fits no other"
    yield f"  dtype: {_scalar(plan.model.dtype)}"
    if plan.model.size_bytes is not None:
        yield f"  size_bytes: {plan.model.size_bytes}  # {format_bytes(plan.model.size_bytes)} of weights are loaded"
    yield "workload:"
    yield from (f"  {name}: {_scalar(value)}" for name, value in plan.workload.to_dict().items())
    yield "budget:" if plan.budget.to_dict() else "budget: {}  # no limit"
    for tier, size in plan.budget.to_dict().items():
        text = size_text(size)
        yield f"  {tier}: {text}" + (f"  # {format_bytes(size)}" if text.isdigit() else "")
    slots = list(dict.fromkeys(t.facts.slot for t in plan.techniques))
    yield "techniques:  # by slot; see `pintpot techniques`" if slots else "techniques: {}  # none is needed"
    yield from (f"  {slot}: {_scalar(expression(plan.in_slot(slot)))}" for slot in slots)
    yield f"seed: {plan.seed}"
    yield ""
    yield "# What was predicted for the above. After an edit it is made again, and nothing below is used."
    yield f"made_for: {_scalar(digest(plan))}"
    yield f"fits: {_scalar(plan.fits)}"
    yield f"risk: {_scalar(float(plan.risk))}  # expected relative rise of perplexity"
    yield from _forecast_lines(plan.forecast)
    yield from _ledger_lines(plan.predicted)
    yield "rejected:" if plan.rejected else "rejected: []"
    for rejection in plan.rejected:
        yield f"  - technique: {_scalar(rejection.technique)}"
        yield f"    reason: {_scalar(rejection.reason)}"


def _forecast_lines(forecast: Forecast | None) -> Iterator[str]:
    if forecast is None:
        yield "forecast: null"
        return
    speeds = {name: getattr(forecast, name) for name in _SPEEDS}
    known = {name: seconds for name, seconds in speeds.items() if seconds is not None}
    yield "forecast:" if known or forecast.bound_by else "forecast: {}"
    yield from (f"  {name}: {_scalar(float(seconds))}" for name, seconds in known.items())
    if forecast.bound_by:
        yield "  bound_by:"
        yield from (f"    {_scalar(phase)}: {_scalar(cause)}" for phase, cause in forecast.bound_by)


def _ledger_lines(ledger: Ledger) -> Iterator[str]:
    yield "predicted:  # bytes at the peak of each phase" if ledger.moments else "predicted: []"
    for moment in ledger.moments:
        yield f"  - phase: {_scalar(moment.phase)}"
        for tier in Tier:
            accounts = moment.by_account(tier)
            if accounts:
                yield f"    {tier}:  # {format_bytes(moment.total(tier))}"
                yield from (f"      {account}: {size}  # {format_bytes(size)}" for account, size in accounts.items())


def _read_model(entry: Entry, shape: ModelShape | None) -> ModelIdentity:
    required = ("name", "fingerprint", "dtype")
    parts = entry.fields((*required, "size_bytes"), required)
    size = parts["size_bytes"].whole() if "size_bytes" in parts else None
    name, fingerprint, dtype = (parts[key].text() for key in required)
    model = ModelIdentity(name, fingerprint, dtype, size)
    if model.dtype not in _DTYPES:
        raise parts["dtype"].error(f"unknown dtype {model.dtype!r}", f"one of: {', '.join(_DTYPES)}")
    if shape is not None and shape.fingerprint != model.fingerprint:
        raise parts["fingerprint"].error(
            f"the plan was written for another model ({model.name}), not for {shape.name or 'this one'}",
            "make a plan for this model with `pintpot plan`",
        )
    return model


def _read_workload(entry: Entry) -> Workload:
    pairs = dict(entry.pairs())
    known = {name for kind in WORKLOADS.values() for name in kind.__dataclass_fields__}
    for name, value in pairs.items():
        _named(value, partial(_check_size, name, value, known))
    return _named(entry, lambda: workload_from_dict({name: value.value() for name, value in pairs.items()}))


def _check_size(name: str, value: Entry, known: set[str]) -> None:
    """Refuse a job or one of its sizes on its own line; what concerns the workload as a whole comes later."""
    if name == "job":
        workload_from_dict({"job": value.value()})
    elif name not in known:
        raise value.error(f"a workload has no size called {name!r}", f"sizes: {', '.join(sorted(known))}")
    elif value.whole() < 1:
        raise value.error(f"{name} must be at least 1, not {value.whole()}", "give a positive count")


def _read_budget(entry: Entry) -> Budget:
    limits = entry.fields([str(tier) for tier in Tier])
    return Budget(**{name: _named(value, partial(_bytes, value)) for name, value in limits.items()})


def _bytes(entry: Entry) -> int:
    value = entry.value()
    if isinstance(value, float):
        raise entry.error(f"{value} is not a size", "write it like 6GiB, 900MB or 1500000000")
    return parse_bytes(value if type(value) is int else entry.text())


def _read_techniques(entry: Entry, workload: Workload) -> Composition:
    chosen: list[Any] = []
    slots = sorted({kind.facts.slot for kind in registered().values()})
    for slot, value in entry.fields(slots).items():
        filling = _named(value, partial(parse, value.text()))
        for technique in filling:
            if technique.facts.slot != slot:
                raise value.error(
                    f"{technique.name} does not fill the {slot} slot", f"write it under {technique.facts.slot}"
                )
        _named(value, partial(slots_check, filling, workload.job))
        chosen += filling
    techniques = ordered(chosen)
    _named(entry, partial(check, techniques, workload))
    return techniques


def _read_answer(asked: Plan, entries: Mapping[str, Entry]) -> Plan:
    rejected = []
    for item in entries["rejected"].items() if "rejected" in entries else []:
        parts = item.fields(("technique", "reason"), ("technique", "reason"))
        rejected.append(Rejection(parts["technique"].text(), parts["reason"].text()))
    return replace(
        asked,
        predicted=_read_ledger(entries["predicted"]) if "predicted" in entries else asked.predicted,
        forecast=_read_forecast(entries["forecast"]) if "forecast" in entries else None,
        risk=entries["risk"].number() if "risk" in entries else 0.0,
        fits=entries["fits"].truth() if "fits" in entries else False,
        rejected=tuple(rejected),
    )


def _read_forecast(entry: Entry) -> Forecast | None:
    if isinstance(entry.node, yaml.ScalarNode):
        if entry.value() is None:
            return None
        raise entry.error("forecast must be a list of `key: value` lines", "write null where there is none")
    parts = entry.fields((*_SPEEDS, "bound_by"))
    causes = parts["bound_by"].pairs() if "bound_by" in parts else []
    speeds = {name: parts[name].number() for name in _SPEEDS if name in parts}
    return Forecast(**speeds, bound_by=tuple((phase, cause.text()) for phase, cause in causes))


def _read_ledger(entry: Entry) -> Ledger:
    moments = []
    for item in entry.items():
        tiers = item.fields(("phase", *map(str, Tier)), ("phase",))
        cells: dict[Cell, int] = {}
        for tier in Tier:
            accounts = tiers[tier].fields([str(a) for a in Account]) if tier in tiers else {}
            cells.update({(Account(name), tier): size.whole() for name, size in accounts.items()})
        moments.append(Moment(tiers["phase"].text(), cells))
    return Ledger("predicted", tuple(moments))


def _named(entry: Entry, read: Callable[[], Any]) -> Any:
    """What ``read`` gives; an error of ours is given the file and the line of the entry."""
    try:
        return read()
    except PintpotError as error:
        if error.message.startswith(f"{entry.file}, line "):
            raise
        raise entry.because(error) from error
