"""Choosing the cheapest composition that fits: solve, check by predicting the whole, cut, and solve again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from pintpot.core.errors import BudgetError, CompositionError
from pintpot.core.expression import expression
from pintpot.core.ledger import Ledger, Tier
from pintpot.core.units import GiB, KiB, MiB, format_bytes, parse_bytes
from pintpot.core.workload import Budget
from pintpot.planner.options import choices, incomplete, undominated
from pintpot.planner.problem import Composition, Problem, excess, limits_of
from pintpot.planner.program import Program, Selection

Simulate = Callable[[Composition], Ledger]
"""The exact prediction of a composition, by running its job on tensors without data."""

MOST_CUTS = 40
"""Compositions that are tried for one answer; after so many that miss, the smallest found is taken."""
MOST_SIMULATIONS = 8
"""Compositions that are simulated before the smallest is offered instead."""

FLAGS = {Tier.DEVICE: "--device-memory", Tier.HOST: "--host-memory", Tier.DISK: "--disk"}
"""The option of the command line that limits each tier."""


@dataclass(frozen=True)
class Solution:
    """A composition with its predicted ledger (simulated where that was possible)."""

    techniques: Composition
    ledger: Ledger


Way = tuple[Solution, tuple[Tier, ...]]
"""A composition, and the tiers whose limits must give way for it."""


def flag_value(size: int) -> str:
    """The smallest size with two decimals, as written on the command line, that holds ``size`` bytes."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size >= unit:
            hundredths = math.ceil(size * 100 / unit)
            text = f"{hundredths / 100:.2f}{name}"
            return text if parse_bytes(text) >= size else f"{(hundredths + 1) / 100:.2f}{name}"
    return str(size)


def flags(ledger: Ledger, tiers: Collection[Tier]) -> str:
    """The command-line options under which a ledger's peaks on some tiers fit."""
    return " ".join(f"{FLAGS[tier]} {flag_value(max(1, ledger.peak_bytes(tier)))}" for tier in tiers)


def describe(techniques: Composition) -> str:
    """A composition for a sentence: its expression, or that it has no technique."""
    return expression(techniques) or "the plain job"


def solve(problem: Problem, simulate: Simulate | None = None) -> Solution:
    """The cheapest composition that fits: least risk, then least time, then fewest techniques, then by name.

    A job that fits as it is stays as it is, even where a technique promises more speed.

    Args:
        problem: what is asked.
        simulate: exact prediction, by which the choice is verified; the closed form alone without it.

    Raises:
        BudgetError: when nothing fits, with the smallest budget that would and its composition.
        CompositionError: when no technique can do the job at all.
    """
    if not incomplete((), problem.workload) and not excess(problem.baseline, limits_of(problem.budget)):
        return Solution((), problem.baseline)
    search = _Search(problem, simulate)
    found = search.cheapest()
    if found is not None:
        return found
    ways = search.smallest()
    if not ways:
        raise CompositionError(
            f"no registered technique can do this {problem.workload.job} job for this model",
            hint="run `pintpot techniques` to see which job each one serves",
        )
    for best, _ in ways:
        if not excess(best.ledger, limits_of(problem.budget)):
            return best
    raise _too_small(problem.budget, ways)


def _too_small(budget: Budget, ways: Sequence[Way]) -> BudgetError:
    """The error that states the smallest budgets that would fit, one for each tier that could give way."""
    stated = [
        f"{', '.join(f'{format_bytes(way.ledger.peak_bytes(tier))} on {tier}' for tier in tiers)},"
        f" with {describe(way.techniques)}"
        for way, tiers in ways
    ]
    options = " or ".join(flags(way.ledger, tiers) for way, tiers in ways)
    return BudgetError(
        f"nothing fits into the budget ({budget}): the smallest that would fit is {'; or '.join(stated)}",
        hint=f"give {options}, or make the job smaller (batch, tokens)",
    )


