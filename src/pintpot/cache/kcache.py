"""KCache: keys stay on the device, values wait on a slower tier, and only those of the top tokens are fetched.

Source:    He & Wu 2024, "Efficient LLM Inference with KCache", arXiv:2404.18057.
Differs:   values are put on the tier some at a time, the most recent wait on the device; the query heads of a
           key-value head share the tokens whose values are fetched, those of the largest weight in sum; of the tokens
           on the tier, those that are fetched take over the weight of the others.
Saves:     kv_cache, real: all values but those of fewer than ``group_tokens`` recent tokens leave the device, half of
           the cache. They are in host memory under a GPU, on disk under a model in host memory.
Shapes:    scores of all tokens (B, K, M, T); values fetched (B, K, n, D).
Composes:  any keep that keeps as much in all layers.
Use when:  half of the cache must go and every token may matter: all keys are scored, so none is missed.
Not when:  the folder for temporary files is itself in memory (tmpfs): name another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pintpot.cache._base import GROW_TOKENS, Call, Chunk, LayerSizes, Place, top
from pintpot.cache.dense import CHUNK_TOKENS, capacity, dense_chunks
from pintpot.cache.geometry import has_full_attention
from pintpot.cache.recall import RecallState, RecallStore
from pintpot.cache.tiers import BLOCK_TOKENS, Rows
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.ledger import Account
from pintpot.core.shape import ModelShape
from pintpot.core.technique import Claim, Source, technique
from pintpot.core.workload import Workload


@technique(
    name="kcache",
    wing="cache",
    part="store",
    source=Source("Efficient LLM Inference with KCache", year=2024, arxiv="2404.18057"),
    accounts=[Account.KV_CACHE],
    claims=[Claim("throughput", 1.4, versus="the whole cache on the device", at="popular models", where="abstract")],
    fidelity="query heads of a key-value head share the values that are fetched, which stand for all on the tier",
    needs=("even_layers", "even_heads"),
)
@dataclass(frozen=True, kw_only=True)
class KCache(RecallStore):
    """Values on a slower tier.

    Attributes:
        top_tokens: values that are fetched for a query; up to so many tokens attention is exact.
        group_tokens: values that are put on the tier together.
    """

    top_tokens: int = 128
    group_tokens: int = 64

    def __post_init__(self) -> None:
        self.require(top_tokens=self.top_tokens, group_tokens=self.group_tokens)

    @property
    def group(self) -> int:
        """See ``RecallStore.group``."""
        return self.group_tokens

    @property
    def recalled(self) -> int:
        """See ``RecallStore.recalled``."""
        return self.top_tokens

    def width(self, sizes: LayerSizes) -> int:
        """See ``RecallStore.width``: a value."""
        return sizes.value_dim

    def open(self, place: Place) -> KCacheState:
        """See ``Store.open``."""
        return KCacheState(self, place)

    def near_bytes(self, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``RecallStore.near_bytes``: values only."""
        return (self.group_tokens - 1) * batch * place.sizes.heads * place.sizes.value_dim * dtype.itemsize

    def index_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``RecallStore.index_bytes``: all keys."""
        room = capacity(tokens, place.reserve_tokens, place.grow_tokens)
        return room * batch * place.sizes.heads * place.sizes.key_dim * dtype.itemsize

    def risk(self, shape: ModelShape, workload: Workload) -> float:
        """On the embedded model, 1,000 tokens: none at 128 and at 64, 1.4 % at 32; taken to fall with the square."""
        return 0.014 * (32 / self.top_tokens) ** 2

    @classmethod
    def options(cls, shape: ModelShape, workload: Workload) -> Iterable[KCache]:
        """The default, and one that fetches and leaves less on the device; none without full attention."""
        if has_full_attention(shape.config):
            yield cls()
            yield cls(top_tokens=64, group_tokens=32)


class KCacheState(RecallState):
    """Keys of all tokens, and values of the recent ones."""

    def __init__(self, method: KCache, place: Place) -> None:
        super().__init__(method, place)
        self.keys = Buffer()

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if tokens.count and (self.keys.held is None or self.keys.room < tokens.count):
            grow = self.place.grow_tokens or GROW_TOKENS
            self.keys.allocate(tokens.keys, capacity(self.tokens + tokens.count, self.place.reserve_tokens, grow))
        self.keys.write(tokens.keys)
        super().append(replace(tokens, keys=tokens.keys[..., :0]))

    def row(self, tokens: Tokens) -> Tensor:
        """See ``RecallState.row``: values."""
        return tokens.values

    def file(self, tokens: Tokens) -> None:
        """See ``RecallState.file``: the keys are the index, and are there already."""
        self.put(tokens)

    def make_room(self, like: Tensor, filed: int) -> None:
        """See ``RecallState.make_room``: what is fetched does not stay."""

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``: every token, in order."""
        if self.rows is None:
            return
        filed, keys = self.rows.tokens, self.keys.view()
        if filed:
            if call.queries == 1 and filed > self.method.recalled:
                yield TopChunk(keys[:, :, :filed], self.rows, self.method.recalled)
            else:
                for index in range(self.rows.blocks):
                    part = slice(index * BLOCK_TOKENS, min(filed, (index + 1) * BLOCK_TOKENS))
                    yield ValuesChunk(keys[:, :, part], self.rows, index)
        if self._recent.tokens:
            yield from dense_chunks(keys[:, :, filed:], self._recent.view(0).values)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.keys.tensors()
        yield from (held for held in super().tensors() if held.numel())

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        self.keys.over_batch_(change)


class ValuesChunk(Chunk):
    """Keys with the values of one block on the tier."""

    def __init__(self, keys: Tensor, rows: Rows, index: int) -> None:
        self.keys, self.rows, self.index = keys, rows, index
        self.tokens = keys.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``."""
        return query @ self.keys.transpose(-1, -2).to(query.dtype)

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        return weights @ self.rows.block(self.index).to(weights.dtype)


class TopChunk(Chunk):
    """Keys of all filed tokens; only the values of those with the largest weights are fetched, and stand for all."""

    def __init__(self, keys: Tensor, rows: Rows, count: int) -> None:
        self.keys, self.rows, self.count = keys, rows, count
        self.tokens = keys.shape[2]

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``."""
        parts = self.keys.split(CHUNK_TOKENS, dim=2)
        return torch.cat([query @ part.transpose(-1, -2).to(query.dtype) for part in parts], dim=-1)

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        least = torch.finfo(weights.dtype).tiny
        total = weights.sum(dim=-1, keepdim=True)
        chosen = top((weights / total.clamp(min=least)).sum(dim=2), self.count)
        picked = weights.gather(-1, chosen.unsqueeze(2).expand(-1, -1, weights.shape[2], -1))
        picked = picked * (total / picked.sum(dim=-1, keepdim=True).clamp(min=least))
        return picked @ self.rows.gather(chosen).to(weights.dtype)
