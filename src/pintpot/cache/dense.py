"""Dense storage: keys and values as they are, in one buffer that grows in steps.

It is what a cache uses when no store is asked for, so it is not a technique of its own: it saves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.cache._base import GROW_TOKENS, Call, LayerSizes, Place, Store, StoreState
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.tokens import Buffer, Tokens

CHUNK_TOKENS = 512
"""Dense tokens that streamed attention looks at together."""


class DenseChunk(ReadableChunk):
    """Tokens that are dense already.

    Args:
        keys: (B, K, T, D), any float dtype.
        values: (B, K, T, D), any float dtype.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.tokens = keys.shape[-2]

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.keys.float()

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return self.values.float()


def dense_chunks(keys: Tensor, values: Tensor, tokens: int = CHUNK_TOKENS) -> Iterator[DenseChunk]:
    """Keys and values (B, K, T, D) in chunks of at most ``tokens`` tokens; views, nothing is copied."""
    for start in range(0, keys.shape[-2], tokens):
        stop = start + tokens
        yield DenseChunk(keys[..., start:stop, :], values[..., start:stop, :])


class DenseState(StoreState):
    """Dense tokens of one layer, in one buffer each for keys and values."""

    def __init__(self, reserve_tokens: int | None = None, grow_tokens: int = GROW_TOKENS) -> None:
        self.reserve_tokens, self.grow_tokens = reserve_tokens, grow_tokens
        self.keys = Buffer()
        self.values = Buffer()

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.keys.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        for buffer, new in ((self.keys, tokens.keys), (self.values, tokens.values)):
            needed = buffer.tokens + new.shape[-2]
            if buffer.held is None or buffer.room < new.shape[-2]:
                buffer.allocate(new, capacity(needed, self.reserve_tokens, self.grow_tokens))
            buffer.write(new)

    def whole(self) -> tuple[Tensor, Tensor] | None:
        """See ``StoreState.whole``."""
        return self.keys.view(), self.values.view()

    def chunks(self, call: Call) -> Iterator[DenseChunk]:
        """See ``StoreState.chunks``."""
        if self.tokens:
            yield from dense_chunks(self.keys.view(), self.values.view())

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.keys.tensors()
        yield from self.values.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.keys.over_batch_(change)
        self.values.over_batch_(change)

    def crop_(self, tokens: int) -> None:
        """See ``StoreState.crop_``; the buffer keeps its size."""
        for buffer in (self.keys, self.values):
            buffer.tokens = max(0, buffer.tokens - tokens)


def capacity(tokens: int, reserve_tokens: int | None, grow_tokens: int = GROW_TOKENS) -> int:
    """Tokens that a buffer has room for when it holds ``tokens``."""
    rounded = -(-tokens // grow_tokens) * grow_tokens
    return rounded if reserve_tokens is None else max(reserve_tokens, tokens)


@dataclass(frozen=True, kw_only=True)
class Dense(Store):
    """Keys and values as they are."""

    exact: ClassVar[bool] = True

    def open(self, place: Place) -> DenseState:
        """See ``Store.open``."""
        return DenseState(place.reserve_tokens, place.grow_tokens)

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``."""
        room = capacity(tokens, place.reserve_tokens, place.grow_tokens)
        return place.sizes.dense_bytes(room, batch, dtype) if tokens else 0

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """Keys or values of a chunk in float32."""
        return CHUNK_TOKENS * batch * sizes.heads * max(sizes.key_dim, sizes.value_dim) * 4

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``; spare capacity is not read."""
        return place.sizes.dense_bytes(tokens, batch, dtype)
