"""A few tokens that are held exactly beside a packed store, and stand for their packed selves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pintpot.cache._base import LayerSizes
from pintpot.cache.tokens import Buffer, Tokens
from pintpot.kernels import Attended, attended, capped


class ExactTokens:
    """Room for some tokens, filled from the first ones that come.

    Args:
        room: how many.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.buffers = {"keys": Buffer(), "values": Buffer(), "index": Buffer()}

    def add(self, tokens: Tokens, scores: Tensor, first: int) -> None:
        """Hold those of the next tokens with the highest scores (B, 1, T), while there is room.

        Args:
            tokens: the next tokens.
            scores: of each.
            first: number in the store of the first of them.
        """
        index = self.buffers["index"]
        if index.held is None:
            self.buffers["keys"].allocate(tokens.keys, self.room)
            self.buffers["values"].allocate(tokens.values, self.room)
            index.allocate(tokens.keys.new_empty((tokens.keys.shape[0], 1, 0, 1), dtype=torch.int32), self.room)
        count = min(index.room, tokens.count)
        if not count:
            return
        chosen = scores.topk(count, dim=-1).indices.sort(dim=-1).values
        found = tokens.gather(chosen)
        self.buffers["keys"].write(found.keys)
        self.buffers["values"].write(found.values)
        index.write((chosen + first).to(torch.int32)[..., None])

    def put_in(self, name: str, numbers: Tensor, first: int) -> Tensor:
        """Float32 ``keys`` or ``values`` (B, K, T, D) from number ``first`` on, with the exact tokens put in."""
        if not self.buffers["index"].tokens:
            return numbers
        count = numbers.shape[2]
        index = self.buffers["index"].view().long() - first
        # Those of other chunks go to a place behind the last, which is left out again.
        index = torch.where((index >= 0) & (index < count), index, torch.full_like(index, count))
        exact = self.buffers[name].view().float()
        longer = torch.cat([numbers, numbers[:, :, :1]], dim=2)
        return longer.scatter_(2, index.expand_as(exact), exact)[:, :, :count]

    def numbers(self) -> Tensor | None:
        """Their numbers in the store, int32 (B, n) in their order; None where there are none."""
        index = self.buffers["index"]
        return index.view().flatten(1).contiguous() if index.tokens else None

    def attend(self, query: Tensor, first: int, stop: int, softcap: float | None) -> Attended | None:
        """What float32 queries (B, K, M, D) get from those of number ``first`` to ``stop``; None where there are none.

        The others weigh nothing beside any token.
        """
        numbers = self.numbers()
        if numbers is None:
            return None
        scores = capped(query @ self.buffers["keys"].view().float().transpose(-1, -2), softcap)
        others = (numbers < first) | (numbers >= stop)
        scores = scores.masked_fill(others[:, None, None], torch.finfo(scores.dtype).min)
        return attended(scores, self.buffers["values"].view().float())

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        for buffer in self.buffers.values():
            yield from buffer.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        for buffer in self.buffers.values():
            buffer.over_batch_(change)


def exact_bytes(room: int, sizes: LayerSizes, dtype: torch.dtype) -> int:
    """Bytes of ``ExactTokens`` for one sequence."""
    return room * (sizes.heads * (sizes.key_dim + sizes.value_dim) * dtype.itemsize + 4)
