"""One layer of the cache: a keep's pending window in front of a store, behind transformers' cache interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from pintpot.cache._base import Call, Chunk, Keep, LayerSizes, Place, Seen, Store, StoreState
from pintpot.cache.cascade import Cascade
from pintpot.cache.dense import DenseChunk, dense_chunks
from pintpot.cache.rows import Rows
from pintpot.cache.stream import attend_chunks, attend_dense
from pintpot.cache.tokens import Buffer, Pending, Tokens
from pintpot.core.errors import BudgetError, CompositionError

MERGE_TOKENS = 1024
"""Up to so many tokens, the dense end of the cache and the new tokens are attended to as one chunk."""


@dataclass(frozen=True)
class Limit:
    """What a cache of a given size was sized for.

    Attributes:
        tokens: the most tokens it may see.
        batch: the most sequences.
        itemsize: bytes of a number.
        budget_bytes: the size it was given.
        piece_tokens: the most tokens that may be read at once, where more of them would wait densely.
    """

    tokens: int
    batch: int
    itemsize: int
    budget_bytes: int
    piece_tokens: int | None = None

    def check(self, tokens: int, batch: int, itemsize: int, piece: int = 1) -> None:
        """Refuse what would not fit.

        Raises:
            BudgetError: naming what is more than planned.
        """
        for name, got, most in (
            ("tokens", tokens, self.tokens),
            ("sequences", batch, self.batch),
            ("bytes a number", itemsize, self.itemsize),
        ):
            if got > most:
                raise BudgetError(
                    f"the cache of {self.budget_bytes} bytes was sized for {most} {name}, and {got} came",
                    hint="build it with the tokens, batch and dtype that it will meet",
                )
        if self.piece_tokens is not None and piece > self.piece_tokens:
            raise BudgetError(
                f"the cache of {self.budget_bytes} bytes takes at most {self.piece_tokens} tokens at once, "
                f"and {piece} came",
                hint=f"read the prompt in pieces: generate(..., prefill_chunk_size={self.piece_tokens}), or "
                "pintpot.cache.chunked_prefill",
            )


class Handle:
    """What a layer gives the model in place of keys and values: only Pintpot's attention can read it.

    Attributes:
        layer: whose tokens are meant.
        tokens: new tokens that the layer does not hold yet, or None.
    """

    __slots__ = ("layer", "tokens")

    def __init__(self, layer: CacheLayer, tokens: Tokens | None) -> None:
        self.layer = layer
        self.tokens = tokens

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CompositionError(
            "the model reads its cache without Pintpot's attention",
            hint="wrap generation in `with pintpot.cache.use_cache_attention(model):`; a model that does not go "
            "through transformers' attention interface cannot use these caches",
        )


class Agreement:
    """What the lowest layer has chosen, for stores in which all layers hold the same tokens."""

    def __init__(self) -> None:
        self.chosen: Tensor | None = None
        self._rows: dict[int, Agreement] = {}

    def of_row(self, row: int) -> Agreement:
        """The agreement on one sequence of a padded batch."""
        return self._rows.setdefault(row, Agreement())


class CacheLayer(CacheLayerMixin):
    """Keep x store for one attention layer.

    ``update`` takes the new tokens in, and the attention that follows must be Pintpot's: new tokens are attended to
    in full precision before they are evicted or packed.

    Args:
        store: how tokens are stored.
        keep: what is kept; None keeps everything.
        place: which layer of which model, with the recent tokens and the reserve that suit the keep.
        limit: what the cache was sized for, if it has a size.
        cascade: the layers among which a ``LayerKeep`` divides.
        agreement: the layers that hold the same tokens, if the store needs that.

    Attributes:
        inputs: what attention was given for the tokens that come next, (B, S, hidden), where the store needs it.
        lower: the layer below with full attention.
        rows: the sequences of a padded batch, where they must be told apart.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        store: Store,
        keep: Keep | None = None,
        place: Place | None = None,
        *,
        limit: Limit | None = None,
        cascade: Cascade | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        super().__init__()
        self.store, self.keep, self.limit = store, keep, limit
        self.lower: CacheLayer | None = None
        self.place = place if place is None or place.index == 0 else place.but(below=self._below)
        self.cascade, self.agreement = cascade, agreement
        self._clear()

    def like(self) -> CacheLayer:
        """An empty layer of the same kind in the same place, for one sequence of a padded batch."""
        return CacheLayer(self.store, self.keep, self.place)

    def _below(self) -> StoreState:
        return cast(CacheLayer, self.lower).stored

    def _clear(self) -> None:
        self.rows: Rows | None = None
        self.state: StoreState | None = None
        self.pending = Pending()
        self.queries = Buffer()
        self.inputs: Tensor | None = None
        self.seen = 0
        self.batch_size = -1
        self.is_initialized = False
        self._waits = False
        if self.cascade is not None:
            self.cascade.clear()

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # a class attribute there
        """Only what is stored as it was can be taken back."""
        return self.keep is None and self.store.exact

    @property
    def stored(self) -> StoreState:
        """What is stored; empty before the first token.

        Raises:
            ValueError: before the first token.
        """
        if self.state is None:
            raise ValueError("nothing has come yet")
        return self.state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note the sizes of what comes.

        Raises:
            BudgetError: when the cache was sized for fewer sequences or smaller numbers.
            CompositionError: when the cache was made for another model.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.heads = key_states.shape[:2]
        sizes = LayerSizes(self.heads, key_states.shape[-1], value_states.shape[-1])
        if self.place is None:
            self.place = Place(sizes)
        own = self.place.sizes
        if (own.heads, own.key_dim, own.value_dim) != (sizes.heads, sizes.key_dim, sizes.value_dim):
            raise CompositionError(
                f"the cache was made for another model: {own.heads} heads of {own.key_dim} and {own.value_dim} numbers "
                f"were expected, and {sizes.heads} of {sizes.key_dim} and {sizes.value_dim} came",
                hint="build it from the configuration of the model that uses it",
            )
        if self.limit is not None:
            self.limit.check(0, self.batch_size, self.dtype.itemsize)
        self.state = self.store.open(self.place)
        self.is_initialized = True

    def update(  # type: ignore[override]  # a handle stands for the tensors
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Handle, Handle]:
        """Take in new tokens (B, K, S, D), and give the handle from which Pintpot's attention reads the layer.

        Raises:
            BudgetError: when they are more than the cache was sized for; nothing has changed then.
            CompositionError: when the tokens before them never came to Pintpot's attention.
        """
        if self._waits:
            raise CompositionError(
                "the last tokens never came to Pintpot's attention, so the cache is incomplete",
                hint="reset the cache, and generate inside `with pintpot.cache.use_cache_attention(model):`",
            )
        count = key_states.shape[-2]
        if self.limit is not None:
            self.limit.check(self.seen + count, key_states.shape[0], key_states.element_size(), count)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.seen = self.seen, self.seen + count
        tokens = Tokens.consecutive(key_states, value_states, first, self._inputs())
        if self.rows is not None:
            handle = Handle(self, tokens)
            self._waits = True
        elif self.keep is None and self.store.exact:
            self.stored.append(tokens)
            handle = Handle(self, None)
        elif self._pending_has_room(count):
            self.pending.write(tokens)
            handle = Handle(self, None)
        else:
            handle = Handle(self, tokens)
            self._waits = True
        return handle, handle

    def _inputs(self) -> Tensor | None:
        if not self.store.needs_inputs:
            return None
        if self.inputs is None:
            raise CompositionError(
                f"{self.store.name} stores what attention is given, which this model's attention does not show",
                hint="generate inside `with pintpot.cache.use_cache_attention(model):`, or use another store",
            )
        inputs, self.inputs = self.inputs[:, None], None
        return inputs

    def _pending_has_room(self, count: int) -> bool:
        """Whether new tokens can wait without any decision or note."""
        if self.keep is None or self.keep.traces:
            return False
        return self.stored.tokens >= self.keep.sinks and self.pending.room >= count

    def attend(self, handle: Handle, call: Call) -> Tensor:
        """Attention of new tokens to all that are held, themselves included: (B, S, H, D).

        Raises:
            CompositionError: when tokens are evicted or packed, and the mask is more than padding in front.
        """
        if call.mask is not None and self.rows is None and not self.is_croppable:
            self._tell_apart(handle)
        if self.rows is not None and handle.tokens is not None:
            out = self.rows.attend(handle.tokens, call)
            handle.tokens = None
            self._waits = False
            return out
        self._remember(call.query)
        if handle.tokens is None:
            whole = self.stored.whole() if self.keep is None else None
            return attend_dense(call, *whole) if whole is not None else self._stream(call, None)
        if self.seen == handle.tokens.count:
            out = attend_dense(call, handle.tokens.keys, handle.tokens.values)
        else:
            out = self._stream(call, handle.tokens)
        self._settle(handle.tokens, call)
        handle.tokens = None
        self._waits = False
        return out

    def _tell_apart(self, handle: Handle) -> None:
        if handle.tokens is None or self.seen > handle.tokens.count:
            raise CompositionError(
                "pads came after tokens that were cached without any: sequences cannot be told apart any more",
                hint="pad the first prompt of a batch on the left, and give its attention mask from the first call on",
            )
        self.rows = Rows(self, self.batch_size)

    def _remember(self, query: Tensor) -> None:
        if self.keep is None or not self.keep.observed_queries:
            return
        if self.queries.held is None:
            self.queries.allocate(query, self.keep.observed_queries)
        self.queries.slide(query)

    def _stream(self, call: Call, tokens: Tokens | None) -> Tensor:
        chunks: list[Chunk] = list(self.stored.chunks(call))
        if self.pending.tokens:
            waiting = self.pending.view(0)
            chunks += dense_chunks(waiting.keys, waiting.values)
        if tokens is not None:
            keys, values = tokens.keys, tokens.values
            end = chunks[-1] if chunks else None
            if isinstance(end, DenseChunk) and end.tokens + keys.shape[-2] <= MERGE_TOKENS:
                chunks[-1] = DenseChunk(
                    torch.cat([end.keys, keys.to(end.keys.dtype)], dim=-2), torch.cat([end.values, values], dim=-2)
                )
            else:
                chunks += dense_chunks(keys, values)
        return attend_chunks(call, chunks, self.heads)

    def _settle(self, tokens: Tokens, call: Call) -> None:
        """Give tokens over: to the store, or to the pending window with the keep's decision on it."""
        if self.keep is None:
            self.stored.append(tokens)
            return
        if self.keep.traces:
            notes = (*tokens.keys.shape[:3], self.keep.traces)
            tokens = tokens.with_trace(tokens.keys.new_zeros(notes, dtype=torch.float32))
        if not self.pending.is_allocated:
            self.pending.allocate(tokens, self.keep.most_pending)
        first = min(max(0, self.keep.sinks - self.stored.tokens), tokens.count)
        if first:
            self.stored.append(tokens.part(0, first))
            tokens = tokens.part(first)
        count = self.pending.tokens + tokens.count
        decided, _ = self.keep.decided(count)
        if decided or self.keep.traces:
            tokens = self._decide(self.pending.behind(tokens, self.seen - count), decided, call)
            self.pending.clear()
        self.pending.write(tokens)

    def _decide(self, tokens: Tokens, decided: int, call: Call) -> Tokens:
        """Store the survivors among the oldest ``decided`` of the pending tokens; gives the others, notes taken."""
        keep = cast(Keep, self.keep)
        queries = self.queries.view() if keep.observed_queries else call.query
        seen = Seen(tokens, decided, queries, call, partial(self.stored.chunks, call), cast(Place, self.place))
        if keep.traces and tokens.count:
            seen = replace(seen, tokens=tokens.with_trace(keep.trace(seen)))
        if decided and self.cascade is not None:
            self.cascade.offer(self.stored.append, seen, self._scores(seen))
        elif decided:
            self.stored.append(seen.tokens.gather(self._chosen(seen)))
        return seen.tokens.part(decided)

    def _scores(self, seen: Seen) -> Tensor:
        scores = cast(Keep, self.keep).score(seen)
        return scores.mean(dim=1, keepdim=True) if self.store.shared_tokens else scores

    def _chosen(self, seen: Seen) -> Tensor:
        if self.agreement is None:
            return cast(Keep, self.keep).choose(self._scores(seen))
        if seen.place.index == 0:
            self.agreement.chosen = cast(Keep, self.keep).choose(self._scores(seen))
        chosen = cast(Tensor, self.agreement.chosen)
        if seen.place.index == seen.place.layers - 1:
            self.agreement.chosen = None
        return chosen

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is held, what calibration found included."""
        if self.rows is not None:
            yield from self.rows.tensors()
        if self.state is not None:
            yield from self.state.tensors()
        yield from self.pending.tensors()
        yield from self.queries.tensors()
        if self.place is not None and self.is_initialized:
            yield from self.place.tensors.values()

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def get_seq_length(self) -> int:
        """Tokens seen (positions go on from here), not tokens held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks have a column for every token seen; with eviction there are none (see ``attend``)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """The most tokens that a cache of a given size may see, else -1."""
        return -1 if self.limit is None else self.limit.tokens

    def reset(self) -> None:
        """Forget everything and free it."""
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            CompositionError: when tokens were packed or may have been evicted.
        """
        count = abs(tokens_to_remove)
        if not count or not self.is_initialized:
            return
        if self.keep is not None:
            raise CompositionError(
                f"{self.keep.name} cannot crop: evicted tokens cannot be brought back",
                hint="use a cache without eviction for assisted decoding, or begin with a new cache",
            )
        self.stored.crop_(count)
        self.seen = max(0, self.seen - count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the sequences in another order (beam search)."""
        self._pick(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times.

        Raises:
            BudgetError: when the cache was sized for fewer sequences.
        """
        if self.limit is not None and self.is_initialized:
            self.limit.check(0, self.batch_size * repeats, self.dtype.itemsize)
        self._pick(torch.arange(max(0, self.batch_size)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some of the sequences."""
        self._pick(indices)

    def _pick(self, rows: Tensor) -> None:
        """These sequences in this order, any of them several times."""
        if not self.is_initialized:
            return
        if rows.dtype == torch.bool:
            rows = rows.nonzero()[:, 0]
        self.batch_size = len(rows)
        if self.rows is not None:
            self.rows.pick_(rows.tolist())
            return

        def change(held: Tensor) -> Tensor:
            return held.index_select(0, rows.to(held.device))

        self.stored.over_batch_(change)
        self.pending.over_batch_(change)
        self.queries.over_batch_(change)

    def offload(self) -> None:
        """Layers are not moved between devices.

        Raises:
            CompositionError: always.
        """
        raise CompositionError("these caches are not offloaded", hint="use transformers' own cache with offloading")

    def prefetch(self) -> None:
        """As ``offload``."""
        self.offload()


class SlidingLayer(DynamicSlidingWindowLayer):
    """transformers' sliding-window layer, holding its window and not a view of all that went through it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See transformers."""
        full: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return full

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.keys, self.values) if self.is_initialized else ()
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)