class _Search:
    """The loop around the program, which remembers what was predicted."""

    def __init__(self, problem: Problem, simulate: Simulate | None) -> None:
        self.problem = problem
        self.simulate = simulate
        self.limits = limits_of(problem.budget)
        self.program = Program(problem, choices(undominated(problem)))

    def cheapest(self) -> Solution | None:
        """The best composition that fits by the closed form, and by simulation where there is one."""
        refused: list[Selection] = []
        margins: dict[Tier, int] = {}
        for _ in range(MOST_SIMULATIONS):
            found = self._within(self._less(margins), refused)
            if found is None and margins:
                margins = {}
                found = self._within(self.limits, refused)
            if found is None:
                return None
            solution = self._exact(found)
            if not excess(solution.ledger, self.limits):
                return solution
            refused.append(found)
            margins = self._errors(found, solution.ledger)
        return None

    def smallest(self) -> list[Way]:
        """The compositions of the lowest peaks, each with the tiers whose limits give way for it.

        Each tier gives way alone where that is enough (the device first); if none is, all do. Among the
        compositions of the same peak it is the cheapest.
        """
        limited = tuple(self.limits)
        ways = [way for tier in limited for way in self._smallest_on((tier,))]
        return ways or self._smallest_on(limited)

    def _smallest_on(self, free: tuple[Tier, ...]) -> list[Way]:
        best = self._least(free)
        if best is None:
            return []
        peaks = self.problem.predict(self.program.techniques(best))
        wider = {t: max(1, peaks.peak_bytes(t)) if t in free else size for t, size in self.limits.items()}
        found = self._within(wider, ())
        return [(self._exact(best if found is None else found), free)]

    def _less(self, margins: Mapping[Tier, int]) -> dict[Tier, int]:
        return {tier: max(1, size - margins.get(tier, 0)) for tier, size in self.limits.items()}

    def _exact(self, selection: Selection) -> Solution:
        """The composition with its simulated ledger; the plain job's baseline is exact already."""
        techniques = self.program.techniques(selection)
        if self.simulate is None or not techniques:
            return Solution(techniques, self.problem.predict(techniques))
        return Solution(techniques, self.simulate(techniques))

    def _errors(self, selection: Selection, exact: Ledger) -> dict[Tier, int]:
        """Bytes by which the closed form was too low, by tier: the next choice keeps as much free."""
        predicted = self.problem.predict(self.program.techniques(selection))
        errors = {tier: exact.peak_bytes(tier) - predicted.peak_bytes(tier) for tier in self.limits}
        return {tier: size for tier, size in errors.items() if size > 0}

    def _within(self, limits: Mapping[Tier, int], refused: Collection[Selection]) -> Selection | None:
        """The cheapest selection whose whole closed-form prediction is within the limits."""
        cuts = list(refused)
        for _ in range(MOST_CUTS):
            found = self.program.cheapest(limits, cuts)
            if found is None:
                return None
            techniques = self.program.techniques(found)
            if not excess(self.problem.predict(techniques), limits):
                return found
            if not self.program.learn_within(found):
                cuts.append(found)
        return None

    def _least(self, free: tuple[Tier, ...]) -> Selection | None:
        """The selection with the lowest predicted peaks on ``free``, the other tiers within their limits."""
        fixed = {tier: size for tier, size in self.limits.items() if tier not in free}
        best: Selection | None = None
        best_peak = math.inf
        cuts: list[Selection] = []
        for _ in range(MOST_CUTS):
            solved = self.program.least(free, self.limits, cuts)
            if solved is None or solved[1] >= best_peak * (1 - 1e-6):
                break
            found = solved[0]
            ledger = self.problem.predict(self.program.techniques(found))
            peak = sum(ledger.peak_bytes(tier) / self.limits[tier] for tier in free)
            if not excess(ledger, fixed) and peak < best_peak:
                best, best_peak = found, peak
            if not self.program.learn_within(found):
                cuts.append(found)
        return best
