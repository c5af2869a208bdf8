"""Layers that share what may be kept: each gives back what those above it turn out to need more.

Source:  the cascade of Qin et al. 2025, "CAKE", arXiv:2503.12491, Section 4.2 and Algorithm 1, for any ``LayerKeep``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from pintpot.cache._base import LayerKeep, Seen, top
from pintpot.cache.tokens import Tokens


@dataclass
class Waiting:
    """What a layer keeps for now."""

    store: Callable[[Tokens], None]
    tokens: Tokens
    scores: Tensor
    preference: float

    def shrink_(self, count: int) -> None:
        """Let all but the best ``count`` of each head go."""
        if count < self.tokens.count:
            chosen = top(self.scores, count)
            self.tokens, self.scores = self.tokens.gather(chosen), self.scores.gather(-1, chosen)


class Cascade:
    """The layers of one cache with the same keep, in their order.

    Args:
        keep: how they share.
        layers: how many there are.
        granule: layers differ from one another by multiples of so many tokens, as their store counts its bytes.
    """

    def __init__(self, keep: LayerKeep, layers: int, granule: int) -> None:
        self.keep, self.layers, self.granule = keep, layers, granule
        self._waiting: list[Waiting] = []
        self._rows: dict[int, Cascade] = {}

    def of_row(self, row: int) -> Cascade:
        """The cascade of one sequence of a padded batch."""
        return self._rows.setdefault(row, Cascade(self.keep, self.layers, self.granule))

    def offer(self, store: Callable[[Tokens], None], seen: Seen, scores: Tensor) -> None:
        """The next layer's decided tokens with their scores; the last layer's offer stores everybody's.

        Args:
            store: stores tokens in the layer for good.
            seen: what the layer has seen.
            scores: (B, K, decided).
        """
        decided = scores.shape[-1]
        tokens = seen.tokens.part(0, decided)
        self._waiting.append(Waiting(store, tokens, scores, float(self.keep.preference(seen))))
        _, each = self.keep.decided(decided + self.keep.recent)
        for waiting, count in zip(self._waiting, self._divide(each, decided), strict=True):
            waiting.shrink_(count)
        if len(self._waiting) == self.layers:
            for waiting in self._waiting:
                waiting.store(waiting.tokens)
            self._waiting.clear()

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._rows.clear()

    def _divide(self, each: int, decided: int) -> list[int]:
        """Tokens for each layer so far, ``each`` times all layers in sum where that many were decided on."""
        rest = each % self.granule
        preferences = [waiting.preference for waiting in self._waiting]
        total = (each - rest) // self.granule * self.layers
        shares = self.keep.divide(total, preferences, (decided - rest) // self.granule)
        return [share * self.granule + rest for share in shares]


def proportional(total: int, preferences: Sequence[float], most: int) -> list[int]:
    """Whole shares in proportion to preferences, at most ``most`` each, ``total`` in all where that can be had."""
    shares = [0] * len(preferences)
    open_ones = list(range(len(preferences)))
    left = min(total, most * len(preferences))
    while open_ones and left:
        weight = sum(preferences[i] for i in open_ones)
        exact = {i: left * (preferences[i] / weight if weight > 0 else 1 / len(open_ones)) for i in open_ones}
        full = [i for i in open_ones if exact[i] >= most]
        if not full:
            return _rounded(shares, exact, left, most)
        for i in full:
            shares[i] = most
        left -= most * len(full)
        open_ones = [i for i in open_ones if i not in full]
    return shares


def _rounded(shares: list[int], exact: dict[int, float], total: int, most: int) -> list[int]:
    """Exact shares made whole, the largest remainders up."""
    for i, share in exact.items():
        shares[i] = min(most, int(share))
    missing = total - sum(shares[i] for i in exact)
    for i in sorted(exact, key=lambda i: (int(exact[i]) - exact[i], i)):
        if missing and shares[i] < most:
            shares[i] += 1
            missing -= 1
    return shares
