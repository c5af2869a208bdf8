"""Layers that hold what attention is given, and make keys and values from it chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, Place, StoreState
from pintpot.cache.latent import LatentState
from pintpot.cache.rematerialize import Projections
from pintpot.cache.rows import BLOCK_TOKENS, LazyChunk, Rows, position_column, positions_of
from pintpot.cache.token_grid import TokenGrid
from pintpot.cache.tokens import Tokens


class InputState(StoreState):
    """Packed inputs of a layer."""

    def __init__(self, grid: TokenGrid, place: Place) -> None:
        self.grid, self.place = grid, place
        self.rows = Rows(place)
        self.dtype = torch.float32

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.rows.tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if tokens.inputs is None:
            raise ValueError("these tokens come without the attention's inputs")
        self.dtype = tokens.inputs.dtype
        for start in range(0, tokens.count, BLOCK_TOKENS):
            piece = tokens.part(start, start + BLOCK_TOKENS)
            if piece.inputs is not None:
                columns = self.grid.pack(self.residue(piece.inputs.float()), self.dtype)
                self.rows.append({**columns, **position_column(piece, self.place, 1)})

    def residue(self, inputs: Tensor) -> Tensor:
        """What is packed of the next tokens' inputs (B, 1, T, hidden), float32."""
        return inputs

    def estimate(self, start: int, stop: int) -> Tensor:
        """The inputs of tokens ``start`` to ``stop``, float32 (B, 1, T, hidden)."""
        return self.grid.unpack(self.rows.read(start, stop))

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``."""
        made = Projections(call.module, self.place.sizes)
        for start, columns in self.rows.views():
            stop = start + columns["codes"].shape[2]
            keys, values = partial(self._keys, made, start, stop), partial(self._values, made, start, stop)
            yield LazyChunk(stop - start, keys, values)

    def _keys(self, made: Projections, start: int, stop: int) -> Tensor:
        keys = made.keys(self.estimate(start, stop).squeeze(1).to(self.dtype))
        positions = positions_of(self.rows.read(start, stop), start, stop - start, keys.device)
        return made.finished_keys(keys, self.place, positions)

    def _values(self, made: Projections, start: int, stop: int) -> Tensor:
        return made.finished_values(made.values(self.estimate(start, stop).squeeze(1).to(self.dtype)))

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.rows.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.rows.over_batch_(change)


class InputLatentState(LatentState):
    """Inputs in the coordinates of the projections' left singular vectors."""

    def encode(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """See ``LatentState.encode``."""
        if tokens.inputs is None:
            raise ValueError("these tokens come without the attention's inputs")
        down = (self.place.tensors["key_down"], self.place.tensors["value_down"])
        keys, values = (tokens.inputs @ factor.to(tokens.inputs.dtype) for factor in down)
        return keys, values

    def decode_keys(self, latents: Tensor, positions: Tensor, call: Call) -> Tensor:
        """See ``LatentState.decode_keys``."""
        made = Projections(call.module, self.place.sizes)
        return made.finished_keys(self._up("key", latents), self.place, positions)

    def decode_values(self, latents: Tensor, call: Call) -> Tensor:
        """See ``LatentState.decode_values``."""
        return Projections(call.module, self.place.sizes).finished_values(self._up("value", latents))

    def _up(self, name: str, latents: Tensor) -> Tensor:
        found = self.place.tensors
        return latents.squeeze(1) @ found[f"{name}_up"].float() + found[f"{name}_bias"].float()
