"""Layouts that say in which order their terms are worth loading, so that one folder serves many sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pintpot.core.errors import BudgetError
from pintpot.core.units import format_bytes
from pintpot.weights.formats import Format


class RankedLayout(dict[str, tuple[Format, ...]]):
    """The formats of each parameter's terms, with an order of the terms after the first ones.

    Args:
        formats: by parameter, as in any layout.
        order: parameters, each as often as it has terms beyond its first: its second term where it occurs first.
    """

    def __init__(self, formats: Mapping[str, tuple[Format, ...]], order: Sequence[str]) -> None:
        super().__init__(formats)
        self.order = tuple(order)

    def within(self, sizes: Mapping[str, Sequence[int]], size_bytes: int) -> RankedLayout:
        """The layout with the first term of each parameter, and as many of the others in their order as fit.

        Args:
            sizes: bytes of the terms of each parameter.
            size_bytes: most bytes of all terms.

        Raises:
            BudgetError: when the first terms alone are more.
        """
        taken = sum(terms[0] for terms in sizes.values())
        if taken > size_bytes:
            raise BudgetError(
                f"the first terms of all weights take {format_bytes(taken)}, and {format_bytes(max(size_bytes, 0))} "
                "are left for them",
                hint=f"give {format_bytes(taken - size_bytes)} more",
            )
        kept = Counter(dict.fromkeys(sizes, 1))
        count = 0
        for name in self.order:
            taken += sizes[name][kept[name]]
            if taken > size_bytes:
                break
            kept[name] += 1
            count += 1
        return RankedLayout({name: self[name][: kept[name]] for name in self}, self.order[:count])
