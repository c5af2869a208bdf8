"""Layer-DefensiveKV: DefensiveKV whose layers compete with one another for the places of one cache.

Source:    Feng et al. 2025, "Taming the Fragility of KV Cache Eviction in LLM Inference", arXiv:2510.13334; authors'
           code (FFY0/DefensiveKV).
Differs:   as DefensiveKV. Layers are divided when each has been read, so that they need not all wait to the end; only
           tokens still held compete, as those let go before cannot come back.
Saves:     kv_cache, real: evicted tokens are gone. Until the last layer of a call has been read, what layers keep for
           now waits densely, up to the whole budget and one layer's tokens.
Shapes:    weights of the window (B, K, R, W, N) chunk by chunk; scores (B, K, T), compared over all layers.
Composes:  any store, except those in which all layers hold the same tokens.
Use when:  a token that matters rarely must not be lost, in a very small cache of a model with many layers.
Not when:  a model has one or two layers with full attention: there is nobody to compete with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pintpot.cache._base import Seen
from pintpot.cache.cascade import LayerKeep, places_won
from pintpot.cache.defensivekv import DefensiveKV
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="layer-defensivekv",
    wing="cache",
    part="keep",
    source=Source("Taming the Fragility of KV Cache Eviction in LLM Inference", year=2025, arxiv="2510.13334"),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("quality loss (times smaller)", 4.3, versus="strongest baseline", at="20 % cache size", where="abstract")
    ],
    fidelity="the same number of tokens for all heads of a layer; only tokens still held compete",
    removes=("even_layers",),
)
@dataclass(frozen=True, kw_only=True)
class LayerDefensiveKV(DefensiveKV, LayerKeep):
    """Layer budgets by how many of the highest risks of all layers are a layer's own; fields as ``DefensiveKV``."""

    # From the rows in results/cache.csv: hardly more perplexity; a fifth of the lost recall counts.
    risk_at_half: ClassVar[float] = 0.047

    def preference(self, seen: Seen) -> float:
        """See ``LayerKeep.preference``: nothing to tell beforehand; ``compare`` does all."""
        return 1.0

    def compare(self, preferences: Sequence[float], scores: Sequence[Tensor], each: int) -> list[Tensor]:
        """See ``LayerKeep.compare``."""
        return places_won(scores, each)
