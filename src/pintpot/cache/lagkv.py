"""LagKV: keep the tokens whose keys and values stand out from the chunk that follows them.

Source:    Liang et al. 2025, "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
           arXiv:2504.04704, eq. 1-10.
Differs:   a channel that is constant over the reference chunk counts as zero (the quotient is undefined there).
Saves:     kv_cache, real: evicted tokens are gone. Scores need the float32 temporaries of 1,024 tokens at a time.
Shapes:    keys, values (B, K, T, D); scores (B, K, T).
Composes:  any store; tokens are evicted before they are packed.
Use when:  attention weights are not at hand (fused attention), long prompts, a cache of a given size.
Not when:  every token matters equally (exact copying), or prompts of unequal length are padded into one batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.cache._base import Seen, top
from pintpot.cache.fraction import FractionKeep
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique

SCORE_TOKENS = 1024
"""Tokens that are scored together: bounds the temporaries."""


@technique(
    name="lagkv",
    wing="cache",
    part="keep",
    source=Source(
        "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important",
        year=2025,
        arxiv="2504.04704",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("score kept", 0.90, versus="full cache", at="8x fewer tokens, LongBench and passkeys", where="abstract"),
        Claim("64-digit passkey score above H2O's", 0.60, versus="H2O", at="same ratio", where="abstract"),
    ],
    fidelity="none",
)
@dataclass(frozen=True, kw_only=True)
class LagKV(FractionKeep):
    """Attention-free eviction.

    Attributes:
        kept_fraction: share of each chunk that survives.
        lag_tokens: tokens of a chunk; each is judged against the chunk that follows it.
        sink_tokens: first tokens, always kept.
    """

    # At a quarter of the bytes 4.8 % more perplexity, and 12 % of the recall lost, of which a fifth counts
    # (`results/cache.csv`).
    risk_at_half: ClassVar[float] = 0.028
    kept_fraction: float = 0.5
    lag_tokens: int = 128
    sink_tokens: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag_tokens < 2:
            raise CompositionError(
                f"lagkv: a chunk of {self.lag_tokens} tokens has no spread", hint="the paper has lag_tokens=128"
            )

    @property
    def chunk(self) -> int:
        """See ``FractionKeep.chunk``."""
        return self.lag_tokens

    @property
    def recent(self) -> int:
        """See ``Keep.recent``: the last whole chunk has no chunk after it yet."""
        return self.lag_tokens

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: eq. 5-9, summed over keys and values."""
        keys, values, decided = seen.tokens.keys, seen.tokens.values, seen.decided
        step = max(1, SCORE_TOKENS // self.lag_tokens) * self.lag_tokens
        parts = []
        for start in range(0, decided, step):
            stop = min(decided, start + step) + self.lag_tokens
            parts.append(self._stand_out(keys[..., start:stop, :]) + self._stand_out(values[..., start:stop, :]))
        return torch.cat(parts, dim=-1)

    def _stand_out(self, states: Tensor) -> Tensor:
        """How much each token stands out from the chunk after its own: (B, K, T - lag) from (B, K, T, D)."""
        chunks = states.float().unflatten(-2, (-1, self.lag_tokens))
        low, high = chunks[:, :, 1:].aminmax(dim=-2, keepdim=True)
        span = high - low
        relative = (chunks[:, :, :-1] - low) / torch.where(span > 0, span, torch.full_like(span, torch.inf))
        return relative.std(dim=-1).softmax(dim=-1).flatten(-2)

    def choose(self, scores: Tensor) -> Tensor:
        """See ``Keep.choose``: eq. 10, the best of each chunk for each head."""
        best = top(scores.unflatten(-1, (-1, self.lag_tokens)), self.survivors)
        starts = torch.arange(best.shape[-2], device=best.device) * self.lag_tokens
        return (best + starts[:, None]).flatten(-2)
