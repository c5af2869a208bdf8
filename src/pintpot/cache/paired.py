"""Pairs of layers that share the directions of their tokens' keys and values: see MiniCache.

Shapes: B batch, K key-value heads, T tokens, D head dim, n retained tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn import functional

from pintpot.cache._base import Call, Chunk, Place, StoreState
from pintpot.cache.dense import DenseChunk, dense_chunks
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.packed import quantize, scale_dtype
from pintpot.cache.rows import BLOCK_TOKENS, Columns, Rows
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.core.errors import CompositionError
from pintpot.kernels import pack, restore

if TYPE_CHECKING:
    from pintpot.cache.minicache import MiniCache

NAMES = ("keys", "values")
WHOLE = 16
"""Bits that stand for numbers as they are."""

ALMOST_ALONG = 1e-4
"""The least sine of an angle that is divided by; vectors closer than that are interpolated along the straight line."""


def channels_of(dim: int) -> int:
    """Channels that share a scale: the largest divisor of a head's numbers up to 32."""
    return next(size for size in range(min(32, dim), 0, -1) if dim % size == 0)


def merged_direction(lower: Tensor, upper: Tensor, interpolation: float) -> tuple[Tensor, Tensor]:
    """The shared direction of vectors (..., D) of two layers, float32 of length 1, and the angle between them (...)."""
    first, second = (functional.normalize(states.float(), dim=-1) for states in (lower, upper))
    angle = (first * second).sum(dim=-1, keepdim=True).clamp_(-1, 1).arccos_()
    sine = angle.sin()
    straight = sine < ALMOST_ALONG
    near = torch.where(straight, 1 - interpolation, ((1 - interpolation) * angle).sin() / sine)
    far = torch.where(straight, interpolation, (interpolation * angle).sin() / sine)
    return functional.normalize(near * first + far * second, dim=-1), angle[..., 0]


