"""StreamingLLM: keep the first tokens, on which attention leans, and a window of the last ones.

Source:    Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, Section 3.2;
           start_size and recent_size of the authors' code.
Differs:   the window lets tokens go ``evicted_tokens`` at a time, so it holds up to that many more. Positions within
           the cache are had by turning queries back towards the sinks rather than keys forth, which is the same for
           rotary positions; models without them keep the positions of the text. What is read in one piece is attended
           to as a whole.
Saves:     kv_cache, real: its size does not depend on how long the text is.
Shapes:    stored (B, K, sinks, D), pending (B, K, window, D).
Composes:  any store (it holds the sinks).
Use when:  a stream without end, of which only the recent part matters.
Not when:  something that was said before the window will be asked for: it is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.cache._base import Chunk, Keep, Place, Seen
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.rotary import Rotary
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Generate, Workload

RISK_AT_HALF = 0.087
"""When half of the tokens are gone, from results/cache.csv: 0.007 of perplexity, and a fifth of the recall lost."""


@technique(
    name="streaming-llm",
    wing="cache",
    part="keep",
    source=Source("Efficient Streaming Language Models with Attention Sinks", year=2023, arxiv="2309.17453"),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("speed of streaming", 22.2, versus="a sliding window with recomputation", where="abstract"),
    ],
    fidelity="the window shrinks by a few tokens at a time; learned positions stay those of the text",
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Keep):
    """Sinks and a sliding window.

    Attributes:
        window_tokens: recent tokens that stay.
        sink_tokens: first tokens that stay.
        evicted_tokens: tokens that leave the window together.
    """

    needs_rotary: ClassVar[bool] = True
    window_tokens: int = 512
    sink_tokens: int = 4
    evicted_tokens: int = 16

    def __post_init__(self) -> None:
        if self.window_tokens < 1 or self.sink_tokens < 0 or self.evicted_tokens < 1:
            raise CompositionError(
                f"streaming-llm: a window of {self.window_tokens} tokens after {self.sink_tokens} sinks, of which "
                f"{self.evicted_tokens} leave together, cannot be",
                hint="use at least one token for the window and the eviction, and no negative number of sinks",
            )

    @property
    def sinks(self) -> int:
        """See ``Keep.sinks``."""
        return self.sink_tokens

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.window_tokens

    @property
    def most_pending(self) -> int:
        """See ``Keep.most_pending``."""
        return self.window_tokens + self.evicted_tokens - 1

    def decided(self, pending: int) -> tuple[int, int]:
        """See ``Keep.decided``: what is beyond the window goes, none of it survives."""
        return max(0, pending - self.window_tokens) // self.evicted_tokens * self.evicted_tokens, 0

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: all the same, since none survives."""
        return torch.zeros(*seen.tokens.keys.shape[:2], seen.decided, device=seen.tokens.keys.device)

    def attended(self, chunks: Iterator[Chunk], seen: int, place: Place) -> Iterator[Chunk]:
        """See ``Keep.attended``: the sinks stand right before the window, whatever was evicted between them."""
        held = self.held(seen)
        evicted = seen - held.stored - held.pending
        if not evicted or place.rotary is None:
            return chunks
        rotary = place.rotary
        return (Nearer(chunk, rotary, evicted) for chunk in chunks)

    def shrink(self) -> Iterator[StreamingLLM]:
        """See ``Keep.shrink``: a window that is shorter by what is evicted together."""
        for window in range(self.window_tokens, 0, -self.evicted_tokens):
            yield replace(self, window_tokens=window)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Rising with the share of the tokens that are gone at the end."""
        most = workload.prompt_tokens + workload.new_tokens if isinstance(workload, Generate) else self.window_tokens
        gone = most / min(most, self.window_tokens + self.sink_tokens) - 1
        return RISK_AT_HALF * gone**0.85

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[StreamingLLM]:
        """Windows of 2,048 to 256 tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            for window in (2048, 1024, 512, 256):
                yield cls(window_tokens=window)


class Nearer(Chunk):
    """Stored tokens that queries see as if they stood nearer.

    Args:
        chunk: the tokens as they are.
        rotary: how their keys are rotated.
        tokens: by how many positions they come nearer.
    """

    def __init__(self, chunk: Chunk, rotary: Rotary, tokens: int) -> None:
        self.chunk, self.rotary, self.shift = chunk, rotary, tokens
        self.tokens = chunk.tokens

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``: a query turned back meets a key as it would meet the key turned forth."""
        return self.chunk.scores(self.rotary.shift(query, -self.shift))

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        return self.chunk.mix(weights)
