"""Tokens on their way through a layer of the cache, and the window in which they wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Some tokens of one layer. All tensors have the tokens in dimension 2.

    Attributes:
        keys: (B, K, T, D).
        values: (B, K, T, D).
        positions: int64 (1, 1, T) or (B, K, T), their numbers in the text.
        inputs: what attention was given for them, (B, 1, T, hidden); None unless asked for.
        trace: what the keep has noted of them, float32 (B, K, T, N); None unless asked for.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    inputs: Tensor | None = None
    trace: Tensor | None = None

    @classmethod
    def consecutive(
        cls, keys: Tensor, values: Tensor, first: int = 0, inputs: Tensor | None = None, trace: Tensor | None = None
    ) -> Tokens:
        """Tokens of which the first is number ``first`` of the text."""
        positions = torch.arange(first, first + keys.shape[2], device=keys.device)[None, None]
        return cls(keys, values, positions, inputs, trace)

    @property
    def count(self) -> int:
        """T."""
        return self.keys.shape[2]

    def part(self, start: int, stop: int | None = None) -> Tokens:
        """Tokens ``start`` to ``stop``, as views."""
        return self._each(lambda held: held[:, :, start:stop])

    def row(self, row: int) -> Tokens:
        """Those of one sequence, as views."""
        return self._each(lambda held: held[row : row + 1] if held.shape[0] > 1 else held)

    def gather(self, chosen: Tensor) -> Tokens:
        """The chosen ones: int64 (B, K, n), or (B, 1, n) where all heads hold the same."""

        def pick(held: Tensor) -> Tensor:
            index = chosen.expand(-1, held.shape[1], -1) if held.dim() == 4 else chosen
            if held.dim() == 3:
                return held.expand(chosen.shape[0], chosen.shape[1], -1).gather(2, index)
            return held.gather(2, index[:, : held.shape[1], :, None].expand(-1, -1, -1, held.shape[-1]))

        return self._each(pick)

    def of_heads(self, heads: Tensor) -> Tokens:
        """Only some heads: int64 (B, h)."""

        def pick(held: Tensor) -> Tensor:
            index = heads.reshape(*heads.shape, *[1] * (held.dim() - 2))
            return held if held.shape[1] == 1 else held.gather(1, index.expand(-1, -1, *held.shape[2:]))

        return self._each(pick)

    def with_trace(self, trace: Tensor | None) -> Tokens:
        """The same tokens with another note."""
        return replace(self, trace=trace)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(
            change(self.keys),
            change(self.values),
            change(self.positions),
            None if self.inputs is None else change(self.inputs),
            None if self.trace is None else change(self.trace),
        )


class Buffer:
    """Tokens of one tensor with room for more.

    Attributes:
        held: (B, K, capacity, D), or None before the first token.
        tokens: how many of them are filled.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.tokens = 0

    @property
    def room(self) -> int:
        """Tokens that can be written without growing."""
        return 0 if self.held is None else self.held.shape[-2] - self.tokens

    def allocate(self, like: Tensor, capacity: int) -> None:
        """Room for ``capacity`` tokens like (B, K, ..., D), what is filled carried over."""
        grown = like.new_empty((like.shape[0], like.shape[1], capacity, like.shape[-1]))
        if self.held is not None and self.tokens:
            grown[:, :, : self.tokens].copy_(self.view())
        self.held = grown

    def write(self, tokens: Tensor) -> None:
        """Put tokens (B, K, T, D) behind those that are there; there must be room."""
        count = tokens.shape[-2]
        if self.held is not None and count:
            self.held[:, :, self.tokens : self.tokens + count].copy_(tokens)
            self.tokens += count

    def view(self) -> Tensor:
        """The filled tokens (B, K, T, D), not copied."""
        if self.held is None:
            raise ValueError("an empty buffer has no shape")
        return self.held[:, :, : self.tokens]

    def behind(self, tokens: Tensor) -> Tensor:
        """The filled tokens with ``tokens`` behind them; not copied where there are none filled."""
        return tokens if not self.tokens else torch.cat([self.view(), tokens], dim=-2)

    def slide(self, tokens: Tensor) -> None:
        """Put tokens behind those that are there, and let the first go where there is no room."""
        if self.held is None:
            return
        capacity = self.held.shape[-2]
        kept = tokens[:, :, -capacity:] if tokens.shape[-2] >= capacity else None
        if kept is None:
            excess = self.tokens + tokens.shape[-2] - capacity
            kept = tokens if excess <= 0 else torch.cat([self.view()[:, :, excess:], tokens], dim=-2)
            self.tokens = self.tokens if excess <= 0 else 0
        else:
            self.tokens = 0
        self.write(kept)

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        if self.held is not None:
            yield self.held

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        if self.held is not None:
            self.held = change(self.held)


class Pending:
    """The window of recent tokens in front of a store, of a size that is set once."""

    COLUMNS = ("keys", "values", "inputs", "trace")

    def __init__(self) -> None:
        self._columns: dict[str, Buffer] = {}

    @property
    def tokens(self) -> int:
        """How many wait."""
        return self._columns["keys"].tokens if self._columns else 0

    @property
    def is_allocated(self) -> bool:
        """Whether there is a window yet."""
        return bool(self._columns)

    @property
    def room(self) -> int:
        """How many more can wait."""
        return self._columns["keys"].room if self._columns else 0

    def allocate(self, like: Tokens, capacity: int) -> None:
        """Room for ``capacity`` tokens like these."""
        for name in self.COLUMNS:
            column = getattr(like, name)
            if column is not None:
                self._columns[name] = Buffer()
                self._columns[name].allocate(column, capacity)

    def write(self, tokens: Tokens) -> None:
        """Put tokens behind those that are there; there must be room."""
        for name, buffer in self._columns.items():
            buffer.write(getattr(tokens, name))

    def clear(self) -> None:
        """Forget all of them; the room stays."""
        for buffer in self._columns.values():
            buffer.tokens = 0

    def view(self, first: int) -> Tokens:
        """What waits, of which the first is number ``first`` of the text."""
        return Tokens.consecutive(first=first, **{name: buffer.view() for name, buffer in self._columns.items()})

    def behind(self, tokens: Tokens, first: int) -> Tokens:
        """What waits with ``tokens`` behind it; not copied where nothing waits."""
        joined = {name: buffer.behind(getattr(tokens, name)) for name, buffer in self._columns.items()}
        return Tokens.consecutive(first=first, **joined)

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        for buffer in self._columns.values():
            yield from buffer.tensors()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        for buffer in self._columns.values():
            buffer.over_batch_(change)
