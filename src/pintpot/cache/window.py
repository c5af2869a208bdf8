"""Keeps that judge tokens by the attention of a window of recent queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from pintpot.cache._base import Seen
from pintpot.cache.fraction import ChunkedKeep
from pintpot.core.errors import CompositionError


@dataclass(frozen=True, kw_only=True)
class WindowKeep(ChunkedKeep):
    """The window's tokens always stay, and its queries judge the tokens before it.

    Attributes:
        window_tokens: recent tokens that vote, and always stay.
        kernel_size: neighbouring tokens whose scores are pooled; odd.
    """

    window_tokens: int = 32
    kernel_size: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window_tokens < 1 or self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise CompositionError(
                f"{self.name}: {self.window_tokens} tokens cannot vote with {self.kernel_size} neighbours",
                hint="use a window of at least one token and an odd kernel_size",
            )

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.window_tokens

    @property
    def observed_queries(self) -> int:
        """See ``Keep.observed_queries``."""
        return self.window_tokens

    def votes(self, seen: Seen, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """What the window's attention weights (B, K, R, W, N) come to, for the tokens that are decided on."""
        return seen.attention(reduce)[..., : seen.decided]


def summed(weights: Tensor) -> Tensor:
    """Weights (B, K, R, W, N) summed over the window, the mean of a key-value head's query heads: (B, K, N)."""
    return weights.sum(dim=3).mean(dim=2)


def pooled(scores: Tensor, kernel_size: int) -> Tensor:
    """Scores (B, K, T), each the mean of ``kernel_size`` neighbours; those beyond the ends count as zero."""
    return functional.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)


def highest(scores: Tensor, kernel_size: int) -> Tensor:
    """Scores (B, K, T), each the greatest of ``kernel_size`` neighbours."""
    return functional.max_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
