"""The planner's mixed-integer program: one binary variable a choice, one product variable an interacting pair.

Bytes are a constant (the plain job), plus what each choice changes alone, plus what each pair of choices
changes beyond that, for every phase and limited tier. So it is exact for every composition of two slots, and
for larger ones in which no three slots act on the same bytes at once; ``solve`` checks the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

from pintpot.core import slots
from pintpot.core.errors import PlanError
from pintpot.core.ledger import Ledger, Tier
from pintpot.core.technique import Technique
from pintpot.planner.options import Choice, freezes
from pintpot.planner.problem import Composition, Problem, limits_of, ordered

Vector = NDArray[np.float64]
Selection = frozenset[int]
"""Indices of the choices taken."""

RISK_UNIT = 1e-5
"""Differences in risk below this are noise: one hundred-thousandth of the perplexity."""
TIME_UNIT = 1e-4
"""Differences in time below this share of the plain job's are noise."""
PEAK_GAP = 1e-4
"""The smallest peak is looked for to this relative precision."""
SOLVE_ERROR = 4
"""The solver's status when it stops without an answer."""
EAGER_PAIRS = 2000
"""Up to so many pairs of choices are predicted at the start. Beyond, choices that another betters in everything are
left out first, and if that is not enough, only the pairs of compositions that are found are predicted."""


