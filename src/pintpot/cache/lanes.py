"""Heads of one layer that keep different numbers of tokens: a state of the store for each group of heads.

A keep says how many heads each lane has, so sizes are known beforehand; which heads those are is settled for each
sequence when the layer decides for the first time, and stays so. Tokens that every head keeps lie beside the lanes.

Shapes: B batch, K key-value heads, h of them in a lane, M query rows of one key-value head, N tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, Keep, Lane, Place, Seen, Store, StoreState
from pintpot.cache.residue import ResidueState
from pintpot.cache.tokens import Tokens


def open_state(store: Store, keep: Keep | None, place: Place) -> StoreState:
    """An empty layer, with lanes if the keep wants them."""
    lanes = keep.lanes(place) if keep is not None else ()
    return LaneState(store, lanes, place) if lanes else store.open(place)


def stored_parts(keep: Keep | None, tokens: int, place: Place) -> list[tuple[int, Place]]:
    """What the states of a layer hold after ``tokens`` tokens, and how each leaves its place to a store."""
    if keep is None:
        return [(tokens, place)]
    lanes = keep.lanes(place)
    if not lanes:
        return [(keep.held(tokens).stored, place)]
    first = min(tokens, keep.sinks)
    own = [(lane.keep.held(tokens).stored - first, lane_place(place, lane.heads)) for lane in lanes]
    return [(first, lane_place(place, place.sizes.heads)), *own]


def lane_bytes(keep: Keep, tokens: int, place: Place, batch: int) -> int:
    """Bytes of the numbers of the heads of lanes after ``tokens`` tokens; none before the first decision."""
    decided, _ = keep.decided(max(0, tokens - keep.sinks))
    return batch * place.sizes.heads * torch.int64.itemsize if decided and keep.lanes(place) else 0


def mean_stored(keep: Keep, tokens: int, place: Place) -> int:
    """Stored tokens of a head, on average, after ``tokens`` tokens."""
    lanes = keep.lanes(place) or (Lane(place.sizes.heads, keep),)
    return sum(lane.heads * lane.keep.held(tokens).stored for lane in lanes) // sum(lane.heads for lane in lanes)


def lane_place(place: Place, heads: int) -> Place:
    """The place as a lane of so many heads leaves it to a store."""
    share = place.sizes.query_heads // max(1, place.sizes.heads)
    sizes = replace(place.sizes, heads=heads, query_heads=share * heads)
    return place.but(sizes=sizes, reserve_tokens=None, grow_tokens=1)


class LaneState(StoreState):
    """The stored tokens of a layer with lanes.

    Args:
        store: how tokens are stored.
        lanes: how many heads each has, and what they keep.
        place: which layer.

    Attributes:
        heads: int64 (B, K), the heads of the first lane, of the second, ...; None before the first decision.
    """

    def __init__(self, store: Store, lanes: Sequence[Lane], place: Place) -> None:
        self.lanes = tuple(lanes)
        self.shared = store.open(lane_place(place, place.sizes.heads))
        self.states = [store.open(lane_place(place, lane.heads)) for lane in lanes]
        self.heads: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many are stored in the fullest head."""
        return self.shared.tokens + max(state.tokens for state in self.states)

    def append(self, tokens: Tokens) -> None:
        """Store tokens in every head."""
        self.shared.append(tokens)

    def keep_(
        self,
        seen: Seen,
        scores: Tensor,
        assign: Callable[[Seen], Tensor],
        remains: ResidueState | None = None,
    ) -> None:
        """Store the survivors of the tokens that are decided on, lane by lane.

        Args:
            seen: what the layer has seen.
            scores: (B, K, decided).
            assign: gives the heads in the order of lanes, (B, K); asked once.
            remains: takes note of those that are let go.
        """
        if self.heads is None:
            self.heads = assign(seen)
        tokens = seen.tokens.part(0, seen.decided)
        gone = torch.ones_like(scores, dtype=torch.bool)
        for lane, state, heads in self._each():
            index = heads[..., None].expand(-1, -1, scores.shape[-1])
            chosen = lane.keep.choose(scores.gather(1, index))
            state.append(tokens.of_heads(heads).gather(chosen))
            gone.scatter_(1, index, torch.ones_like(index, dtype=torch.bool).scatter_(2, chosen, False))
        if remains is not None:
            remains.absorb(tokens, gone)

    def _each(self) -> Iterator[tuple[Lane, StoreState, Tensor]]:
        """Lanes with their states and heads (B, h)."""
        if self.heads is None:
            return
        sizes = [lane.heads for lane in self.lanes]
        yield from zip(self.lanes, self.states, self.heads.split(sizes, dim=1), strict=True)

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``: of all heads first, then lane by lane."""
        yield from self.shared.chunks(call)
        total = sum(lane.heads for lane in self.lanes)
        for _, state, heads in self._each():
            if state.tokens:
                for chunk in state.chunks(self._own(call, heads)):
                    yield LaneChunk(chunk, heads, total)

    def observe(self, call: Call, tokens: Tokens | None) -> None:
        """See ``StoreState.observe``: each lane by itself."""
        self.shared.observe(call, None)
        for _, state, heads in self._each():
            state.observe(self._own(call, heads), None)

    def _own(self, call: Call, heads: Tensor) -> Call:
        """The call as it is for the heads (B, h) of a lane."""
        grouped = call.query.unflatten(1, (sum(lane.heads for lane in self.lanes), -1))
        return replace(call, query=_pick(grouped, heads).flatten(1, 2))

    def tier_nbytes(self) -> int:
        """See ``StoreState.tier_nbytes``."""
        return self.shared.tier_nbytes() + sum(state.tier_nbytes() for state in self.states)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``."""
        yield from self.shared.tensors()
        for state in self.states:
            yield from state.tensors()
        if self.heads is not None:
            yield self.heads

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self.shared.over_batch_(change)
        for state in self.states:
            state.over_batch_(change)
        if self.heads is not None:
            self.heads = change(self.heads)


class LaneChunk(Chunk):
    """Tokens that only some heads hold; the others give them no weight.

    Args:
        chunk: of those heads.
        heads: which they are, int64 (B, h).
        total: K.
    """

    def __init__(self, chunk: Chunk, heads: Tensor, total: int) -> None:
        self.chunk, self.heads, self.total = chunk, heads, total
        self.tokens = chunk.tokens

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``; the least number for heads that do not hold the tokens."""
        return self.capped(query, None)

    def capped(self, query: Tensor, softcap: float | None) -> Tensor:
        """See ``Chunk.capped``; likewise."""
        own = self.chunk.capped(_pick(query, self.heads), softcap)
        return self._spread(own, torch.finfo(own.dtype).min)

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``; zero for heads that do not hold the tokens."""
        return self._spread(self.chunk.mix(_pick(weights, self.heads)), 0.0)

    def _spread(self, own: Tensor, elsewhere: float) -> Tensor:
        full = own.new_full((own.shape[0], self.total, *own.shape[2:]), elsewhere)
        return full.scatter_(1, self.heads[..., None, None].expand_as(own), own)


def _pick(states: Tensor, heads: Tensor) -> Tensor:
    """The heads (B, h) of states (B, K, ...)."""
    index = heads.reshape(*heads.shape, *[1] * (states.dim() - 2))
    return states.gather(1, index.expand(-1, -1, *states.shape[2:]))
