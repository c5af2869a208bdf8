"""Which techniques can stand together in one run. The whole compatibility rule is ``check``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

from pintpot.core.errors import CompositionError
from pintpot.core.technique import Technique

EXCEPTIONS: Mapping[frozenset[str], str] = {}
"""Pairs of technique names that the rule would allow but that cannot work, with the reason."""


def conflict(first: Technique, second: Technique) -> str:
    """Why two techniques cannot be used together, or an empty string when they can.

    They conflict when both want the same part of the same slot, or when one removes what the other needs.
    """
    a, b = first.facts, second.facts
    if (a.slot, a.part) == (b.slot, b.part):
        role = f"the {a.slot} slot" if not a.part else f"the {a.part} part of the {a.slot} slot"
        return f"both fill {role}"
    for one, other in ((a, b), (b, a)):
        lost = sorted(one.removes & other.needs)
        if lost:
            return f"{one.name} removes {', '.join(lost)}, which {other.name} needs"
    return EXCEPTIONS.get(frozenset((a.name, b.name)), "")


def check(techniques: Iterable[Technique], job: str) -> None:
    """Refuse a set of techniques that cannot run together, or not for this job.

    Raises:
        CompositionError: naming every conflict at once, or what one has nothing to do without.
    """
    chosen = tuple(techniques)
    reasons = [
        f"{t.name} does not serve {job} (it serves {', '.join(t.facts.jobs) or 'no job, only Python'})"
        for t in chosen
        if job not in t.facts.jobs
    ]
    for first, second in combinations(chosen, 2):
        reason = conflict(first, second)
        if reason:
            reasons.append(f"{first.name} with {second.name}: {reason}")
    if reasons:
        raise CompositionError("; ".join(reasons), hint="drop one of each pair, or run them one after the other")
    filled = {(t.facts.slot, t.facts.part) for t in chosen}
    for facts in (t.facts for t in chosen):
        if facts.beside and (facts.slot, facts.beside) not in filled:
            raise CompositionError(
                f"{facts.name} has nothing to do without a technique of the {facts.beside} part of the {facts.slot} "
                "slot",
                hint=f"add one, or leave {facts.name} out",
            )
