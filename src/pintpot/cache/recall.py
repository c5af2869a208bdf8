"""Stores that keep every token, most of them on a slower tier, and recall those that a query asks for.

A layer holds, in time order::

    [ first tokens, on the device ] [ filed tokens, on the tier, with an index on the device ] [ recent, on the device ]

Recent tokens are filed by groups of equal size, so that what is where depends on counts alone. Several queries at once
(a prompt, read in pieces) attend to everything, block by block; a single one to the first and recent tokens and to as
many filed ones as the budget allows, chosen by the index.

Shapes: B batch, K key-value heads, T tokens, n recalled tokens, W numbers of a row (a key with its value), D head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pintpot.cache._base import Call, Chunk, LayerSizes, Place, Store, StoreState
from pintpot.cache.dense import dense_chunks
from pintpot.cache.forecast import full_layers
from pintpot.cache.tiers import BLOCK_TOKENS, Rows, open_rows, row_width, tier_below, tier_bytes
from pintpot.cache.tokens import Pending, Tokens
from pintpot.core.errors import CompositionError
from pintpot.core.ledger import Tier
from pintpot.core.shape import ModelShape
from pintpot.core.work import Work
from pintpot.core.workload import Generate, Workload


@dataclass(frozen=True, kw_only=True)
class RecallStore(Store):
    """What stores with recall share.

    Attributes:
        folder: where the cache's files are; empty for host memory under a GPU, and for the system's temporary folder
            under a model in host memory.
        in_order: filed tokens stay in the order in which they came.
    """

    in_order: ClassVar[bool] = True
    folder: str = ""

    @property
    def first(self) -> int:
        """First tokens, which stay on the device."""
        return 0

    @property
    def recent(self) -> int:
        """The fewest recent tokens that stay on the device, those in front of the store included."""
        return 0

    @property
    @abstractmethod
    def group(self) -> int:
        """Tokens that are filed together."""

    @property
    @abstractmethod
    def recalled(self) -> int:
        """The most filed tokens that a query attends to."""

    def require(self, **counts: int) -> None:
        """Refuse counts below their least.

        Raises:
            CompositionError: naming them.
        """
        wrong = {name: count for name, count in counts.items() if count < 1}
        if wrong or self.recalled < 1:
            said = ", ".join(f"{name}={count}" for name, count in wrong.items()) or f"{self.recalled} recalled tokens"
            raise CompositionError(f"{self.name} cannot have {said}", hint="counts are at least 1")

    def near(self, place: Place) -> int:
        """The fewest recent tokens that a state holds on the device."""
        return max(0, self.recent - place.recent_tokens)

    def filed(self, tokens: int, place: Place) -> int:
        """Tokens on the tier after ``tokens`` tokens."""
        return max(0, tokens - self.first - self.near(place)) // self.group * self.group

    def width(self, sizes: LayerSizes) -> int:
        """Numbers of a row on the tier."""
        return row_width(sizes)

    def near_bytes(self, place: Place, batch: int, dtype: torch.dtype) -> int:
        """Bytes of the first and the recent tokens' room."""
        return place.sizes.dense_bytes(self.first + self.near(place) + self.group - 1, batch, dtype)

    @abstractmethod
    def index_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """Bytes on the device by which filed tokens are found, and of those that stay there when recalled."""

    def predict_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.predict_bytes``: what is on the device."""
        if not tokens:
            return 0
        return self.near_bytes(place, batch, dtype) + self.index_bytes(tokens, place, batch, dtype)

    def tier_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> dict[Tier, int]:
        """See ``Store.tier_bytes``."""
        filed = tier_bytes(self.filed(tokens, place), place.sizes.heads, self.width(place.sizes), batch, dtype)
        return {tier_below(self.folder): filed}

    def chunk_bytes(self, sizes: LayerSizes, batch: int) -> int:
        """See ``Store.chunk_bytes``: recalled rows beside the last ones, or a block with its numbers in float32."""
        rows = max(2 * self.recalled, 2 * BLOCK_TOKENS)
        return batch * sizes.heads * self.width(sizes) * 4 * rows

    def decode_bytes(self, tokens: int, place: Place, batch: int, dtype: torch.dtype) -> int:
        """See ``Store.decode_bytes``: what is on the device, and what is recalled into it."""
        recalled = min(self.recalled, self.filed(tokens, place)) * batch * place.sizes.heads * self.width(place.sizes)
        return self.predict_bytes(tokens, place, batch, dtype) + recalled * 4 * 3

    def work(self, work: Work, shape: ModelShape, workload: Workload) -> Work:
        """See ``CacheTechnique.work``; what is recalled comes from disk, where that is the tier."""
        work = super().work(work, shape, workload)
        if not isinstance(workload, Generate) or tier_below(self.folder) is not Tier.DISK:
            return work
        prompt, tokens = workload.prompt_tokens, workload.prompt_tokens + workload.new_tokens // 2
        for place in full_layers(shape):
            if not self.tier_bytes(tokens, place, workload.batch, shape.dtype):
                continue
            row = workload.batch * place.sizes.heads * self.width(place.sizes) * shape.dtype.itemsize
            work = work.plus("decode", disk_bytes=row * min(self.recalled, self.filed(tokens, place)))
            work = work.plus("prefill", disk_bytes=row * self.filed(prompt, place))
        return work


class RowsChunk(Chunk):
    """Keys and values of one block, fetched when they are asked for and let go when they were used."""

    def __init__(self, rows: Rows, index: int, key_dim: int) -> None:
        self.rows, self.index, self.key_dim = rows, index, key_dim
        self.tokens = min(BLOCK_TOKENS, rows.tokens - index * BLOCK_TOKENS)
        self._fetched: Tensor | None = None

    def scores(self, query: Tensor) -> Tensor:
        """See ``Chunk.scores``."""
        self._fetched = self.rows.block(self.index)
        return query @ self._fetched[..., : self.key_dim].transpose(-1, -2).to(query.dtype)

    def mix(self, weights: Tensor) -> Tensor:
        """See ``Chunk.mix``."""
        fetched = self.rows.block(self.index) if self._fetched is None else self._fetched
        self._fetched = None
        return weights @ fetched[..., self.key_dim :].to(weights.dtype)


class Recalled:
    """The rows that were recalled last: those recalled again are not fetched again.

    Attributes:
        held: (B, K, n, W).
        numbers: which they are, int32 (B, K, n); -1 for none.
    """

    def __init__(self) -> None:
        self.held: Tensor | None = None
        self.numbers: Tensor | None = None

    def resize(self, like: Tensor, count: int) -> None:
        """Room for ``count`` rows like (B, K, any, W); what was held is forgotten where that is a change."""
        if self.held is None or self.held.shape[2] != count:
            self.held = like.new_empty((*like.shape[:2], count, like.shape[-1]))
            self.numbers = torch.full((*like.shape[:2], count), -1, dtype=torch.int32, device=like.device)

    def fetch(self, rows: Rows, chosen: Tensor) -> Tensor:
        """Chosen rows, int64 (B, K, n) with n as there is room for: (B, K, n, W)."""
        if self.held is None or self.numbers is None:
            raise ValueError("there is no room for what is recalled")
        slots = torch.full((*chosen.shape[:2], rows.tokens + 1), -1, dtype=torch.int32, device=chosen.device)
        places = torch.arange(chosen.shape[2], dtype=torch.int32, device=chosen.device).expand(chosen.shape)
        # Where nothing is held yet, the slot behind the last token is written to, which none asks for.
        slots.scatter_(2, self.numbers.long() % (rows.tokens + 1), places)
        found = slots.gather(2, chosen)
        out = self.held.gather(2, found.clamp(min=0).long()[..., None].expand(-1, -1, -1, self.held.shape[-1]))
        self.held = rows.gather(chosen, out, found < 0)
        self.numbers = chosen.to(torch.int32)
        return self.held

    def tensors(self) -> Iterator[Tensor]:
        """What is held."""
        if self.held is not None and self.numbers is not None:
            yield from (self.held, self.numbers)

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace what is held by ``change`` of it."""
        if self.held is not None and self.numbers is not None:
            self.held, self.numbers = change(self.held), change(self.numbers)


