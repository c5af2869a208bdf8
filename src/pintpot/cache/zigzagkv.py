"""ZigZagKV: layers that need many tokens to hold most of their attention may keep more of them.

Source:    Zhong et al. 2024, "ZigZagkv: Dynamic KV Cache Compression for Long-context Modeling based on Layer
           Uncertainty", arXiv:2412.09036, eq. 4-6.
Differs:   a share of what comes instead of a fixed number; tokens that come later are divided among the layers in the
           same way; layers below give back what those above need more (CAKE's cascade), so that no layer waits whole.
           The default of least_share is ours, and so is the window's.
Saves:     kv_cache, real: evicted tokens are gone. What layers keep for now waits densely until the last layer of a
           call has been read.
Shapes:    attention of the window summed over it (B, K, R, T); the least budget of a head is a count; scores (B, K, T).
Composes:  any store, except those in which all layers hold the same tokens.
Use when:  some layers attend widely and others to few tokens; the whole cache is to have one size.
Not when:  a model has one or two layers with full attention: there is nothing to divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pintpot.cache._base import Seen
from pintpot.cache.cascade import LayerKeep, proportional
from pintpot.cache.window import WindowKeep, pooled, summed
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="zigzagkv",
    wing="cache",
    part="keep",
    source=Source(
        "ZigZagkv: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty",
        year=2024,
        arxiv="2412.09036",
    ),
    accounts=[Account.KV_CACHE],
    claims=[Claim("share of the cache that is nearly lossless", 0.2, versus="full cache", where="abstract")],
    fidelity="a share of what comes instead of a fixed number; the least share of a layer is a default of ours",
    removes=("even_layers",),
)
@dataclass(frozen=True, kw_only=True)
class ZigZagKV(WindowKeep, LayerKeep):
    """Layer budgets by the least number of tokens that holds most of the attention.

    Attributes:
        kept_fraction: share of the tokens before the window that survives, over all layers.
        window_tokens: recent tokens that vote, and always stay.
        kernel_size: neighbouring tokens whose votes are averaged; odd.
        attention_share: of a head's attention that its least budget must hold.
        least_share: of the average budget that every layer gets, whatever it needs.
        sink_tokens: first tokens that stay without a vote.
    """

    # From the rows in results/cache.csv: perplexity, and a fifth of the recall that is lost.
    risk_at_half: ClassVar[float] = 0.2
    attention_share: float = 0.9
    least_share: float = 0.2
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.attention_share <= 1 or not 0 <= self.least_share <= 1:
            raise CompositionError(
                "zigzagkv: attention_share and least_share are shares of 1",
                hint="for instance zigzagkv(attention_share=0.9, least_share=0.2)",
            )

    def preference(self, seen: Seen) -> Tensor:
        """See ``LayerKeep.preference``: the least budget that holds the attention, the mean over all heads."""
        received = self.votes(seen, lambda weights: weights.sum(dim=3))
        mass = received.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        enough = mass[..., -1:] * self.attention_share
        return ((mass < enough).sum(dim=-1) + 1).float().mean()

    def divide(self, total: int, preferences: Sequence[float], most: Sequence[int]) -> list[int]:
        """See ``LayerKeep.divide``: eq. 6, a least budget for every layer and the rest by uncertainty."""
        layers, whole = len(preferences), sum(preferences)
        uncertainty = [preference / whole if whole > 0 else 1 / layers for preference in preferences]
        shares = [self.least_share / layers + (1 - self.least_share) * part for part in uncertainty]
        return proportional(total, shares, most)

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: the window's attention, averaged over neighbours."""
        return pooled(self.votes(seen, summed), self.kernel_size)
