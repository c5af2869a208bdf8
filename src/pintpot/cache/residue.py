"""What becomes of evicted tokens: a summary of constant size, to which later tokens attend beside what is kept.

Shapes: B batch, H query heads, K key-value heads, Q queries, M = Q * H / K query rows of a key-value head, T tokens,
        D head dim of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.cache._base import CacheTechnique, Place
from pintpot.cache.tokens import Tokens


class ResidueState(ABC):
    """What is left of the evicted tokens of one layer."""

    @abstractmethod
    def absorb(self, tokens: Tokens, gone: Tensor) -> None:
        """Take note of tokens that are let go for good.

        Args:
            tokens: some of which are evicted.
            gone: bool (B, K, T), from which heads.
        """

    @abstractmethod
    def answer(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """What all evicted tokens together are to queries, as if they were one token.

        Args:
            query: (B, H, Q, D), rotated where the model rotates, not scaled.

        Returns:
            Its scores, float32 (B, K, M, 1), and its values, float32 (B, K, M, D), which differ from query to query.
        """

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held."""

    @abstractmethod
    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every held tensor by ``change`` of it, which acts on the first dimension only."""

    def let_go(self, tokens: Tokens, chosen: Tensor | None) -> None:
        """Take note of all tokens but the chosen ones.

        Args:
            tokens: those that were decided on.
            chosen: int64 (B, K, n), or (B, 1, n) where all heads choose the same; None where none survive.
        """
        batch, heads, count = tokens.keys.shape[:3]
        gone = torch.ones((batch, heads, count), dtype=torch.bool, device=tokens.keys.device)
        self.absorb(tokens, gone if chosen is None else gone.scatter_(2, chosen.expand(batch, heads, -1), False))


@dataclass(frozen=True, kw_only=True)
class Residue(CacheTechnique):
    """A summary of what a keep evicts. It composes with any keep and any store; without a keep there is none."""

    @abstractmethod
    def open(self, place: Place, batch: int, device: torch.device) -> ResidueState:
        """Of a layer that has evicted nothing yet."""

    @abstractmethod
    def predict_bytes(self, place: Place, batch: int) -> int:
        """Exactly what one layer will hold from the first token on, besides what was found beforehand."""
