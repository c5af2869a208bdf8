"""Compactor: keep the tokens whose keys span the others' and that their neighbourhood looks at, whatever is asked.

Source:    Chari & Van Durme 2025, "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate
           Leverage Scores", arXiv:2507.08143; sizes and the blend of the authors' code in kvpress.
Differs:   the share that survives is given, where the paper calibrates it for each text. Leverage is exact where a head
           is no wider than the sketch. Tokens whose queries are not at hand (those of earlier pieces, and decoded
           ones) are judged by leverage alone. A share of what comes survives for good.
Saves:     kv_cache, real: evicted tokens are gone. Scores need the sketched keys of the pending tokens in float32.
Shapes:    keys without rotation, sketched (B, K, T, S); scores (B, K, T).
Composes:  any store; tokens are evicted before they are packed.
Use when:  the question comes after the text was compressed, and any of it may be asked for.
Not when:  what will be asked is known: a keep that looks at the question wastes less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from pintpot.cache._base import Seen
from pintpot.cache.fraction import ChunkedKeep
from pintpot.cache.rotary import Rotary
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique

SCORE_TOKENS = 1024
"""Tokens that are sketched together: bounds the temporaries."""

RIDGE = 1e-2
"""Added to the diagonal of the keys' Gram matrix, which has not full rank where there are few tokens."""


@technique(
    name="compactor",
    wing="cache",
    part="keep",
    source=Source(
        "Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate Leverage Scores",
        year=2025,
        arxiv="2507.08143",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim(
            "bytes of the cache saved (%)", 68, versus="full cache", at="LongBench, quality kept", where="abstract v2"
        )
    ],
    fidelity="the share is given, not calibrated for each text; exact leverage of narrow heads",
)
@dataclass(frozen=True, kw_only=True)
class Compactor(ChunkedKeep):
    """Leverage of keys, and attention that does not look at the order of tokens.

    Attributes:
        kept_fraction: share of the tokens that survives.
        leverage_weight: of the leverage scores beside the attention's, both standardised, times the share that is
            evicted.
        attention_weight: of the attention's; 0 leaves leverage alone.
        sketch_dim: numbers that a key is sketched in, at most.
        block_tokens: neighbours that attend to one another.
        recent_tokens: recent tokens that stay.
        sink_tokens: first tokens that stay without being judged.
        seed: of the sketch.
    """

    # At a quarter of the bytes 6.3 % more perplexity, and 1 % of the recall lost, of which a fifth counts
    # (`results/cache.csv`).
    risk_at_half: ClassVar[float] = 0.026
    needs_rotary: ClassVar[bool] = True
    leverage_weight: float = 1.0
    attention_weight: float = 1.0
    sketch_dim: int = 48
    block_tokens: int = 256
    recent_tokens: int = 4
    sink_tokens: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.sketch_dim, self.block_tokens) < 1 or min(self.leverage_weight, self.attention_weight) < 0:
            raise CompositionError(
                "compactor: a sketch and a block have at least one number, and no weight is negative",
                hint="for instance compactor(leverage_weight=1.0, attention_weight=1.0)",
            )

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.recent_tokens

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: both scores standardised over all heads, and added."""
        # With the share that is evicted as its weight, as the authors' code has it unless told otherwise.
        scores = self.leverage_weight * (1 - self.kept_fraction) * standard(self._leverage(seen))
        if self.attention_weight:
            scores = scores + self.attention_weight * self._attention(seen)
        return scores[..., : seen.decided]

    def _leverage(self, seen: Seen) -> Tensor:
        """How much of itself each key takes to be made from all keys: the diagonal of X (X'X)^-1 X', (B, K, T)."""
        tokens = seen.tokens
        spans = [slice(s, s + SCORE_TOKENS) for s in range(0, tokens.count, SCORE_TOKENS)]
        keys = [_bare(tokens.keys[:, :, s], tokens.positions[..., s], seen.place.rotary) for s in spans]
        sketched = torch.cat([self._sketch(piece) for piece in keys], dim=2)
        sketched = sketched - sketched.mean(dim=2, keepdim=True)
        gram = sketched.mT @ sketched
        ridge = RIDGE * torch.eye(gram.shape[-1], device=gram.device)
        return (sketched * torch.linalg.solve(gram + ridge, sketched.mT).mT).sum(dim=-1)

    def _sketch(self, keys: Tensor) -> Tensor:
        """Keys (B, K, T, D) in ``sketch_dim`` random directions, or as they are where they are no wider."""
        width = keys.shape[-1]
        if width <= self.sketch_dim:
            return keys
        directions = torch.randn(width, self.sketch_dim, generator=torch.Generator().manual_seed(self.seed))
        return keys @ (directions / self.sketch_dim**0.5).to(keys.device)

    def _attention(self, seen: Seen) -> Tensor:
        """Attention that tokens receive from their block, before and behind, times the length of their values.

        Standardised (B, K, T); 0 for tokens whose queries are not at hand.
        """
        query = seen.call.query
        count = min(query.shape[2], seen.tokens.count)
        new = seen.tokens.part(seen.tokens.count - count)
        grouped = query[:, :, query.shape[2] - count :].unflatten(1, (new.keys.shape[1], -1))
        found = []
        for start in range(0, count, self.block_tokens):
            here = slice(start, start + self.block_tokens)
            block = grouped[..., here, :].float() * seen.call.scaling
            weights = (block @ new.keys[:, :, None, here].float().mT).softmax(dim=-1)
            found.append(weights.sum(dim=3).mean(dim=2) * new.values[:, :, here].float().norm(dim=-1))
        scores = standard(avg_pool1d(torch.cat(found, dim=-1), 3, stride=1, padding=1))
        return torch.nn.functional.pad(scores, (seen.tokens.count - count, 0))


def standard(scores: Tensor) -> Tensor:
    """Scores (B, K, T) of each sequence with mean 0 and deviation 1."""
    flat = scores.flatten(1)
    deviation = flat.std(dim=1).clamp(min=1e-6)
    return (scores - flat.mean(dim=1)[:, None, None]) / deviation[:, None, None]


def _bare(keys: Tensor, positions: Tensor, rotary: Rotary | None) -> Tensor:
    return keys.float() if rotary is None else rotary.unrotate(keys, positions)
