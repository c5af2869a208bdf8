"""Tokens that are stored one by one, in columns: what formats share that pack each token by itself.

Blocks of ``BLOCK_TOKENS`` tokens are filled one after the other, so that growing copies at most one of them.

Shapes: a column has the tokens in dimension 2, (B, K, T, N) with K and N of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from pintpot.cache._base import Place
from pintpot.cache.fused import ReadableChunk
from pintpot.cache.tokens import Tokens

BLOCK_TOKENS = 256
"""Tokens of a block: what streamed attention makes dense at a time."""

STEP_TOKENS = 32
"""The last block grows by so many tokens: a copy of it every 32 tokens rather than every token."""

Columns = dict[str, Tensor]


def room_for(tokens: int, place: Place) -> int:
    """Tokens that rows have room for when they hold ``tokens``."""
    step = min(STEP_TOKENS, place.grow_tokens)
    return -(-tokens // step) * step


class Rows:
    """Columns of tokens.

    Args:
        place: which layer.

    Attributes:
        tokens: how many are held.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.blocks: list[Columns] = []
        self.tokens = 0

    def append(self, columns: Mapping[str, Tensor]) -> None:
        """Put tokens (B, K, T, N) of every column behind those that are there."""
        count = next(iter(columns.values())).shape[2]
        done = 0
        while done < count:
            inside = self.tokens % BLOCK_TOKENS
            more = min(BLOCK_TOKENS - inside, count - done)
            room = room_for(inside + more, self.place)
            if not inside:
                self.blocks.append({name: _sized(new, room) for name, new in columns.items()})
            block = self.blocks[-1]
            for name, new in columns.items():
                if block[name].shape[2] < room:
                    grown = _sized(block[name], room)
                    grown[:, :, :inside] = block[name][:, :, :inside]
                    block[name] = grown
                block[name][:, :, inside : inside + more] = new[:, :, done : done + more]
            self.tokens += more
            done += more

    def views(self) -> Iterator[tuple[int, Columns]]:
        """The blocks in order, each with the number of its first token; views of what is filled."""
        for index in range(len(self.blocks)):
            start = index * BLOCK_TOKENS
            yield start, self.read(start, min(self.tokens, start + BLOCK_TOKENS))

    def read(self, start: int, stop: int) -> Columns:
        """Tokens ``start`` to ``stop``, as views where they are of one block."""
        parts = []
        while start < stop:
            block, inside = self.blocks[start // BLOCK_TOKENS], start % BLOCK_TOKENS
            more = min(BLOCK_TOKENS - inside, stop - start)
            parts.append({name: held[:, :, inside : inside + more] for name, held in block.items()})
            start += more
        if len(parts) == 1:
            return parts[0]
        return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        for block in self.blocks:
            yield from block.values()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        self.blocks = [{name: change(held) for name, held in block.items()} for block in self.blocks]


def _sized(like: Tensor, tokens: int) -> Tensor:
    return like.new_empty((like.shape[0], like.shape[1], tokens, *like.shape[3:]))


def position_column(tokens: Tokens, place: Place, heads: int) -> Columns:
    """The column that tells tokens' positions, int32 (B, heads, T, 1); none where they are consecutive."""
    if place.consecutive:
        return {}
    batch = tokens.keys.shape[0]
    return {"positions": tokens.positions.to(torch.int32).expand(batch, heads, -1)[..., None]}


def position_bytes(place: Place, heads: int) -> int:
    """Bytes of one token's positions."""
    return 0 if place.consecutive else 4 * heads


def positions_of(columns: Columns, start: int, count: int, device: torch.device) -> Tensor:
    """Positions, (1, 1, T) or (B, heads, T), of ``count`` tokens of which the first is number ``start``."""
    if "positions" in columns:
        return columns["positions"].squeeze(-1)
    return torch.arange(start, start + count, device=device)[None, None]


def joined(states: Tensor) -> Tensor:
    """Heads (B, K, T, D) as one vector a token: (B, 1, T, K * D)."""
    return states.transpose(1, 2).flatten(-2).unsqueeze(1)


class LazyChunk(ReadableChunk):
    """Tokens whose keys and values are made when they are asked for, and forgotten again.

    Args:
        tokens: how many.
        keys: gives float32 (B, K, tokens, D).
        values: likewise.
    """

    def __init__(self, tokens: int, keys: Callable[[], Tensor], values: Callable[[], Tensor]) -> None:
        self.tokens, self.keys, self.values = tokens, keys, values

    def read_keys(self) -> Tensor:
        """Its keys, float32 (B, K, tokens, D)."""
        return self.keys()

    def read_values(self) -> Tensor:
        """Its values, float32 (B, K, tokens, D)."""
        return self.values()
