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

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pintpot.cache._base import Keep
from pintpot.cache.geometry import has_full_attention
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload

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
class LagKV(Keep):
    """Attention-free eviction.

    Attributes:
        kept_fraction: share of each chunk that survives.
        lag_tokens: tokens of a chunk; each is judged against the chunk that follows it.
        sink_tokens: first tokens, always kept.
    """

    kept_fraction: float = 0.5
    lag_tokens: int = 128
    sink_tokens: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.kept_fraction <= 1:
            raise CompositionError(
                f"lagkv: kept_fraction must be above 0 and at most 1, not {self.kept_fraction}",
                hint="for instance lagkv(kept_fraction=0.25)",
            )
        if self.lag_tokens < 2 or self.sink_tokens < 0:
            raise CompositionError(
                f"lagkv: lag_tokens={self.lag_tokens} and sink_tokens={self.sink_tokens} are not sizes it can have",
                hint="use at least 2 lag tokens and no negative number of sinks; the paper has 128 and 16",
            )

    @property
    def survivors(self) -> int:
        """Tokens of each chunk that survive: at least one."""
        return max(1, int(self.kept_fraction * self.lag_tokens + 1e-9))

    @property
    def sinks(self) -> int:
        """See ``Keep.sinks``."""
        return self.sink_tokens

    @property
    def recent(self) -> int:
        """See ``Keep.recent``: the last whole chunk has no chunk after it yet."""
        return self.lag_tokens

    @property
    def most_pending(self) -> int:
        """See ``Keep.most_pending``."""
        return 2 * self.lag_tokens - 1

    def decided(self, pending: int) -> tuple[int, int]:
        """See ``Keep.decided``: every whole chunk that another whole chunk follows."""
        chunks = max(0, pending // self.lag_tokens - 1)
        return chunks * self.lag_tokens, chunks * self.survivors

    def score(self, keys: Tensor, values: Tensor) -> Tensor:
        """See ``Keep.score``: eq. 5-9, summed over keys and values."""
        decided, _ = self.decided(keys.shape[-2])
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

    def choose(self, keys: Tensor, values: Tensor) -> Tensor:
        """See ``Keep.choose``: eq. 10, the best of each chunk for each head."""
        scores = self.score(keys, values).unflatten(-1, (-1, self.lag_tokens))
        best = scores.topk(self.survivors, dim=-1).indices.sort(dim=-1).values
        starts = torch.arange(best.shape[-2], device=best.device) * self.lag_tokens
        return (best + starts[:, None]).flatten(-2)

    def shrink(self) -> Iterator[LagKV]:
        """See ``Keep.shrink``: one token fewer of each chunk every time."""
        for survivors in range(self.survivors, 0, -1):
            yield replace(self, kept_fraction=survivors / self.lag_tokens)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """Two per cent at half of the tokens, rising with the evicted share.

        Measured on the embedded model (`results/cache.csv`): 2.1 % at a half, 5.0 % at a quarter, 6.8 % at an eighth,
        which is put at 10 % because recall and copying lose far more than perplexity does.
        """
        return 0.02 * (1 / self.kept_fraction - 1) ** 0.85

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LagKV]:
        """From half to a sixteenth of the tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            for fraction in (0.5, 0.25, 0.125, 0.0625):
                yield cls(kept_fraction=fraction)
