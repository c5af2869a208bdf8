"""LeoAM: bounds of chunks of keys tell what may matter, large chunks first and only the promising ones in halves.

Source:    Sun et al. 2025, "Breaking the Boundaries of Long-Context LLM Inference: Adaptive KV Management on a Single
           Commodity GPU", arXiv:2506.20187.
Differs:   chunks are halved where the bounds of each query promise most, as far as a budget of tokens allows, and not
           by a rule for each layer from the attention of earlier steps; one tier below the device at a time, not host
           memory and disk together; the query heads of a key-value head recall the same chunks; nothing is packed on
           the way, and fetching does not overlap with computing.
Saves:     kv_cache, real: all tokens but the recent ones leave the device; as many as a query recalls stay there, with
           an abstract (least and greatest number of each channel) for every ``least_tokens`` and ``chunk_tokens``
           tokens. They are in host memory under a GPU, on disk under a model in host memory, in the text's order.
Shapes:    abstracts (B, K, C, D) for C chunks of one size; rows on the tier (B, K, T, 2 D).
Composes:  any keep that keeps as much in all layers.
Use when:  very long prompts, whose important tokens stand together in few places.
Not when:  the context is hardly longer than what is recalled, or the folder for temporary files is itself in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pintpot.cache._base import Place, top
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.recall import RecallState, RecallStore, recalled_bytes
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload


@technique(
    name="leoam",
    wing="cache",
    part="store",
    source=Source(
        "Breaking the Boundaries of Long-Context LLM Inference: Adaptive KV Management on a Single Commodity GPU",
        year=2025,
        arxiv="2506.20187",
    ),
    accounts=[Account.KV_CACHE],
    claims=[
        Claim("inference latency", 3.46, versus="other systems with offloading", at="on average", where="abstract"),
        Claim("inference latency", 5.47, versus="other systems with offloading", at="large batches", where="abstract"),
    ],
    fidelity="chunks are halved by each query's bounds within a budget; one tier below the device at a time",
    needs=("even_layers", "even_heads"),
)
@dataclass(frozen=True, kw_only=True)
class LeoAM(RecallStore):
    """Chunks with abstracts, on a slower tier.

    Attributes:
        budget_tokens: tokens that are recalled for a query; up to so many attention is exact. A multiple of
            ``least_tokens``.
        chunk_tokens: tokens of the largest chunk.
        least_tokens: tokens of the smallest one: ``chunk_tokens`` halved some times.
        recent_tokens: the fewest recent tokens that stay on the device.
    """

    budget_tokens: int = 1024
    chunk_tokens: int = 64
    least_tokens: int = 16
    recent_tokens: int = 64

    def __post_init__(self) -> None:
        self.require(budget_tokens=self.budget_tokens, least_tokens=self.least_tokens)
        self.require(recent_tokens=self.recent_tokens + 1)
        halved = self.chunk_tokens // self.least_tokens
        if self.chunk_tokens % self.least_tokens or halved < 1 or halved & (halved - 1):
            raise CompositionError(
                f"leoam: chunks of {self.chunk_tokens} tokens cannot be halved down to {self.least_tokens}",
                hint="for instance chunk_tokens=64, least_tokens=16",
            )
        if self.budget_tokens % self.least_tokens:
            raise CompositionError(
                f"leoam: {self.budget_tokens} tokens are not whole chunks of {self.least_tokens}",
                hint=f"for instance budget_tokens={(self.budget_tokens // self.least_tokens + 1) * self.least_tokens}",
            )

    @property
    def recent(self) -> int:
        """See ``RecallStore.recent``."""
        return self.recent_tokens

    @property
    def group(self) -> int:
        """See ``RecallStore.group``."""
        return self.chunk_tokens

    @property
    def recalled(self) -> int:
        """See ``RecallStore.recalled``."""
        return self.budget_tokens

    def open(self, place: Place) -> LeoAMState:
        """See ``Store.open``."""
        return LeoAMState(self, place)

    def index_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``RecallStore.index_bytes``: abstracts of two sizes, and what was recalled last."""
        filed = self.filed(tokens, place)
        abstracts = 2 * (filed // self.least_tokens + filed // self.chunk_tokens)
        numbers = abstracts * batch * place.sizes.heads * place.sizes.key_dim * dtype.itemsize
        return numbers + recalled_bytes(min(filed, self.recalled), place.sizes, batch, dtype)

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """On the embedded model, 1,000 tokens: 0.9 % at 256 tokens, 7.0 % at 128 and 15 % at 64."""
        return 9.0 / self.budget_tokens

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[LeoAM]:
        """2K to 256 tokens; none for a model without full attention."""
        if has_full_attention(shape.config):
            for tokens in (2048, 1024, 512, 256):
                yield cls(budget_tokens=tokens)


@dataclass
class Abstracts:
    """The least and the greatest number of each channel of every chunk: (B, K, C, D)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, keys: Tensor, tokens: int) -> Abstracts:
        """Of keys (B, K, T, D), whole chunks of so many tokens."""
        low, high = keys.unflatten(2, (-1, tokens)).aminmax(dim=3)
        return cls(low, high)

    def behind(self, other: Abstracts | None) -> Abstracts:
        """These chunks behind others."""
        if other is None:
            return self
        return Abstracts(torch.cat([other.low, self.low], dim=2), torch.cat([other.high, self.high], dim=2))

    def joined(self, chosen: Tensor, count: int) -> Abstracts:
        """Of larger chunks, each ``count`` of these, by their numbers (B, K, n)."""
        parts = (chosen[..., None] * count + torch.arange(count, device=chosen.device)).flatten(2)
        index = parts[..., None].expand(-1, -1, -1, self.low.shape[-1])
        low, high = self.low.gather(2, index), self.high.gather(2, index)
        return Abstracts(low.unflatten(2, (-1, count)).amin(dim=3), high.unflatten(2, (-1, count)).amax(dim=3))

    def bounds(self, query: Tensor) -> Tensor:
        """The most that the product of any query head (B, K, R, D) with any key of a chunk can be: (B, K, C)."""
        most = query.clamp(min=0) @ self.high.float().transpose(-1, -2)
        return (most + query.clamp(max=0) @ self.low.float().transpose(-1, -2)).amax(dim=2)


class LeoAMState(RecallState):
    """Tokens in order, with abstracts of the smallest and of the largest chunks; those between follow from them."""

    method: LeoAM

    def __init__(self, method: LeoAM, place: Place) -> None:
        super().__init__(method, place)
        self.least: Abstracts | None = None
        self.large: Abstracts | None = None

    def file(self, tokens: Tokens) -> None:
        """See ``RecallState.file``."""
        self.put(tokens)
        self.least = Abstracts.of(tokens.keys, self.method.least_tokens).behind(self.least)
        self.large = Abstracts.of(tokens.keys, self.method.chunk_tokens).behind(self.large)

    def choose(self, query: Tensor, count: int) -> Tensor:
        """See ``RecallState.choose``: as many chunks of each size, the better half of the halves of the last ones."""
        if self.least is None or self.large is None:
            raise ValueError("nothing was filed yet")
        size, least = self.method.chunk_tokens, self.method.least_tokens
        bounds = self.large.bounds(query)
        chosen = top(bounds, min(bounds.shape[-1], count // least))
        while size > least:
            size //= 2
            halves = (chosen[..., None] * 2 + torch.arange(2, device=query.device)).flatten(2)
            bounds = self.least.joined(halves, size // least).bounds(query)
            chosen = halves.gather(2, top(bounds, min(bounds.shape[-1], count // least)))
        return (chosen[..., None] * size + torch.arange(size, device=query.device)).flatten(2)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from super().tensors()
        for held in (self.least, self.large):
            if held is not None:
                yield from (held.low, held.high)

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        for held in (self.least, self.large):
            if held is not None:
                held.low, held.high = change(held.low), change(held.high)
