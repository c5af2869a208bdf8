"""What the planner may choose from: the configurations of each technique, and their products in one slot."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from pintpot.core import slots
from pintpot.core.errors import CompositionError, PintpotError
from pintpot.core.expression import expression
from pintpot.core.ledger import Ledger, Tier
from pintpot.core.plan import Rejection
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Saving, Technique
from pintpot.core.workload import WORKLOADS, Workload
from pintpot.planner.problem import Composition, Problem, ordered

PATIENCE_SECONDS = 5.0
"""What applying a technique at the start of a run may take for the planner to offer it there."""


@dataclass(frozen=True)
class Choice:
    """One way to fill one slot: a technique, or several of different parts (a keep and a store)."""

    slot: str
    techniques: Composition

    def __str__(self) -> str:
        return expression(self.techniques)


def candidates(
    shape: ModelShape,
    workload: Workload,
    baseline: Ledger,
    kinds: Mapping[str, type[Technique]],
    exclude: Collection[str] = (),
) -> tuple[Composition, tuple[Rejection, ...]]:
    """The configurations that can serve a job, and the techniques that cannot with the reason.

    Args:
        shape: the model.
        workload: the job.
        baseline: its ledger without any technique, on which each configuration is tried once.
        kinds: techniques by name.
        exclude: names that the user does not want.
    """
    usable: dict[Technique, None] = {}
    rejected = []
    for name, kind in sorted(kinds.items()):
        reason = _unfit(kind, workload, exclude)
        if not reason:
            try:
                offered = tuple(kind.options(shape, workload))
                found = tuple(o for o in offered if o.seconds_to_apply(shape, workload) <= PATIENCE_SECONDS)
                for option in found:
                    option.predict(baseline, shape, workload)
            except PintpotError as error:
                reason = f"cannot be used on this model: {error.message}"
            else:
                usable.update(dict.fromkeys(found))
                nothing = "takes too long to apply in a run" if offered else "offers no configuration"
                reason = "" if found else f"{nothing} for this model and job"
        if reason:
            rejected.append(Rejection(name, reason))
    return ordered(usable), tuple(rejected)


def _unfit(kind: type[Technique], workload: Workload, exclude: Collection[str]) -> str:
    facts = kind.facts
    if workload.job not in facts.jobs:
        return f"does not serve {workload.job} (it serves {', '.join(facts.jobs) or 'no job, only Python'})"
    if facts.name in exclude:
        return "excluded on request"
    if facts.saving is Saving.SIMULATED:
        return "its saving is simulated: it frees no bytes"
    return ""


def undominated(problem: Problem) -> Composition:
    """The configurations to which no other of the same part is preferable whatever the budget.

    Wings have many methods for the same purpose, and their products multiply: only what could be chosen goes on.
    """
    risks = {option: problem.risk((option,)) for option in problem.techniques}
    sizes = {option: _sizes(problem.predict((option,))) for option in problem.techniques}

    def beats(one: Technique, other: Technique) -> bool:
        a, b = one.facts, other.facts
        if (a.slot, a.part) != (b.slot, b.part) or not (a.needs <= b.needs and a.removes <= b.removes):
            return False
        return risks[one] < risks[other] and all(size <= sizes[other].get(at, 0) for at, size in sizes[one].items())

    return tuple(option for option in risks if not any(beats(rival, option) for rival in risks))


def _sizes(ledger: Ledger) -> dict[tuple[str, Tier], int]:
    """Peaks by phase and tier."""
    return {(phase, tier): ledger.phase(phase, tier).total(tier) for phase in ledger.phases() for tier in Tier}


def choices(techniques: Iterable[Technique]) -> tuple[Choice, ...]:
    """Every way to fill each slot: all products of its parts that do not conflict, in a fixed order."""
    parts: dict[str, dict[str, list[Technique | None]]] = {}
    for technique in ordered(techniques):
        facts = technique.facts
        parts.setdefault(facts.slot, {}).setdefault(facts.part, [None]).append(technique)
    found = []
    for slot, by_part in parts.items():
        for combination in product(*by_part.values()):
            chosen = ordered(t for t in combination if t is not None)
            pairs = ((a, b) for i, a in enumerate(chosen) for b in chosen[i + 1 :])
            if chosen and not any(slots.conflict(a, b) for a, b in pairs):
                found.append(Choice(slot, chosen))
    return tuple(sorted(found, key=lambda c: (c.slot, len(c.techniques), str(c))))


def freezes(technique: Technique) -> bool:
    """Whether the weights can no longer be trained themselves beside this technique."""
    return "dense_weights" in technique.facts.removes


def incomplete(techniques: Composition, workload: Workload) -> str:
    """Why a composition, though free of conflicts, does not do the job; an empty string when it does."""
    if workload.training and not any(t.facts.slot == "adapters" for t in techniques):
        frozen = next((t.name for t in techniques if freezes(t)), "")
        if frozen:
            return f"{frozen} freezes the weights, and nothing else would be trained"
    if workload.job == "compress" and not any(t.facts.slot == "weights" for t in techniques):
        return "nothing would be compressed"
    return ""


def check(techniques: Composition, workload: Workload) -> None:
    """Refuse a composition that cannot run, or that does not do the job.

    Raises:
        CompositionError: naming every conflict.
    """
    if workload.job not in WORKLOADS:
        raise CompositionError(f"unknown job {workload.job!r}", hint=f"one of: {', '.join(WORKLOADS)}")
    slots.check(techniques, workload.job)
    reason = incomplete(techniques, workload)
    if reason:
        slot = "adapters" if workload.training else "weights"
        raise CompositionError(reason, hint=f"add a technique of the {slot} slot")
