"""Task-KV: heads whose meaning stands apart keep everything; the others keep what they have gathered.

Source:    He et al. 2025, "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
           arXiv:2501.15113, Section 4.
Differs:   heads that share keys and values are one: the farthest of their query heads counts. The head nearest to the
           centre is one of f(r), not one more, and is left out where f(r) is 1. Sinks are left out of semantic vectors.
           The others keep a share of what comes instead of what a budget of the layer leaves them. Heads are assigned
           when a layer decides for the first time, on what it has seen by then.
Saves:     kv_cache, real: every lane of heads is stored by itself, ragged. Sinks lie in a state of all heads.
Shapes:    attention weights of the window, its mean (B, K, R, T); semantic vectors (B, K, R, D); scores (B, K, T).
Composes:  stores that store each head by itself (dense, kivi).
Use when:  summaries and synthetic tasks, which need whole contexts in a few heads; many key-value heads.
Not when:  a layer has one or two key-value heads: there is nobody to stand apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.cache._base import Lane, Place, Seen
from pintpot.cache.window import WindowKeep, pooled, summed
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="task-kv",
    wing="cache",
    part="keep",
    source=Source(
        "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
        year=2025,
        arxiv="2501.15113",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("share that is comparable", 0.4, versus="full cache", at="summaries, synthetic tasks", where="abstract")
    ],
    fidelity="a share of what comes instead of a budget for each layer; heads of one group are one",
    removes=("even_heads",),
)
@dataclass(frozen=True, kw_only=True)
class TaskKV(WindowKeep):
    """Full caches for heterogeneous heads; sinks, recent tokens and middle activations for the others.

    Attributes:
        kept_fraction: share of the middle tokens that survives in the heads that are not heterogeneous.
        window_tokens: recent queries whose attention is looked at.
        kernel_size: neighbouring tokens whose votes are averaged; odd.
        recent_tokens: recent tokens that always stay.
        sink_tokens: first tokens, always kept.
        heterogeneous_fraction: share of the heads of the lowest layer that are heterogeneous (beta).
        least_heads: heterogeneous heads of the highest layer (m); in between, their number falls linearly.
        semantic_tokens: the most attended tokens that make a semantic vector (t).
    """

    # From the row in results/cache.csv: perplexity, and a fifth of the recall that is lost.
    risk_at_half: ClassVar[float] = 0.2
    kept_fraction: float = 0.25
    kernel_size: int = 7
    recent_tokens: int = 256
    sink_tokens: int = 16
    heterogeneous_fraction: float = 0.3
    least_heads: int = 1
    semantic_tokens: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.heterogeneous_fraction <= 1 or self.least_heads < 1 or self.semantic_tokens < 1:
            raise CompositionError(
                "task-kv: heterogeneous_fraction is a share of the heads, and counts are at least 1",
                hint="the paper uses heterogeneous_fraction=0.3, least_heads=1 for Mistral and 0.25, 4 for Llama 2",
            )

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.recent_tokens

    def heterogeneous(self, place: Place) -> int:
        """Heads of a layer that keep everything: f(r) of the paper, at least one and never all."""
        lowest = place.sizes.heads * self.heterogeneous_fraction
        highest = min(lowest, self.least_heads)
        at = place.index / max(1, place.layers - 1)
        return min(max(1, round(lowest - (lowest - highest) * at)), place.sizes.heads - 1)

    def lanes(self, place: Place) -> tuple[Lane, ...]:
        """See ``Keep.lanes``: heterogeneous heads keep everything."""
        full = self.heterogeneous(place)
        if full < 1:
            return ()
        return Lane(full, replace(self, kept_fraction=1.0)), Lane(place.sizes.heads - full, self)

    def assign(self, seen: Seen) -> Tensor:
        """See ``Keep.assign``: the heads farthest from the semantic centre first, with the one nearest to it."""
        full = self.heterogeneous(seen.place)
        order = self.distances(seen).argsort(dim=-1, descending=True)
        near = 1 if full > 1 else 0
        heterogeneous = torch.cat([order[:, : full - near], order[:, order.shape[1] - near :]], dim=1)
        others = order[:, full - near : order.shape[1] - near]
        return torch.cat([heterogeneous.sort(dim=1).values, others.sort(dim=1).values], dim=1)

    def distances(self, seen: Seen) -> Tensor:
        """Of the semantic vectors of each key-value head from the centre of all heads': float32 (B, K)."""
        attention = seen.attention(lambda weights: weights.mean(dim=3))
        weights, chosen = attention.topk(min(self.semantic_tokens, attention.shape[-1]), dim=-1)
        values = seen.tokens.values
        wanted = chosen.flatten(2)[..., None].expand(-1, -1, -1, values.shape[-1])
        picked = values.gather(2, wanted).unflatten(2, chosen.shape[2:]).float()
        vectors = (weights[..., None] * picked).sum(dim=3)
        return (vectors - vectors.mean(dim=(1, 2), keepdim=True)).norm(dim=-1).amax(dim=2)

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: the window's attention, averaged over neighbours; the best are middle activations."""
        return pooled(self.votes(seen, summed), self.kernel_size)
