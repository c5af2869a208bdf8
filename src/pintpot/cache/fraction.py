"""Keeps that hold a fixed share of what comes, decided on some tokens at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from pintpot.cache._base import Keep
from pintpot.cache.geometry import has_full_attention
from pintpot.core.errors import CompositionError
from pintpot.core.shape import ModelShape
from pintpot.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class FractionKeep(Keep):
    """Sinks and recent tokens stay; of all others, a share of each ``chunk``, the best by ``score``.

    Tokens that are decided on together compete with one another over all of their chunks: a prompt that is read at
    once is judged as a whole, one that is read in pieces piece by piece.

    Attributes:
        kept_fraction: share of the decided tokens that survives.
        sink_tokens: first tokens, always kept.
        risk_at_half: relative rise of perplexity when half of the tokens survive, and a fifth of the share of recall
            that is lost, for the planner.
    """

    risk_at_half: ClassVar[float] = 0.02
    kept_fraction: float = 0.5
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction <= 1:
            raise CompositionError(
                f"{self.name}: kept_fraction must be above 0 and at most 1, not {self.kept_fraction}",
                hint=f"for instance {self.name}(kept_fraction=0.25)",
            )
        if self.chunk < 1 or self.recent < 0 or self.sink_tokens < 0:
            raise CompositionError(
                f"{self.name}: {self.chunk} tokens at a time, {self.recent} recent ones and {self.sink_tokens} sinks "
                "are not sizes it can have",
                hint="use counts of at least 1, and no negative number of sinks",
            )

    @property
    @abstractmethod
    def chunk(self) -> int:
        """Tokens are decided on by multiples of so many."""

    @property
    def survivors(self) -> int:
        """Tokens of each chunk that survive: at least one."""
        return max(1, int(self.kept_fraction * self.chunk + 1e-9))

    @property
    def sinks(self) -> int:
        """See ``Keep.sinks``."""
        return self.sink_tokens

    @property
    def most_pending(self) -> int:
        """See ``Keep.most_pending``."""
        return self.recent + self.chunk - 1

    def decided(self, pending: int) -> tuple[int, int]:
        """See ``Keep.decided``: all whole chunks beyond the recent tokens."""
        chunks = max(0, pending - self.recent) // self.chunk
        return chunks * self.chunk, chunks * self.survivors

    def shrink(self) -> Iterator[Self]:
        """See ``Keep.shrink``: one token fewer of each chunk every time."""
        for survivors in range(self.survivors, 0, -1):
            yield replace(self, kept_fraction=survivors / self.chunk)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """``risk_at_half`` at half of the tokens, rising with the share that is evicted."""
        return self.risk_at_half * (1 / self.kept_fraction - 1) ** 0.85

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[Self]:
        """From half to a sixteenth of the tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            for fraction in (0.5, 0.25, 0.125, 0.0625):
                yield cls(kept_fraction=fraction)


@dataclass(frozen=True, kw_only=True)
class ChunkedKeep(FractionKeep):
    """A ``FractionKeep`` whose method says nothing of chunks.

    Attributes:
        chunk_tokens: tokens are decided on by multiples of so many, so up to one fewer of them are pending besides the
            recent ones. With fewer, less is held, and tokens that come one by one compete with fewer others.
    """

    chunk_tokens: int = 64

    @property
    def chunk(self) -> int:
        """See ``FractionKeep.chunk``."""
        return self.chunk_tokens