class _Rows:
    """Linear constraints, collected one at a time."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.upper: list[float] = []

    def at_most(self, terms: Iterable[tuple[int, float]], upper: float) -> None:
        """Add: the sum of coefficient times variable is at most ``upper``."""
        row = len(self.upper)
        self.entries += [(row, column, value) for column, value in terms if value]
        self.upper.append(upper)

    def constraint(self, columns: int) -> LinearConstraint:
        """All of them as one constraint over ``columns`` variables."""
        rows, places, values = zip(*self.entries, strict=True) if self.entries else ((), (), ())
        matrix = sparse.csr_array((values, (rows, places)), shape=(len(self.upper), columns))
        return LinearConstraint(matrix, -np.inf, np.array(self.upper))


def _pair(first: int, second: int) -> tuple[int, int]:
    return (first, second) if first < second else (second, first)


class Program:
    """The program of one problem over a fixed list of choices.

    Args:
        problem: what is asked; only tiers limited in its budget are modelled.
        choices: the ways to fill the slots.
    """

    def __init__(self, problem: Problem, choices: Sequence[Choice]) -> None:
        self.problem = problem
        self.base_seconds = problem.seconds(())
        alone = [problem.predict(c.techniques) for c in choices]
        phases = dict.fromkeys(p for ledger in (problem.baseline, *alone) for p in ledger.phases())
        self.rows = [(phase, tier) for tier in limits_of(problem.budget) for phase in phases]
        self.base = self._sizes(problem.baseline)
        self.choices = tuple(choices)
        self.deltas = [self._sizes(ledger) - self.base for ledger in alone]
        self.seconds = [problem.seconds(c.techniques) - self.base_seconds for c in choices]
        if len(self._possible_pairs()) > EAGER_PAIRS:
            self._keep(self._undominated())
        self.known_pairs: set[tuple[int, int]] = set()
        self.pairs: dict[tuple[int, int], tuple[Vector, int]] = {}
        possible = self._possible_pairs()
        if len(possible) <= EAGER_PAIRS:
            self.learn(possible)

    def techniques(self, selection: Selection) -> Composition:
        """The composition that a selection stands for."""
        return ordered(t for index in selection for t in self.choices[index].techniques)

    def learn(self, pairs: Iterable[tuple[int, int]]) -> bool:
        """Predict pairs of choices together; whether any of them was new."""
        new = [pair for pair in pairs if pair not in self.known_pairs]
        for first, second in new:
            self.known_pairs.add((first, second))
            both = self.techniques(frozenset((first, second)))
            more = self._sizes(self.problem.predict(both)) - self.base - self.deltas[first] - self.deltas[second]
            seconds = self.problem.seconds(both) - self.base_seconds - self.seconds[first] - self.seconds[second]
            ticks = self._ticks(seconds)
            if ticks or np.any(more):
                if (first, second) not in self.pairs:
                    self._interact(first, second)
                self.pairs[first, second] = (more, ticks)
        return bool(new)

    def _interact(self, first: int, second: int) -> None:
        """Give all pairs of two slots a product variable, of no effect until it is known."""
        slots_of_pair = {self.choices[first].slot, self.choices[second].slot}
        for pair in combinations(range(len(self.choices)), 2):
            if {self.choices[i].slot for i in pair} == slots_of_pair and self._compatible(*pair):
                self.pairs.setdefault(pair, (np.zeros(len(self.rows)), 0))

    def learn_within(self, selection: Selection) -> bool:
        """Predict all pairs of a selection together; whether any of them was new."""
        return self.learn(combinations(sorted(selection), 2))

    def cheapest(self, limits: Mapping[Tier, int], cuts: Collection[Selection] = ()) -> Selection | None:
        """The selection within the limits of least risk, then time, then count, then name; ``None`` if none fits.

        Args:
            limits: bytes by tier.
            cuts: selections known not to fit.
        """
        rows = self._structure(cuts)
        self._limit(rows, limits)
        found: Selection | None = None
        for costs in self._objectives():
            if found is not None and not np.any(costs):
                continue
            solved = self._minimise(costs, rows)
            if solved is None:
                return None
            found, values = solved
            rows.at_most(enumerate(costs), float(round(float(costs @ values))) + 0.5)
        return found

    def least(
        self, free: Sequence[Tier], limits: Mapping[Tier, int], cuts: Collection[Selection] = ()
    ) -> tuple[Selection, float] | None:
        """The selection with the lowest peaks on some tiers, while the others keep their limits.

        Args:
            free: the tiers whose peaks are minimised.
            limits: bytes by tier; those of ``free`` weigh the tiers against each other.
            cuts: selections to leave out.

        Returns:
            the selection and the sum over ``free`` of peak / limit, or ``None`` when the others cannot be kept.
        """
        rows = self._structure(cuts)
        self._limit(rows, {tier: size for tier, size in limits.items() if tier not in free})
        columns = len(self.choices) + len(self.pairs)
        # In units of about their own size: a limit may be a thousandth of it, which the solver takes badly.
        units = {
            tier: max(limits[tier], *(self.base[row] for row, (_, t) in enumerate(self.rows) if t is tier))
            for tier in free
        }
        for row, (_, tier) in enumerate(self.rows):
            if tier in free:
                terms = [(column, value / units[tier]) for column, value in self._terms(row)]
                rows.at_most([*terms, (columns + free.index(tier), -1.0)], -self.base[row] / units[tier])
        costs = np.concatenate([np.zeros(columns), [units[tier] / limits[tier] for tier in free]])
        solved = self._minimise(costs, rows, gap=PEAK_GAP)
        return None if solved is None else (solved[0], float(costs @ solved[1]))

    def _sizes(self, ledger: Ledger) -> Vector:
        return np.array([ledger.phase(phase, tier).total(tier) for phase, tier in self.rows], dtype=np.float64)

    def _possible_pairs(self) -> list[tuple[int, int]]:
        return [pair for pair in combinations(range(len(self.choices)), 2) if self._compatible(*pair)]

    def _undominated(self) -> list[int]:
        """The choices that no other of the same slot and the same conflicts equals or betters in everything."""
        costs = []
        groups: dict[tuple[str, frozenset[str], frozenset[str]], list[int]] = defaultdict(list)
        for index, choice in enumerate(self.choices):
            risk = round(self.problem.risk(choice.techniques) / RISK_UNIT)
            plain_costs = [risk, self._ticks(self.seconds[index]), len(choice.techniques)]
            costs.append(np.concatenate([self.deltas[index], plain_costs]))
            needs = frozenset(feature for t in choice.techniques for feature in t.facts.needs)
            removes = frozenset(feature for t in choice.techniques for feature in t.facts.removes)
            groups[choice.slot, needs, removes].append(index)
        return sorted(
            index
            for members in groups.values()
            for index in members
            if not any(
                np.all(costs[other] <= costs[index]) and (np.any(costs[other] < costs[index]) or other < index)
                for other in members
                if other != index
            )
        )

    def _keep(self, indices: Sequence[int]) -> None:
        self.choices = tuple(self.choices[i] for i in indices)
        self.deltas = [self.deltas[i] for i in indices]
        self.seconds = [self.seconds[i] for i in indices]

    def _ticks(self, seconds: float) -> int:
        return round(seconds / (TIME_UNIT * self.base_seconds)) if self.base_seconds else 0

    def _compatible(self, first: int, second: int) -> bool:
        one, other = self.choices[first], self.choices[second]
        return one.slot != other.slot and not any(
            slots.conflict(a, b) for a in one.techniques for b in other.techniques
        )

    def _terms(self, row: int) -> list[tuple[int, float]]:
        """Coefficients of the bytes of one (phase, tier) over the choices and the pairs."""
        values = [delta[row] for delta in self.deltas] + [more[row] for more, _ in self.pairs.values()]
        return [(column, float(value)) for column, value in enumerate(values) if value]

    def _limit(self, rows: _Rows, limits: Mapping[Tier, int]) -> None:
        for row, (_, tier) in enumerate(self.rows):
            if tier in limits:
                scale = limits[tier]
                terms = [(column, value / scale) for column, value in self._terms(row)]
                rows.at_most(terms, (limits[tier] - self.base[row]) / scale)

    def _structure(self, cuts: Collection[Selection]) -> _Rows:
        """Slots, conflicts, requirements, products and cuts: what holds whatever the limits."""
        rows = _Rows()
        count = len(self.choices)
        by_slot: dict[str, list[int]] = defaultdict(list)
        by_kind: dict[type[Technique], list[int]] = defaultdict(list)
        for index, choice in enumerate(self.choices):
            by_slot[choice.slot].append(index)
            for technique in choice.techniques:
                by_kind[type(technique)].append(index)
        for members in by_slot.values():
            rows.at_most(((i, 1.0) for i in members), 1.0)
        for one, other in combinations(by_kind, 2):
            if one.facts.slot != other.facts.slot and slots.conflict(one(), other()):
                rows.at_most(((i, 1.0) for i in (*by_kind[one], *by_kind[other])), 1.0)
        if self.problem.workload.training:
            frozen = [i for i, c in enumerate(self.choices) if any(freezes(t) for t in c.techniques)]
            trained = [(i, -1.0) for i in by_slot["adapters"]]
            rows.at_most([*((i, 1.0) for i in frozen), *trained], 0.0)
        if self.problem.workload.job == "compress":
            rows.at_most(((i, -1.0) for i in by_slot["weights"]), -1.0)
        self._products(rows, by_slot)
        for cut in cuts:
            rows.at_most(((i, 1.0 if i in cut else -1.0) for i in range(count)), len(cut) - 1.0)
        return rows

    def _products(self, rows: _Rows, by_slot: Mapping[str, Sequence[int]]) -> None:
        """Tie each product variable to its two choices, for every two slots that interact.

        The products of one choice with all of another slot add up to at most that choice, and to at least what
        is left when neither slot is empty: the marginal polytope, far tighter than one pair at a time.
        """
        places = {pair: len(self.choices) + offset for offset, pair in enumerate(self.pairs)}
        for one, other in combinations(by_slot.values(), 2):
            products = {(i, j): places[_pair(i, j)] for i in one for j in other if _pair(i, j) in places}
            if not products:
                continue
            for i in one:
                rows.at_most([(i, -1.0), *((products[i, j], 1.0) for j in other if (i, j) in products)], 0.0)
            for j in other:
                rows.at_most([(j, -1.0), *((products[i, j], 1.0) for i in one if (i, j) in products)], 0.0)
            rows.at_most([*((i, 1.0) for i in (*one, *other)), *((z, -1.0) for z in products.values())], 1.0)

    def _objectives(self) -> Iterable[Vector]:
        """Whole-number costs of the choices and pairs, the most important first."""
        names = sorted(str(c) for c in self.choices)
        size = len(self.pairs)
        risks = [round(self.problem.risk(c.techniques) / RISK_UNIT) for c in self.choices]
        times = [self._ticks(seconds) for seconds in self.seconds]
        counts = [len(c.techniques) for c in self.choices]
        ranks = [names.index(str(c)) for c in self.choices]
        yield np.array([*risks, *[0] * size], dtype=np.float64)
        yield np.array([*times, *(ticks for _, ticks in self.pairs.values())], dtype=np.float64)
        yield np.array([*counts, *[0] * size], dtype=np.float64)
        yield np.array([*ranks, *[0] * size], dtype=np.float64)

    def _minimise(self, costs: Vector, rows: _Rows, gap: float = 0.0) -> tuple[Selection, Vector] | None:
        """The best selection and all variables (choices and pairs rounded), or ``None`` when there is none."""
        count, binary = len(self.choices), len(self.choices) + len(self.pairs)
        if not len(costs):
            return (frozenset(), costs) if all(upper >= 0 for upper in rows.upper) else None
        upper = np.array([1.0] * binary + [np.inf] * (len(costs) - binary))
        posed = {
            "integrality": np.array([1] * count + [0] * (len(costs) - count)),
            "bounds": Bounds(np.zeros(len(costs)), upper),
            "constraints": rows.constraint(len(costs)),
        }
        result = milp(costs, **posed, options={"mip_rel_gap": gap})
        if result.status == SOLVE_ERROR:
            # Presolving now and then gives up on coefficients of very different sizes.
            result = milp(costs, **posed, options={"mip_rel_gap": gap, "presolve": False})
        if result.status == 2:
            return None
        if result.x is None or result.status != 0:
            raise PlanError(f"the solver stopped: {result.message}", hint="force the techniques with --techniques")
        values = np.array(result.x)
        values[:binary] = np.round(values[:binary])
        return frozenset(int(i) for i in np.flatnonzero(values[:count] > 0.5)), values
