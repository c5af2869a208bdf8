"""Ranks by budget: which leading directions of all weights together are kept, for given bytes.

Shapes: O out-features, I in-features, R rank. A factorised weight (O, I) holds R * (O + I) numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.core.errors import BudgetError
from pintpot.core.units import format_bytes


@dataclass(frozen=True)
class Spectrum:
    """The directions of one weight, from the leading one on.

    Attributes:
        gains: what each is worth, (most,), not rising; comparable between weights. No more than these can be kept.
        rank_bytes: stored for each direction.
    """

    gains: Tensor
    rank_bytes: int


def parity_rank(out_features: int, in_features: int) -> int:
    """The largest rank whose factors hold fewer numbers than the matrix (0 where there is none)."""
    return (out_features * in_features - 1) // (out_features + in_features)


def energy_spectrum(values: Tensor, rank_bytes: int, most: int) -> Spectrum:
    """Directions whose worth is the squared error that they save for each byte.

    Args:
        values: singular values (n,), falling: of the weight, or of the weight times a root of its inputs' moments.
        rank_bytes: stored for each direction.
        most: directions that may be kept.
    """
    return Spectrum(values[:most].double().square() / rank_bytes, rank_bytes)


def ranks_for(spectra: Mapping[str, Spectrum], budget_bytes: int) -> dict[str, int]:
    """How many directions of each weight are kept: those worth most over all weights, and of each at least one.

    The budget is spent to the last byte where the sizes allow it: the few directions that are worth least are exchanged
    for others until it is.

    Args:
        spectra: by the weight's name.
        budget_bytes: of all factors together.

    Raises:
        BudgetError: when one direction of each does not fit.
    """
    least = sum(spectrum.rank_bytes for spectrum in spectra.values())
    if least > budget_bytes:
        raise BudgetError(
            f"one direction of each matrix takes {format_bytes(least)}, and they may have "
            f"{format_bytes(max(0, budget_bytes))}",
            hint="allow a larger size",
        )
    ranks = _leading(spectra, budget_bytes - least)
    left = budget_bytes - sum(rank * spectra[name].rank_bytes for name, rank in ranks.items())
    changes = _fewest_changes({spectrum.rank_bytes for spectrum in spectra.values()}, left)
    return ranks if changes is None else _changed(ranks, spectra, changes) or ranks


def _leading(spectra: Mapping[str, Spectrum], bytes_left: int) -> dict[str, int]:
    """One direction of each weight, and of the others as many as fit, in the order of their gains."""
    gains = torch.cat([spectrum.gains[1:].double() for spectrum in spectra.values()])
    counts = torch.tensor([len(spectrum.gains) - 1 for spectrum in spectra.values()])
    owners = torch.arange(len(spectra)).repeat_interleave(counts)
    costs = torch.tensor([spectrum.rank_bytes for spectrum in spectra.values()])[owners]
    order = torch.argsort(gains, descending=True, stable=True)
    taken = order[: int((costs[order].cumsum(0) <= bytes_left).sum())]
    held = torch.bincount(owners[taken], minlength=len(spectra)) + 1
    return dict(zip(spectra, held.tolist(), strict=True))


def _fewest_changes(costs: set[int], left: int) -> dict[int, int] | None:
    """How many directions of each cost to add (or, if negative, take away) to use ``left`` bytes; None if impossible.

    A breadth-first search over what is left after each step, which stays within twice the largest cost.
    """
    span = 2 * max(costs)
    before: dict[int, tuple[int, int]] = {}
    queue = deque([left])
    while queue and 0 not in before and left != 0:
        now = queue.popleft()
        for step in (signed for cost in sorted(costs) for signed in (cost, -cost)):
            if abs(now - step) <= span and now - step != left and now - step not in before:
                before[now - step] = (now, step)
                queue.append(now - step)
    if left != 0 and 0 not in before:
        return None
    changes: dict[int, int] = {}
    at = 0
    while at != left:
        at, step = before[at]
        changes[abs(step)] = changes.get(abs(step), 0) + (1 if step > 0 else -1)
    return changes


def _changed(
    ranks: Mapping[str, int], spectra: Mapping[str, Spectrum], changes: Mapping[int, int]
) -> dict[str, int] | None:
    """The ranks with the best directions of some costs added and the worst of others taken away; None if too few."""
    found = dict(ranks)
    for cost, change in changes.items():
        own = [name for name, spectrum in spectra.items() if spectrum.rank_bytes == cost]
        for _ in range(abs(change)):
            if change > 0:
                free = {n: spectra[n].gains[found[n]] for n in own if found[n] < len(spectra[n].gains)}
                name = max(free, key=lambda n: float(free[n]), default=None)
            else:
                free = {n: spectra[n].gains[found[n] - 1] for n in own if found[n] > 1}
                name = min(free, key=lambda n: float(free[n]), default=None)
            if name is None:
                return None
            found[name] += 1 if change > 0 else -1
    return found
