"""Layers that share what may be kept: each gives back what those above it turn out to need more.

Source:  the cascade of Qin et al. 2025, "CAKE", arXiv:2503.12491, Section 4.2 and Algorithm 1, for any ``LayerKeep``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pintpot.cache._base import Keep, Seen, top
from pintpot.cache.residue import ResidueState
from pintpot.cache.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class LayerKeep(Keep):
    """A keep whose layers share what may be kept, each getting by what it sees.

    The sum over the layers is what a ``Keep`` would keep, so sizes are known beforehand. While a prompt is read, the
    layers below give back what the layers above turn out to need more; tokens go to the store when the last layer has
    been read.
    """

    @abstractmethod
    def preference(self, seen: Seen) -> float | Tensor:
        """How much this layer wants to keep: any number of at least 0; only ratios between layers count."""

    @property
    def divided_every(self) -> int:
        """Layers after which the shares of all layers so far are worked out anew; at the last layer they always are."""
        return 1

    def most(self, each: int, decided: int) -> int:
        """The most tokens that one layer may hold, where layers hold ``each`` on average: all unless overridden."""
        return decided

    def compare(
        self, preferences: Sequence[float], scores: Sequence[Tensor], each: int
    ) -> Sequence[float] | Sequence[Tensor]:
        """Preferences of the layers seen so far, once more: as they were noted unless overridden.

        Args:
            preferences: of each layer.
            scores: of the tokens that each still holds, (B, K, n).
            each: tokens that layers hold on average in the end.
        """
        return preferences

    def divide(self, total: int, preferences: Sequence[float], most: Sequence[int]) -> list[int]:
        """Tokens for each layer seen so far, by their preferences: at most ``most`` of each, ``total`` in all.

        In proportion unless overridden. May come to less than ``total`` only where ``most`` binds everywhere.
        """
        return proportional(total, preferences, most)


@dataclass
class Waiting:
    """What a layer keeps for now."""

    store: Callable[[Tokens], None]
    tokens: Tokens
    scores: Tensor
    preference: float
    remains: ResidueState | None = None

    def shrink_(self, count: int) -> None:
        """Let all but the best ``count`` of each head go."""
        if count < self.tokens.count:
            chosen = top(self.scores, count)
            if self.remains is not None:
                self.remains.let_go(self.tokens, chosen)
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

    def offer(
        self, store: Callable[[Tokens], None], seen: Seen, scores: Tensor, remains: ResidueState | None = None
    ) -> None:
        """The next layer's decided tokens with their scores; the last layer's offer stores everybody's.

        Args:
            store: stores tokens in the layer for good.
            seen: what the layer has seen.
            scores: (B, K, decided).
            remains: takes note of the layer's tokens that are let go.
        """
        decided = scores.shape[-1]
        tokens = seen.tokens.part(0, decided)
        newest = Waiting(store, tokens, scores, number(self.keep.preference(seen)), remains)
        self._waiting.append(newest)
        _, each = self.keep.decided(decided + self.keep.recent)
        rest = each % self.granule
        most = self.keep.most(each, decided)
        newest.shrink_(most - (most - rest) % self.granule)
        is_last = len(self._waiting) == self.layers
        if is_last or len(self._waiting) % self.keep.divided_every == 0:
            for waiting, count in zip(self._waiting, self._divide(each, rest), strict=True):
                waiting.shrink_(count)
        if is_last:
            for waiting in self._waiting:
                waiting.store(waiting.tokens)
            self._waiting.clear()

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._rows.clear()

    def _divide(self, each: int, rest: int) -> list[int]:
        """Tokens for each layer so far, ``each`` times all layers in sum where that many are held."""
        held = [waiting.scores for waiting in self._waiting]
        noted = self.keep.compare([waiting.preference for waiting in self._waiting], held, each)
        # No layer may be given more than it still holds: the sum over the layers would fall short.
        most = [(waiting.tokens.count - rest) // self.granule for waiting in self._waiting]
        total = (each - rest) // self.granule * self.layers
        shares = self.keep.divide(total, [number(preference) for preference in noted], most)
        return [share * self.granule + rest for share in shares]


def number(value: float | Tensor) -> float:
    """A number that counts depend on; 1.0 where tensors have shapes alone: sums over layers do not depend on it."""
    if isinstance(value, Tensor):
        return 1.0 if value.is_meta or isinstance(value, FakeTensor) else float(value)
    return value


def places_won(scores: Sequence[Tensor], each: int) -> list[Tensor]:
    """How many of the best tokens of all layers, ``each`` for every head on average, are each layer's.

    Args:
        scores: of each layer's tokens, (B, K, n).
        each: tokens.
    """
    flat = torch.cat([held.flatten() for held in scores])
    heads = scores[0].shape[0] * scores[0].shape[1]
    best = flat.topk(min(each * heads * len(scores), len(flat))).indices
    ends = accumulate(held.numel() for held in scores)
    return [((best >= end - held.numel()) & (best < end)).sum() for end, held in zip(ends, scores, strict=True)]


def proportional(total: int, preferences: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole shares in proportion to preferences, at most ``most`` of each, ``total`` in all where that can be had."""
    shares = [0] * len(preferences)
    open_ones = list(range(len(preferences)))
    left = min(total, sum(most))
    while open_ones and left:
        weight = sum(preferences[i] for i in open_ones)
        exact = {i: left * (preferences[i] / weight if weight > 0 else 1 / len(open_ones)) for i in open_ones}
        full = [i for i in open_ones if exact[i] >= most[i]]
        if not full:
            return _rounded(shares, exact, left, most)
        for i in full:
            shares[i] = most[i]
        left -= sum(most[i] for i in full)
        open_ones = [i for i in open_ones if i not in full]
    return shares


def _rounded(shares: list[int], exact: dict[int, float], total: int, most: Sequence[int]) -> list[int]:
    """Exact shares made whole, the largest remainders up."""
    for i, share in exact.items():
        shares[i] = min(most[i], int(share))
    missing = total - sum(shares[i] for i in exact)
    for i in sorted(exact, key=lambda i: (int(exact[i]) - exact[i], i)):
        if missing and shares[i] < most[i]:
            shares[i] += 1
            missing -= 1
    return shares