class PairedState(StoreState):
    """What the two layers of a pair have alike: tokens that wait to be merged, lengths, and retained tokens."""

    def __init__(self, method: MiniCache, place: Place) -> None:
        self.method, self.place = method, place
        self.window = {name: Buffer() for name in NAMES}
        self.lengths = Rows(place)
        self.retained = Rows(place)

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self.lengths.tokens + self.window["keys"].tokens

    @abstractmethod
    def lower(self) -> LowerState:
        """The lower layer of the pair."""

    @abstractmethod
    def settle(self, states: Columns) -> None:
        """Take over keys and values of whole groups."""

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        group = self.method.group_tokens
        new = {"keys": tokens.keys, "values": tokens.values}
        for name, buffer in self.window.items():
            if buffer.held is None:
                buffer.allocate(new[name], group - 1)
        ready = (self.window["keys"].tokens + tokens.count) // group * group
        if ready:
            new = {name: buffer.behind(new[name]) for name, buffer in self.window.items()}
            self.settle({name: states[:, :, :ready] for name, states in new.items()})
        for name, buffer in self.window.items():
            buffer.tokens = 0 if ready else buffer.tokens
            buffer.write(new[name][:, :, ready:])

    def keep(self, states: Columns, places: Columns) -> None:
        """Note the lengths of this layer's vectors, and those of them that are retained."""
        self.lengths.append(
            {name: states[name].float().norm(dim=-1, keepdim=True).to(states[name].dtype) for name in NAMES}
        )
        if places:
            self.retained.append({name: _picked(states[name], places[name]) for name in NAMES})

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """This layer's keys or values of tokens ``start`` to ``stop`` (whole groups): float32 (B, K, T, D)."""
        lower, method = self.lower(), self.method
        states = lower.directions(name, start, stop).mul_(self.lengths.read(start, stop)[name].float())
        if method.retained:
            first, last = (edge // method.group_tokens * method.retained for edge in (start, stop))
            places, kept = lower.places.read(first, last)[name], self.retained.read(first, last)[name]
            index = _in_groups(places, method).expand(-1, -1, -1, states.shape[-1])
            states.scatter_(2, index, kept.float())
        return states

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``: merged tokens, then those that wait."""
        merged = self.lengths.tokens
        for start in range(0, merged, BLOCK_TOKENS):
            yield MergedChunk(self, start, min(merged, start + BLOCK_TOKENS))
        yield from self.handed_chunks()
        if self.window["keys"].tokens:
            yield DenseChunk(self.window["keys"].view(), self.window["values"].view())

    def handed_chunks(self) -> Iterator[Chunk]:
        """Tokens that wait for the upper layer."""
        yield from ()

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        for held in self._parts():
            yield from held.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        for held in self._parts():
            held.over_batch_(change)

    def _parts(self) -> list[Buffer | Rows]:
        return [*self.window.values(), self.lengths, self.retained]


class LowerState(PairedState):
    """The lower layer of a pair, which also holds what both share."""

    def __init__(self, method: MiniCache, place: Place) -> None:
        super().__init__(method, place)
        self.shared = Rows(place)
        self.places = Rows(place)
        self.handed: list[Columns] = []

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return super().tokens + sum(states["keys"].shape[2] for states in self.handed)

    def lower(self) -> LowerState:
        """See ``PairedState.lower``."""
        return self

    def settle(self, states: Columns) -> None:
        """Keep whole groups until the layer above has been given the same tokens."""
        self.handed.append({name: new.clone() for name, new in states.items()})

    def merge(self, own: Columns, upper: Columns) -> Columns:
        """Merge some tokens of both layers: the places of what is retained, int64 (B, K, n, 1) among them."""
        method = self.method
        merged = {name: merged_direction(own[name], upper[name], method.interpolation) for name in NAMES}
        self.shared.append(
            {key: column for name in NAMES for key, column in self._columns(name, merged[name][0], own[name]).items()}
        )
        local = {name: _farthest(merged[name][1], method) for name in NAMES} if method.retained else {}
        if local:
            self.places.append({name: places.to(torch.uint8) for name, places in local.items()})
        places = {name: _in_groups(found, method) for name, found in local.items()}
        self.keep(own, places)
        return places

    def _columns(self, name: str, direction: Tensor, like: Tensor) -> Columns:
        dtype, bits = like.dtype, self.method.bits
        if bits == WHOLE:
            return {name: direction.to(dtype)}
        groups = direction.unflatten(-1, (-1, channels_of(direction.shape[-1])))
        codes, scale, low = quantize(groups, bits, scale_dtype(dtype))
        return {name: pack(codes.flatten(-2), bits), f"{name}_scale": scale, f"{name}_low": low}

    def directions(self, name: str, start: int, stop: int) -> Tensor:
        """Shared directions of keys or values, float32 (B, K, T, D), fresh memory."""
        held = self.shared.read(start, stop)
        if self.method.bits == WHOLE:
            return held[name].to(torch.float32, copy=True)
        sizes = self.place.sizes
        dim = sizes.key_dim if name == "keys" else sizes.value_dim
        stored = (held[name], held[f"{name}_scale"], held[f"{name}_low"])
        return restore(*stored, bits=self.method.bits, group_size=channels_of(dim), count=dim)

    def handed_chunks(self) -> Iterator[Chunk]:
        """See ``PairedState.handed_chunks``."""
        for states in self.handed:
            yield from dense_chunks(states["keys"], states["values"])

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from super().tensors()
        yield from self.shared.tensors()
        yield from self.places.tensors()
        for states in self.handed:
            yield from states.values()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        super().over_batch_(change)
        self.shared.over_batch_(change)
        self.places.over_batch_(change)
        self.handed = [{name: change(held) for name, held in states.items()} for states in self.handed]


class UpperState(PairedState):
    """The upper layer of a pair."""

    def lower(self) -> LowerState:
        """See ``PairedState.lower``."""
        if self.place.below is None:
            raise ValueError("the upper layer of a pair needs the lower one")
        return cast(LowerState, self.place.below())

    def settle(self, states: Columns) -> None:
        """Merge with the same tokens of the layer below, some at a time."""
        lower = self.lower()
        waiting = lower.handed[0] if lower.handed else None
        if waiting is None or waiting["keys"].shape != states["keys"].shape:
            raise CompositionError(
                "a layer was given other tokens than the one below, so the two cannot be merged",
                hint="reset the cache, and run the layers of a model in order",
            )
        for start in range(0, states["keys"].shape[2], BLOCK_TOKENS):
            pair = [
                {name: held[:, :, start : start + BLOCK_TOKENS] for name, held in of.items()}
                for of in (waiting, states)
            ]
            self.keep(pair[1], lower.merge(*pair))
        lower.handed.pop(0)


class MergedChunk(ReadableChunk):
    """Merged tokens of one layer of a pair."""

    def __init__(self, state: PairedState, start: int, stop: int) -> None:
        self.state, self.start, self.stop = state, start, stop
        self.tokens = stop - start

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.state.read("keys", self.start, self.stop)

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return self.state.read("values", self.start, self.stop)


def _farthest(angle: Tensor, method: MiniCache) -> Tensor:
    """Places, within their groups, of the tokens of the greatest angles (B, K, T): int64 (B, K, groups * n, 1)."""
    groups = angle.unflatten(-1, (-1, method.group_tokens))
    return groups.topk(method.retained, dim=-1).indices.sort(dim=-1).values.flatten(-2)[..., None]


def _in_groups(places: Tensor, method: MiniCache) -> Tensor:
    """Places within groups (B, K, n, 1) as places among all their tokens, int64."""
    groups = torch.arange(places.shape[2] // method.retained, device=places.device) * method.group_tokens
    return places.long() + groups.repeat_interleave(method.retained)[:, None]


def _picked(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(2, places.expand(-1, -1, -1, states.shape[-1]))
