"""Tokens that are stored as short vectors, from which keys and values are made again chunk by chunk.

Shapes: latents of keys and of values (B, 1, T, R), one vector a token for all heads, with R of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, Place, Store, StoreState
from pintpot.cache.dense import DenseState
from pintpot.cache.kivi import KIVIState
from pintpot.cache.rows import LazyChunk, Rows, position_bytes, position_column, positions_of, room_for
from pintpot.cache.tokens import Tokens
from pintpot.core.errors import CompositionError


def open_latents(store: Store, place: Place) -> DenseState | KIVIState:
    """An empty layer of latents.

    Raises:
        CompositionError: for a store whose chunks cannot be read.
    """
    state = store.open(place)
    if not isinstance(state, DenseState | KIVIState):
        raise CompositionError(f"latents cannot be stored by {store.name}", hint="use Dense or kivi")
    return state


def latent_bytes(store: Store, tokens: int, latents: Place, place: Place, batch: int, dtype: torch.dtype) -> int:
    """Exactly what a ``LatentState`` holds.

    Args:
        store: of the latents.
        tokens: stored.
        latents: the place, with the latents' sizes.
        place: the place, with the layer's sizes.
        batch: sequences.
        dtype: of keys and values.
    """
    return store.predict_bytes(tokens, latents, batch, dtype) + batch * room_for(tokens, place) * position_bytes(
        place, 1
    )


class LatentState(StoreState):
    """Latents in a store of their own, and positions where they are not consecutive.

    Args:
        inner: stores the latents.
        place: of the layer.
    """

    def __init__(self, inner: DenseState | KIVIState, place: Place) -> None:
        self.inner, self.place = inner, place
        self.positions = Rows(place)

    @abstractmethod
    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Latents of keys and of values, in the dtype of the keys."""

    @abstractmethod
    def decode_keys(self, latents: Tensor, positions: Tensor, call: Call) -> Tensor:
        """Rotated keys, float32 (B, K, T, D), from float32 latents."""

    @abstractmethod
    def decode_values(self, latents: Tensor, call: Call) -> Tensor:
        """Values, likewise."""

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.inner.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        keys, values = self.encode(tokens)
        self.inner.append(Tokens(keys, values, tokens.positions))
        if columns := position_column(tokens, self.place, 1):
            self.positions.append(columns)

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``."""
        start = 0
        for chunk in self.inner.chunks(call):
            keys = partial(self._keys, chunk.read_keys, start, chunk.tokens, call)
            yield LazyChunk(chunk.tokens, keys, partial(self._values, chunk.read_values, call))
            start += chunk.tokens

    def _keys(self, read: Callable[[], Tensor], start: int, count: int, call: Call) -> Tensor:
        latents = read()
        columns = {} if self.place.consecutive else self.positions.read(start, start + count)
        return self.decode_keys(latents, positions_of(columns, start, count, latents.device), call)

    def _values(self, read: Callable[[], Tensor], call: Call) -> Tensor:
        return self.decode_values(read(), call)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.inner.tensors()
        yield from self.positions.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.inner.over_batch_(change)
        self.positions.over_batch_(change)
