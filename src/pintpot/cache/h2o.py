"""H2O: keep the heavy hitters, the tokens that have received most attention so far, and the recent ones.

Source:    Zhang et al. 2023, "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
           arXiv:2306.14048, Algorithm 1; heavy_ratio of the authors' code.
Differs:   a token is judged once, when it leaves the recent ones, by the attention it has received until then (over a
           prompt that is read at once: from all queries after it, as in the paper), and a heavy hitter stays for good;
           a share of what comes instead of a fixed number. Query heads of a key-value head add up.
Saves:     kv_cache, real: evicted tokens are gone. One float32 number is held for every pending token of every head.
Shapes:    attention received (B, K, R, T); scores and notes (B, K, T).
Composes:  any store; tokens are evicted before they are packed.
Use when:  long answers, in which what mattered goes on mattering.
Not when:  the prompt is very long and read at once: every query attends once more, in float32, to count the attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from pintpot.cache._base import Seen
from pintpot.cache.fraction import ChunkedKeep
from pintpot.core.ledger import Account
from pintpot.core.technique import Claim, Source, technique


@technique(
    name="h2o",
    wing="cache",
    part="keep",
    source=Source(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
        year=2023,
        arxiv="2306.14048",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim(
            "throughput",
            29,
            versus="Hugging Face Accelerate",
            at="20 % heavy hitters, OPT-6.7B and OPT-30B",
            where="abstract",
        ),
    ],
    fidelity="a token is judged once, when it leaves the recent ones; heavy hitters no longer compete afterwards",
)
@dataclass(frozen=True, kw_only=True)
class H2O(ChunkedKeep):
    """Attention received so far.

    Attributes:
        kept_fraction: share of the tokens before the recent ones that stays as heavy hitters.
        recent_tokens: recent tokens that stay.
        sink_tokens: first tokens that stay without being judged; the paper has none.
    """

    # A guess: keeps that do not see the question lose most of the recall, of which a fifth counts.
    risk_at_half: ClassVar[float] = 0.09
    traces: ClassVar[int] = 1
    kept_fraction: float = 0.1
    recent_tokens: int = 128
    sink_tokens: int = 0

    @property
    def recent(self) -> int:
        """See ``Keep.recent``."""
        return self.recent_tokens

    def trace(self, seen: Seen) -> Tensor:
        """See ``Keep.trace``: the attention of the new queries is added to what was received before."""
        received = seen.received().sum(dim=2)[..., None]
        return received if seen.tokens.trace is None else received.add_(seen.tokens.trace)

    def score(self, seen: Seen) -> Tensor:
        """See ``Keep.score``: what has been received in all.

        Raises:
            ValueError: when nothing was noted.
        """
        if seen.tokens.trace is None:
            raise ValueError("h2o scores by its notes, and none were taken")
        return seen.tokens.trace[:, :, : seen.decided, 0]
