"""One layer of the cache: a keep's pending window in front of a store, behind transformers' cache interface."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from pintpot.cache._base import Call, Chunk, Keep, LayerSizes, Place, Seen, Store, StoreState
from pintpot.cache.cascade import Cascade
from pintpot.cache.dense import DenseChunk, dense_chunks
from pintpot.cache.lanes import LaneState, open_state
from pintpot.cache.limit import Limit
from pintpot.cache.links import Agreement, Below
from pintpot.cache.padded import PaddedRows
from pintpot.cache.residue import Residue, ResidueState
from pintpot.cache.shared import Handle, Lent
from pintpot.cache.stream import attend_chunks, attend_dense
from pintpot.cache.tokens import Buffer, Pending, Tokens
from pintpot.core.errors import CompositionError

MERGE_TOKENS = 1024
"""Up to so many tokens, the dense end of the cache and the new tokens are attended to as one chunk."""


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
        residue: what becomes of evicted tokens; None lets them go without a trace.

    Attributes:
        inputs: what attention was given for the tokens that come next, (B, S, hidden), where the store needs it.
        lower: the layer below with full attention.
        rows: the sequences of a padded batch, where they must be told apart.
        readers: layers above that attend to the tokens of this one.
        aside: how many of the last tokens of a call only ask and are not kept.
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
        residue: Residue | None = None,
    ) -> None:
        super().__init__()
        self.store, self.keep, self.limit, self.residue = store, keep, limit, residue
        self.lower: CacheLayer | None = None
        self.place = place if place is None or place.index == 0 else place.but(below=Below(self))
        self.cascade, self.agreement = cascade, agreement
        self.readers = 0
        self.aside = 0
        self._clear()

    def like(self) -> CacheLayer:
        """An empty layer of the same kind in the same place, for one sequence of a padded batch."""
        layer = CacheLayer(self.store, self.keep, self.place, residue=self.residue)
        layer.readers = self.readers
        return layer

    def _clear(self) -> None:
        self.rows: PaddedRows | None = None
        self.state: StoreState | None = None
        self.remains: ResidueState | None = None
        self.pending = Pending()
        self.queries = Buffer()
        self.inputs: Tensor | None = None
        self.seen = 0
        self.batch_size = -1
        self.is_initialized = False
        self._waits = False
        self._lent: Lent | None = None
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
        self.place = self.place.but(tensors={name: self._like(t) for name, t in self.place.tensors.items()})
        self.state = open_state(self.store, self.keep, self.place)
        if self.residue is not None:
            self.remains = self.residue.open(self.place, self.batch_size, self.device)
        self.is_initialized = True

    def _like(self, found: Tensor) -> Tensor:
        """What calibration found, where keys and values are and in their dtype."""
        return found.to(self.device, self.dtype if found.is_floating_point() else found.dtype)

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
        count = key_states.shape[-2] - self.aside
        if self.limit is not None:
            self.limit.check(self.seen + count, key_states.shape[0], key_states.element_size(), count)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, self.seen = self.seen, self.seen + count
        tokens = Tokens.consecutive(key_states, value_states, first, self._inputs())
        if self.rows is not None or self.aside:
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
            out = self.rows.attend(self, handle.tokens, call)
            handle.tokens = None
            self._waits = False
            return out
        if handle.tokens is not None and self.seen + self.aside == handle.tokens.count:
            self.store.check(handle.tokens, call, cast(Place, self.place))
        self._remember(call.query[:, :, : call.queries - self.aside])
        out = self._attention(handle.tokens, call)
        self._lent = Lent(call, handle.tokens, self.readers)
        handle.tokens = None
        self._give_over()
        return out

    def lend(self, call: Call) -> Tensor:
        """Attention of a layer above to the tokens of this one, the newest included: (B, S, H, D).

        Raises:
            CompositionError: when this layer has not attended to them itself before.
        """
        if self.rows is not None:
            return self.rows.lend(self, call)
        lent = self._lent
        if lent is None:
            raise CompositionError(
                "a layer attends to tokens that an earlier one has not seen", hint="run the layers of a model in order"
            )
        # Stores that make keys and values from the attention's inputs must use the weights of the layer they are of.
        out = self._attention(lent.tokens, replace(call, module=lent.call.module))
        lent.readers -= 1
        self._give_over()
        return out

    def _attention(self, tokens: Tokens | None, call: Call) -> Tensor:
        if tokens is None:
            whole = self.stored.whole() if self.keep is None else None
            return attend_dense(call, *whole) if whole is not None else self._stream(call, None)
        if self.seen + self.aside == tokens.count:
            return attend_dense(call, tokens.keys, tokens.values)
        return self._stream(call, tokens)

    def _give_over(self) -> None:
        """Settle the new tokens once everybody has attended to them."""
        lent = self._lent
        if lent is None or lent.readers:
            return
        self._lent = None
        self.stored.observe(lent.call, lent.tokens)
        if lent.tokens is not None:
            self._settle(lent.tokens, lent.call)
        self._waits = False

    def _tell_apart(self, handle: Handle) -> None:
        if self.aside:
            raise CompositionError("a padded batch cannot be asked aside", hint="read one sequence at a time")
        if handle.tokens is None or self.seen > handle.tokens.count:
            raise CompositionError(
                "pads came after tokens that were cached without any: sequences cannot be told apart any more",
                hint="pad the first prompt of a batch on the left, and give its attention mask from the first call on",
            )
        self.rows, self.remains = PaddedRows(self, self.batch_size), None

    def _remember(self, query: Tensor) -> None:
        if self.keep is None or not self.keep.observed_queries:
            return
        if self.queries.held is None:
            self.queries.allocate(query, self.keep.observed_queries)
        self.queries.slide(query)

    def _stream(self, call: Call, tokens: Tokens | None) -> Tensor:
        chunks: list[Chunk] = list(self._chunks(call))
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
        return attend_chunks(call, chunks, self.heads, self.remains)

    def _chunks(self, call: Call) -> Iterator[Chunk]:
        """What is stored, as the keep wants it to be attended to."""
        chunks = self.stored.chunks(call)
        if self.keep is None:
            return chunks
        return self.keep.attended(chunks, self.seen + self.aside - call.queries, cast(Place, self.place))

    def _settle(self, tokens: Tokens, call: Call) -> None:
        """Give tokens over: to the store, or to the pending window with the keep's decision on it."""
        new = tokens.count - self.aside
        if self.keep is None:
            self.stored.append(tokens.part(0, new))
            return
        if self.keep.traces:
            notes = (*tokens.keys.shape[:3], self.keep.traces)
            tokens = tokens.with_trace(tokens.keys.new_zeros(notes, dtype=torch.float32))
        if not self.pending.is_allocated:
            self.pending.allocate(tokens, self.keep.most_pending)
        first = min(max(0, self.keep.sinks - self.stored.tokens), new)
        if first:
            self.stored.append(tokens.part(0, first))
            tokens = tokens.part(first)
        count = self.pending.tokens + new - first
        decided, _ = self.keep.decided(count)
        if decided or self.keep.traces:
            tokens = self._decide(self.pending.behind(tokens, self.seen - count), decided, call)
            self.pending.clear()
        self.pending.write(tokens.part(0, tokens.count - self.aside))

    def _decide(self, tokens: Tokens, decided: int, call: Call) -> Tokens:
        """Store the survivors among the oldest ``decided`` of the pending tokens; gives the others, notes taken."""
        keep = cast(Keep, self.keep)
        queries = self.queries.view() if keep.observed_queries else call.query
        if self.aside:
            queries = call.query[:, :, -self.aside :]
        seen = Seen(tokens, decided, queries, call, partial(self._chunks, call), cast(Place, self.place))
        if keep.traces and tokens.count:
            seen = replace(seen, tokens=tokens.with_trace(keep.trace(seen)))
        if decided and isinstance(self.state, LaneState):
            self.state.keep_(seen, self._scores(seen), keep.assign, self.remains)
        elif decided and self.cascade is not None:
            self.cascade.offer(self.stored.append, seen, self._scores(seen), self.remains)
        elif decided:
            chosen = self._chosen(seen) if keep.decided(tokens.count - self.aside)[1] else None
            if chosen is not None:
                self.stored.append(seen.tokens.gather(chosen))
            if self.remains is not None:
                self.remains.let_go(seen.tokens.part(0, decided), chosen)
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
        if self.remains is not None:
            yield from self.remains.tensors()
        yield from self.pending.tensors()
        yield from self.queries.tensors()
        if self.place is not None and self.is_initialized:
            yield from self.place.tensors.values()

    def nbytes(self) -> int:
        """Bytes held, spare capacity included."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors())

    def tier_nbytes(self) -> int:
        """Bytes held on slower tiers."""
        alone = [] if self.rows is None else self.rows.alone
        return sum(layer.tier_nbytes() for layer in alone) + (0 if self.state is None else self.state.tier_nbytes())

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
        if self.remains is not None:
            self.remains.over_batch_(change)
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
    """transformers' sliding-window layer, holding its window and not a view of all that went through it.

    Attributes:
        aside: how many of the last tokens of a call only ask and are not kept.
    """

    aside = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See transformers."""
        full: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        if self.aside:
            kept = full[0].shape[2] - self.aside
            self.keys, self.values = (held[:, :, :kept][:, :, 1 - self.sliding_window :] for held in full)
            self.cumulative_length -= self.aside
        if not self.record_past and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        return full

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.keys, self.values) if self.is_initialized else ()
        return sum(t.untyped_storage().nbytes() for t in held if t is not None)
