"""Layers that hold what cannot be predicted from the layer below: see AQUA-KV.

Within one pass through the model, each layer hands its keys and values to the layer above, which lets go of them when
it has used them: block by block those that are read, and those of new tokens when the layer above is given the same.

Shapes: B batch, K key-value heads, T tokens, D head dim; E numbers of a token's keys, all heads together, F of its
values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.cache._base import Call, Chunk, Place, StoreState
from pintpot.cache.dense import DenseChunk
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.higgs import decode, encode
from pintpot.cache.rows import BLOCK_TOKENS, Columns, Rows, position_column
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.errors import CompositionError

KEYS, VALUES = "keys", "values"
States = tuple[Tensor, Tensor]
"""Keys (B, T, E) without rotation and values (B, T, F)."""


def heads_together(states: Tensor) -> Tensor:
    """(B, K, T, D) as (B, T, K * D)."""
    return states.transpose(1, 2).flatten(2)


def heads_apart(states: Tensor, heads: int) -> Tensor:
    """(B, T, K * D) as (B, K, T, D)."""
    return states.unflatten(2, (heads, -1)).transpose(1, 2)


def predict(name: str, found: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """What calibration predicts from inputs (B, T, E): float32 (B, T, F)."""
    return functional.linear(inputs.float(), found[f"{name}_weight"].float(), found[f"{name}_offset"].float())


class PredictedState(StoreState):
    """First tokens as they are, packed ones, and recent ones as they are.

    Args:
        place: which layer, with what calibration has found for it.
        sinks: first tokens that stay as they are.
        unit: tokens that are packed together.
    """

    def __init__(self, place: Place, sinks: int, unit: int) -> None:
        self.place, self.sinks, self.unit = place, sinks, unit
        self.first = {KEYS: Buffer(), VALUES: Buffer()}
        self.window = {KEYS: Buffer(), VALUES: Buffer()} | ({} if place.consecutive else {"positions": Buffer()})
        self.packed = Rows(place)
        self.reading: dict[int, PredictedChunk] = {}
        self.fresh: list[States] = []

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.first[KEYS].tokens + self.packed.tokens + self.window[KEYS].tokens

    @property
    def below(self) -> PredictedState | None:
        """The state of the layer below; None in the lowest layer."""
        if not self.place.index:
            return None
        if self.place.below is None:
            raise ValueError("a layer that is predicted needs the one below")
        return cast(PredictedState, self.place.below())

    @property
    def hands_up(self) -> bool:
        """Whether there is a layer above."""
        return self.place.index + 1 < self.place.layers

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        if self.first[KEYS].held is None:
            for buffers, room in ((self.first, self.sinks), (self.window, self.unit - 1)):
                for name, column in self._columns(tokens).items():
                    if name in buffers:
                        buffers[name].allocate(column, room)
        early = min(self.sinks - self.first[KEYS].tokens, tokens.count)
        columns = self._columns(tokens)
        for name, buffer in self.first.items():
            buffer.write(columns[name][:, :, :early])
        columns = {name: column[:, :, early:] for name, column in columns.items()}
        ready = (self.window[KEYS].tokens + tokens.count - early) // self.unit * self.unit
        if ready:
            columns = {name: buffer.behind(columns[name]) for name, buffer in self.window.items()}
            for start in range(0, ready, BLOCK_TOKENS):
                stop = min(ready, start + BLOCK_TOKENS)
                self._pack({name: column[:, :, start:stop] for name, column in columns.items()})
        for name, buffer in self.window.items():
            buffer.tokens = 0 if ready else buffer.tokens
            buffer.write(columns[name][:, :, ready:])

    def _columns(self, tokens: Tokens) -> Columns:
        return {KEYS: tokens.keys, VALUES: tokens.values} | position_column(tokens, self.place, 1)

    def _pack(self, columns: Columns) -> None:
        """Round what is not predicted of a block of tokens, and hand what comes back of them to the layer above."""
        keys, dtype = columns[KEYS], columns[KEYS].dtype
        if self.place.rotary is not None:
            positions = self._positions(self.packed.tokens, keys.shape[2], columns.get("positions"))
            keys = self.place.rotary.unrotate(keys, positions)
        below = self._fresh_below(keys.shape[2])
        kept = {} if self.place.consecutive else {"positions": columns["positions"]}
        made, back = self._round(KEYS, heads_together(keys), None if below is None else below[0], dtype)
        kept |= made
        inputs = None if below is None else torch.cat([back, below[1]], dim=-1)
        made, values = self._round(VALUES, heads_together(columns[VALUES]), inputs, dtype)
        self.packed.append(kept | made)
        if self.hands_up:
            self.fresh.append((back, values))

    def _fresh_below(self, count: int) -> States | None:
        below = self.below
        if below is None:
            return None
        if not below.fresh or below.fresh[0][0].shape[1] != count:
            raise CompositionError(
                "a layer was given other tokens than the one below, from which it is predicted",
                hint="reset the cache, and run the layers of a model in order",
            )
        return below.fresh.pop(0)

    def _round(self, name: str, states: Tensor, inputs: Tensor | None, dtype: torch.dtype) -> tuple[Columns, Tensor]:
        """What is kept of keys or values (B, T, E), and what comes back of them in the cache's dtype."""
        predicted = torch.zeros((), device=states.device)
        if inputs is not None:
            predicted = predict(name, self.place.tensors, inputs)
        grid = self.place.tensors["grid"]
        codes, scale = encode(states.float() - predicted, grid, dtype)
        back = predicted + decode(codes, scale, grid, states.shape[-1])
        return {name: codes[:, None], f"{name}_scale": scale[:, None]}, back.to(dtype)

    def restored(self, start: int, stop: int, below: States | None) -> States:
        """Packed tokens ``start`` to ``stop``, from those of the layer below."""
        held = self.packed.read(start, stop)
        sizes, dtype = self.place.sizes, cast(Tensor, self.first[KEYS].held).dtype
        keys = self._back(KEYS, held, sizes.heads * sizes.key_dim)
        keys = (keys if below is None else keys + predict(KEYS, self.place.tensors, below[0])).to(dtype)
        values = self._back(VALUES, held, sizes.heads * sizes.value_dim)
        if below is not None:
            values += predict(VALUES, self.place.tensors, torch.cat([keys, below[1]], dim=-1))
        return keys, values.to(dtype)

    def _back(self, name: str, held: Columns, numbers: int) -> Tensor:
        return decode(held[name][:, 0], held[f"{name}_scale"][:, 0], self.place.tensors["grid"], numbers)

    def handed(self, start: int, stop: int) -> States:
        """Packed tokens ``start`` to ``stop`` for the layer above; made anew where they were handed over before."""
        chunk = self.reading.pop(start, None) or PredictedChunk(self, start, stop)
        keys, values = chunk.states()
        return keys[:, : stop - start], values[:, : stop - start]

    def rotated_keys(self, keys: Tensor, start: int) -> Tensor:
        """Keys (B, T, E) of packed tokens from ``start`` on, rotated where the model rotates: float32 (B, K, T, D)."""
        apart = heads_apart(keys.float(), self.place.sizes.heads)
        if self.place.rotary is None:
            return apart
        count = keys.shape[1]
        column = None if self.place.consecutive else self.packed.read(start, start + count)["positions"]
        return self.place.rotary.rotate(apart, self._positions(start, count, column))

    def _positions(self, start: int, count: int, column: Tensor | None) -> Tensor:
        if column is not None:
            return column[..., 0]
        number = self.sinks + start
        return torch.arange(number, number + count, device=self.place.tensors["grid"].device)[None, None]

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``."""
        yield from self._dense(self.first)
        reading = {}
        for start in range(0, self.packed.tokens, BLOCK_TOKENS):
            stop = min(self.packed.tokens, start + BLOCK_TOKENS)
            known = self.reading.get(start)
            chunk = known if known is not None and known.stop == stop else PredictedChunk(self, start, stop)
            reading[start] = chunk
            yield chunk
        # What the uppermost layer has read goes with its chunks.
        self.reading = reading if self.hands_up else {}
        yield from self._dense(self.window)

    def _dense(self, buffers: Mapping[str, Buffer]) -> Iterator[Chunk]:
        if buffers[KEYS].tokens:
            yield DenseChunk(buffers[KEYS].view(), buffers[VALUES].view())

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``; what is handed from layer to layer is gone after each pass."""
        for buffer in (*self.first.values(), *self.window.values()):
            yield from buffer.tensors()
        yield from self.packed.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        for buffer in (*self.first.values(), *self.window.values()):
            buffer.over_batch_(change)
        self.packed.over_batch_(change)
        self.reading = {}


class PredictedChunk(ReadableChunk):
    """A block of packed tokens, dense from its first use on."""

    def __init__(self, state: PredictedState, start: int, stop: int) -> None:
        self.state, self.start, self.stop = state, start, stop
        self.tokens = stop - start
        self._states: States | None = None

    def states(self) -> States:
        """Keys without rotation and values, from the layers below where they are not at hand."""
        if self._states is None:
            below = self.state.below
            handed = None if below is None else below.handed(self.start, self.stop)
            self._states = self.state.restored(self.start, self.stop, handed)
        return self._states

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.state.rotated_keys(self.states()[0], self.start)

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return heads_apart(self.states()[1].float(), self.state.place.sizes.heads)