class RecallState(StoreState):
    """First, filed and recent tokens of one layer; a technique adds the index.

    Attributes:
        rows: the filed tokens; None before the first token.
        recalled: the filed tokens that are on the device.
    """

    def __init__(self, method: RecallStore, place: Place) -> None:
        self.method, self.place = method, place
        self._tokens = 0
        self._first, self._recent = Pending(), Pending()
        self.rows: Rows | None = None
        self.recalled = Recalled()

    @property
    def tokens(self) -> int:
        """See ``StoreState.tokens``."""
        return self._tokens

    def append(self, tokens: Tokens) -> None:
        """See ``StoreState.append``."""
        method = self.method
        if not tokens.count:
            return
        tokens = replace(tokens, inputs=None, trace=None)
        if self.rows is None:
            self._first.allocate(tokens, method.first)
            self._recent.allocate(tokens, method.near(self.place) + method.group - 1)
            self.rows = open_rows(self.row(tokens.part(0, 0)), method.folder)
        missing = min(max(0, method.first - self._tokens), tokens.count)
        self._first.write(tokens.part(0, missing))
        before = method.filed(self._tokens, self.place)
        self._tokens += tokens.count
        tokens = tokens.part(missing)
        count = method.filed(self._tokens, self.place) - before
        if count:
            waiting = self._recent.behind(tokens, 0)
            self.file(waiting.part(0, count))
            self._recent.clear()
            tokens = waiting.part(count)
        self._recent.write(tokens)

    def row(self, tokens: Tokens) -> Tensor:
        """What is put on the tier: (B, K, T, W)."""
        return torch.cat([tokens.keys, tokens.values], dim=-1)

    @abstractmethod
    def file(self, tokens: Tokens) -> None:
        """Put whole groups of tokens on the tier (``put``), and into the index."""

    def put(self, tokens: Tokens, order: Tensor | None = None) -> None:
        """Put tokens on the tier, some at a time, and make room for those that may be recalled.

        Args:
            tokens: whole groups.
            order: in which they are put there, int64 (B, K, T); as they stand where not given.
        """
        if self.rows is None:
            raise ValueError("there is no tier yet")
        for start in range(0, tokens.count, BLOCK_TOKENS):
            stop = start + BLOCK_TOKENS
            part = tokens.part(start, stop) if order is None else tokens.gather(order[:, :, start:stop])
            self.rows.append(self.row(part))
        self.make_room(self.row(tokens.part(0, 0)), self.rows.tokens)

    def make_room(self, like: Tensor, filed: int) -> None:
        """Room for rows like (B, K, any, W) that may be recalled and stay on the device."""
        self.recalled.resize(like, min(self.method.recalled, filed))

    def choose(self, query: Tensor, count: int) -> Tensor:
        """Filed tokens that a query should attend to: int64 (B, K, count).

        Args:
            query: float32 (B, K, R, D), the R query heads of each key-value head, scaled.
            count: how many.
        """
        raise NotImplementedError

    def chunks(self, call: Call) -> Iterator[Chunk]:
        """See ``StoreState.chunks``.

        Raises:
            CompositionError: with a mask that says nothing of the tokens that are attended to.
        """
        yield from self.near_chunks(self._first)
        if self.rows is not None and self.rows.tokens:
            all_of_them = call.queries > 1 or self.rows.tokens <= self.method.recalled
            if call.mask is not None and not (all_of_them and self.method.in_order):
                raise CompositionError(
                    f"{self.method.name} recalls some tokens, and cannot with a padded batch or a custom mask",
                    hint="run prompts of equal length together, or one at a time",
                )
            yield from self.whole_chunks() if call.queries > 1 else self.some_chunks(call)
        yield from self.near_chunks(self._recent)

    def whole_chunks(self) -> Iterator[Chunk]:
        """All filed tokens."""
        if self.rows is not None:
            for index in range(self.rows.blocks):
                yield RowsChunk(self.rows, index, self.place.sizes.key_dim)

    def some_chunks(self, call: Call) -> Iterator[Chunk]:
        """The filed tokens that one query should attend to."""
        if self.rows is not None:
            query = (call.query[:, :, -1].float() * call.scaling).unflatten(1, (self.rows.heads, -1))
            chosen = self.choose(query, min(self.method.recalled, self.rows.tokens))
            yield from self.recalled_chunks(self.recalled.fetch(self.rows, chosen))

    def recalled_chunks(self, rows: Tensor) -> Iterator[Chunk]:
        """Rows (B, K, n, W) as chunks."""
        key_dim = self.place.sizes.key_dim
        yield from dense_chunks(rows[..., :key_dim], rows[..., key_dim:])

    def near_chunks(self, held: Pending) -> Iterator[Chunk]:
        """Tokens on the device as chunks."""
        if held.tokens:
            view = held.view(0)
            yield from dense_chunks(view.keys, view.values)

    def tensors(self) -> Iterator[Tensor]:
        """See ``StoreState.tensors``: those on the device."""
        yield from self._first.tensors()
        yield from self._recent.tensors()
        yield from self.recalled.tensors()

    def tier_nbytes(self) -> int:
        """Bytes on the slower tier."""
        return 0 if self.rows is None else self.rows.nbytes()

    def over_batch_(self, change: Callable[[Tensor], Tensor]) -> None:
        """See ``StoreState.over_batch_``."""
        self._first.over_batch_(change)
        self._recent.over_batch_(change)
        self.recalled.over_batch_(change)
        if self.rows is not None:
            self.rows.over_batch_(change)


def recalled_bytes(count: int, sizes: LayerSizes, batch: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` recalled tokens with their numbers."""
    return count * batch * sizes.heads * (row_width(sizes) * dtype.itemsize + 4)
